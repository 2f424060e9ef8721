"""What a pass is: a small stateless class with a name, the stages it needs and leaves, and `run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .graph import TracedGraph
from .quantize.held import QuantizedWeight
from .stages import Stage


@dataclass(frozen=True)
class QuantizationGroup:
    """Weights that are quantized alike; of several groups the first that takes a weight has it.

    Attributes:
        scheme: a name of passes/quantize/schemes.py. targets, ignore: patterns of weight names.
        group_size: columns per scale, where the scheme has groups; symmetric: without zero points.
    """

    scheme: str
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    group_size: int = 128
    symmetric: bool = True


@dataclass(frozen=True)
class Context:
    """What a pass may know besides the graph.

    Attributes:
        phase: "decode" or "prefill"; batch, length: the engine's fixed shape in tokens.
        device: "cpu" or "cuda".
        max_length: longest sequence in tokens; block_size: tokens a KV block holds.
        num_blocks: blocks of the cache, the null block included; max_blocks: blocks a sequence can have.
        quantization: the groups of weights to be quantized.
        held: weights that the checkpoint holds quantized, by their names in the model; made_dense: those of them that
            no op reads quantized, each with what it is.
        kv_cache_dtype: "auto" for that of the activations, or "fp8" or "int8".
    """

    phase: str
    batch: int
    length: int
    device: str = "cpu"
    max_length: int = 512
    block_size: int = 16
    num_blocks: int = 33
    max_blocks: int = 32
    quantization: tuple[QuantizationGroup, ...] = ()
    held: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    made_dense: Mapping[str, str] = field(default_factory=dict)
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True)
class Miss:
    """A near match that was left as it is, and why."""

    site: str
    reason: str


@dataclass
class Outcome:
    """What a pass did: sites changed, near misses, and facts for the build report."""

    changed: int = 0
    missed: list[Miss] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    def miss(self, site: str, reason: str) -> None:
        """Note a near match."""
        self.missed.append(Miss(site, reason))


@runtime_checkable
class GraphPass(Protocol):
    """One rewrite. The class docstring is its description in `ingot passes`."""

    name: str
    needs: Stage
    leaves: Stage
    exact: bool

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Rewrite the graph in place; `changed == 0` means the graph is untouched."""
        ...
