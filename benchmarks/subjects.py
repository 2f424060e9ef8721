"""What is measured, and what is to be reached: models by name, with their recipes, sizes of tests, peers and goals.

Data only, this file for the CPU and gpu_subjects.py for GPUs. Random weights in a real shape need no checkpoint: speed
does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..artifacts.errors import UsageError
from .gpu_subjects import GPU_MODELS
from .results import Goal
from .workload import Workload

# Keys of goals; goals.py computes their values.
_ISSUE = "issue 2"
_TINY = (Goal("start_s", "<=", 1.3, f"{_ISSUE} (transformers: 2.8)"),)
_LLAMA_BUILD = (
    Goal("build_peak_over_checkpoint", "<=", 2.0, _ISSUE),
    Goal("build_s", "<=", 240.0, _ISSUE),
)


@dataclass(frozen=True)
class Subject:
    """One model to measure.

    Args:
        recipe: a file in recipes/. settings: `--set` of the build.
        prompt: text of the start-up run, where there is a tokenizer.
        context: tokens of the prompt that decoding starts from.
        generate, prefill: tokens of the tests tg and pp; `peer_…` for a peer too slow for as many.
        stories: the checkpoint is not in the repository; `--stories` says where it is.
        large: left out of quick runs unless named.
        gguf: the type of llama.cpp's weights that it is compared with, "" for none.
        device: "cpu" or "cuda". workloads: on a GPU, the tests, in place of context, generate and prefill.
    """

    name: str
    recipe: str
    goals: tuple[Goal, ...]
    settings: tuple[str, ...] = ()
    prompt: str = "Once upon a time"
    context: int = 16
    generate: int = 128
    prefill: int = 512
    peer_generate: int = 128
    peer_prefill: int = 512
    stories: bool = False
    large: bool = False
    gguf: str = ""
    device: str = "cpu"
    workloads: tuple[Workload, ...] = ()

    @property
    def folder(self) -> str:
        """The name of the artifact's folder: one per model and device."""
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    @property
    def decoding(self) -> tuple[int, int]:
        """Context and tokens of the first decoding test."""
        first = next((w for w in self.workloads if w.phase == "decode"), None)
        return (first.context, first.tokens) if first else (self.context, self.generate)

    def quick(self) -> Subject:
        """The same with fewer tokens, to see that everything works."""
        return replace(
            self, workloads=tuple(w.quick() for w in self.workloads),
            generate=min(self.generate, 32), prefill=min(self.prefill, 128),
            peer_generate=min(self.peer_generate, 32), peer_prefill=min(self.peer_prefill, 128),
        )  # fmt: skip


_LLAMA_1B = (
    "model.source=random",
    # The logits of random weights are nearly flat: which token is on top says nothing there; KL still does.
    "gate.budgets.top1=0",
    # Nor do they say what a scheme costs.
    "gate.accuracy_tokens=0",
    "model.max_length=1152",
    "shapes.decode_batch_sizes=[1]",
    "shapes.prefill_lengths=[128,512]",
)

# Rounding costs normally distributed weights more than trained ones: a KL of 0.2 in int4.
_LOSSY = ("gate.budgets.mean_kl=1",)
_LARGE: dict[str, Any] = {
    "recipe": "llama-3.2-1b.toml", "large": True, "context": 1000, "generate": 64, "peer_generate": 8,
    "peer_prefill": 128,
}  # fmt: skip

SUBJECTS = (
    Subject(
        "stories260k", "stories260k.toml", stories=True,
        goals=(Goal("ms_per_token", "<=", 0.3, f"{_ISSUE} (transformers: 1.05)"), *_TINY),
    ),
    Subject("demo", "demo.toml", goals=_TINY),
    Subject("demo-int8", "demo-int8.toml", goals=_TINY),
    Subject(
        "llama-3.2-1b", gguf="BF16", settings=_LLAMA_1B, **_LARGE,
        goals=(
            Goal("tokens_per_second", ">=", 14.0, f"{_ISSUE} (llama.cpp: 16, untouched AOTInductor: 6.5)"),
            # The same goal for a machine with another memory: 14 tok/s x 2.47 GB of the 40 GB/s it was set on.
            Goal("read_share", ">=", 0.86, "the goal above as a share of the read bandwidth it was set on"),
            *_LLAMA_BUILD,
        ),
    ),
    Subject(
        "llama-3.2-1b-int8", gguf="Q8_0", **_LARGE,
        settings=("name=llama-3.2-1b-int8", *_LLAMA_1B, "quantization.scheme=W8A16"),
        goals=(
            Goal("tokens_per_second", ">=", 22.0, f"{_ISSUE} (llama.cpp Q8_0: 26)"),
            # 22 tok/s x 1.24 GB of 40 GB/s.
            Goal("read_share", ">=", 0.68, "the goal above as a share of the read bandwidth it was set on"),
            *_LLAMA_BUILD,
        ),
    ),
    Subject(
        "llama-3.2-1b-w8a8", gguf="Q8_0", goals=_LLAMA_BUILD, **_LARGE,
        settings=("name=llama-3.2-1b-w8a8", *_LLAMA_1B, *_LOSSY, "quantization.scheme=W8A8"),
    ),
    Subject(
        "llama-3.2-1b-int4", gguf="Q4_0", goals=_LLAMA_BUILD, **_LARGE,
        settings=("name=llama-3.2-1b-int4", *_LLAMA_1B, *_LOSSY, "quantization.scheme=W4A16"),
    ),
    *(
        Subject(
            m.name, f"{m.recipe or m.name}.toml", m.goals, m.settings, device="cuda", workloads=m.workloads,
            large=m.large,
        )
        for m in GPU_MODELS
    ),
)  # fmt: skip


def choose(names: Sequence[str], quick: bool, device: str = "cpu") -> list[Subject]:
    """The subjects of these names in the order asked for; without names all, or all small ones of a quick run.

    Raises:
        UsageError: an unknown name.
    """
    known = {s.name: s for s in SUBJECTS if s.device == device}
    for name in names:
        if name not in known:
            fix = f"known ones for --device {device}: {', '.join(known)}"
            raise UsageError(f"there is no model {name!r} to measure", "", fix)
    chosen = [known[n] for n in dict.fromkeys(names)] or [s for s in known.values() if not (quick and s.large)]
    return [s.quick() for s in chosen] if quick else chosen
