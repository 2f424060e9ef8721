"""The sections of a recipe: one frozen dataclass per TOML table, each key with its type, default and bounds.

recipes/README.md says what every key means, once; a test compares it with these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .recipe_parse import integer, integers, real

MAX_CACHE_TOKENS = 1 << 27
GROUP_SIZES = (32, 64, 128)
DEFAULT_PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "The three most important ideas in physics are",
    "def fibonacci(n):",
    "Question: how many legs do two spiders have? Answer:",
)


@dataclass(frozen=True)
class ModelSource:
    """Where config, weights and tokenizer come from, and how they are read."""

    source: Literal["local", "hub", "random"] = "local"
    path: str = ""
    id: str = ""
    revision: str = ""
    config: str = ""
    seed: int = integer(0, 0, (1 << 63) - 1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int = integer(2048, 1, 1 << 20)


@dataclass(frozen=True)
class Shapes:
    """The fixed shapes engines are compiled for, and the KV cache they share."""

    decode_batch_sizes: tuple[int, ...] = integers((1,), 1, 1024, most=16)
    prefill_lengths: tuple[int, ...] = integers((128,), 1, 1 << 20, most=16)
    kv_block_size: int = integer(16, 1, 256)
    kv_cache_tokens: int = integer(0, 0, MAX_CACHE_TOKENS)
    kv_cache_dtype: Literal["auto", "fp8", "int8"] = "auto"


@dataclass(frozen=True)
class Group:
    """Weights that are stored alike (llm-compressor's words)."""

    scheme: Literal["none", "W8A16", "W4A16", "FP8", "FP8-W8A16", "W8A8"] = "none"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    group_size: int = integer(128, 0, max(GROUP_SIZES))
    symmetric: bool = True
    algorithm: Literal["rtn"] = "rtn"


@dataclass(frozen=True)
class Quantization(Group):
    """Which weights are stored in fewer bits: one group, or several of which the first that takes a weight has it."""

    groups: tuple[Group, ...] = ()

    @property
    def active(self) -> tuple[Group, ...]:
        """The groups in order; none where nothing is quantized."""
        groups = self.groups or (self,)
        return groups if any(g.scheme != "none" for g in groups) else ()

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that occur, each once, without "none"."""
        return tuple(dict.fromkeys(g.scheme for g in self.active if g.scheme != "none"))


@dataclass(frozen=True)
class Passes:
    """Changes to the pass pipeline."""

    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budgets:
    """How far from eager Hugging Face an engine may be; None takes the gate's default for dtype and scheme."""

    max_relative_error: float | None = real(None, 0.0, 1e6)
    mean_kl: float | None = real(None, 0.0, 1e6)
    top1: float | None = real(None, 0.0, 1.0)


@dataclass(frozen=True)
class Gate:
    """What the numeric gate runs, and what it demands."""

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    prompts_file: str = ""
    max_tokens: int = integer(32, 1, 4096)
    seed: int = integer(0, 0, (1 << 63) - 1)
    task: str = ""
    task_examples: int = integer(200, 1, 100_000)
    task_exact_match: float = real(0.95, 0.0, 1.0)
    accuracy_tokens: int | None = integer(None, 0, 1 << 20)
    accuracy_text: str = ""
    budgets: Budgets = Budgets()


@dataclass(frozen=True)
class Target:
    """The machine the artifact is for."""

    device: Literal["cpu", "cuda"] = "cpu"
    isa: Literal["native", "portable"] = "native"
    autotune: bool = True
