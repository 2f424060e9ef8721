"""What is measured, and what is to be reached: models by name, with their recipes, sizes of tests, peers and goals.

Data only. Random weights in a real shape need no checkpoint: speed does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..artifacts.errors import UsageError
from .results import Goal

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

    def quick(self) -> Subject:
        """The same with fewer tokens, to see that everything works."""
        return replace(
            self, generate=min(self.generate, 32), prefill=min(self.prefill, 128),
            peer_generate=min(self.peer_generate, 32), peer_prefill=min(self.peer_prefill, 128),
        )  # fmt: skip


_LLAMA_1B = (
    "model.source=random",
    # The logits of random weights are nearly flat: which token is on top says nothing there; KL still does.
    "gate.budgets.top1=0",
    "model.max_length=1024",
    "shapes.decode_batch_sizes=[1]",
    "shapes.prefill_lengths=[128]",
)

SUBJECTS = (
    Subject(
        "stories260k", "stories260k.toml", stories=True,
        goals=(Goal("ms_per_token", "<=", 0.3, f"{_ISSUE} (transformers: 1.05)"), *_TINY),
    ),
    Subject("demo", "demo.toml", goals=_TINY),
    Subject("demo-int8", "demo-int8.toml", goals=_TINY),
    Subject(
        "llama-3.2-1b", "llama-3.2-1b.toml", large=True, settings=_LLAMA_1B, peer_generate=8, peer_prefill=128,
        goals=(
            Goal("tokens_per_second", ">=", 14.0, f"{_ISSUE} (llama.cpp: 16, untouched AOTInductor: 6.5)"),
            # The same goal for a machine with another memory: 14 tok/s x 2.47 GB of the 40 GB/s it was set on.
            Goal("read_share", ">=", 0.86, "the goal above as a share of the read bandwidth it was set on"),
            *_LLAMA_BUILD,
        ),
    ),
    Subject(
        "llama-3.2-1b-int8", "llama-3.2-1b.toml", large=True, peer_generate=8, peer_prefill=128,
        settings=("name=llama-3.2-1b-int8", *_LLAMA_1B, "quantization.scheme=W8A16"),
        goals=(
            Goal("tokens_per_second", ">=", 22.0, f"{_ISSUE} (llama.cpp Q8_0: 26)"),
            # 22 tok/s x 1.24 GB of 40 GB/s.
            Goal("read_share", ">=", 0.68, "the goal above as a share of the read bandwidth it was set on"),
            *_LLAMA_BUILD,
        ),
    ),
)  # fmt: skip


def choose(names: Sequence[str], quick: bool) -> list[Subject]:
    """The subjects of these names in the order asked for; without names all, or all small ones of a quick run.

    Raises:
        UsageError: an unknown name.
    """
    known = {s.name: s for s in SUBJECTS}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no model {name!r} to measure", "", f"known ones: {', '.join(known)}")
    chosen = [known[n] for n in dict.fromkeys(names)] or [s for s in SUBJECTS if not (quick and s.large)]
    return [s.quick() for s in chosen] if quick else chosen
