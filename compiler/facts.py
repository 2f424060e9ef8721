"""What is known about engines once the passes have run, as plain data: enough to write an artifact around them.

The graphs themselves stay behind: nothing stores a graph without pickling code objects. What is kept is their digest,
under which compiled engines are found again, and all that manifest and reports say about them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..artifacts.manifest import Buffer, CacheLayer
from .recipe import Recipe


@dataclass(frozen=True)
class WeightFacts:
    """One weight: its shape and dtype in the graph, and in words how it follows from stored ones."""

    shape: tuple[int, ...]
    dtype: str
    expression: str


@dataclass(frozen=True)
class EngineFacts:
    """One engine after the passes.

    Attributes:
        graph: digest of its printed code with all shapes and dtypes; "" if it cannot be told apart by them.
        context: the fields of passes.base.Context; records: those of passes.instruments.PassRecord.
        config: the model's checked config.json.
    """

    graph: str
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    weights: dict[str, WeightFacts]
    context: dict[str, Any]
    records: list[dict[str, Any]]
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineFacts:
        """What `to_json` wrote."""

        def buffers(items: list[dict[str, Any]]) -> tuple[Buffer, ...]:
            return tuple(Buffer(item["name"], tuple(item["shape"]), item["dtype"]) for item in items)

        weights = {n: WeightFacts(tuple(w["shape"]), w["dtype"], w["expression"]) for n, w in data["weights"].items()}
        return cls(
            data["graph"], buffers(data["inputs"]), buffers(data["outputs"]), weights, data["context"],
            data["records"], data["config"],
        )  # fmt: skip


@dataclass(frozen=True)
class BuildFacts:
    """All engines of a build."""

    recipe: Recipe
    folder: Path | None
    engines: dict[str, EngineFacts]

    @property
    def first(self) -> EngineFacts:
        """Any engine, for what is the same in all."""
        return next(iter(self.engines.values()))

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return self.first.config

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """The KV cache of each layer, as the pass that put it in has found it; the same in every engine."""
        layers = next(r["facts"]["layers"] for r in self.first.records if "layers" in r["facts"])
        return tuple(CacheLayer(tuple(x["key"]), tuple(x["value"]), x["window"]) for x in layers)

    @property
    def cache_dtype(self) -> str:
        """What keys and values are kept in."""
        return next(buffer.dtype for buffer in self.first.inputs if buffer.name == "k_cache_0")

    @property
    def lossy(self) -> bool:
        """Whether the artifact can differ from float32 by more than the order of additions."""
        records = (record for known in self.engines.values() for record in known.records)
        return self.recipe.model.dtype != "float32" or any(r["changed"] and not r["exact"] for r in records)

    @property
    def kept(self) -> list[str]:
        """Formats of the weights that the checkpoint holds quantized and that stay so."""
        return kept_formats(r["facts"] for known in self.engines.values() for r in known.records)

    @property
    def kept_activations(self) -> list[str]:
        """What those weights' products quantize activations to."""
        return kept_formats((r["facts"] for known in self.engines.values() for r in known.records), "activations")

    @property
    def vocabulary(self) -> int:
        """Logits per token: what the config calls vocab_size, as the graphs have it."""
        return self.first.outputs[1].shape[1]


def kept_formats(facts: Iterable[Mapping[str, Any]], what: str = "held") -> list[str]:
    """What the pass keep-quantized has noted of weights ("held") or of activations, each format once."""
    return sorted({name for known in facts if "held" in known for name in known[what]})
