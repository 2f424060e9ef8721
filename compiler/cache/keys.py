"""What a stage's result depends on: the slice of the recipe it reads, and the code, tools and inputs it is made with.

A recipe key belongs to every stage until `UNREAD` says that a stage does not read it, so a new key is safe at once.
"""

from __future__ import annotations

from typing import Any

from ..recipe import Recipe
from .entry import flatten

STAGES = ("trace", "weights", "kernels", "engine", "gate", "accuracy", "task", "speed")

# Where a file is does not matter, its content does, and that is in the key as a digest (inputs.py); `name` is written
# into the manifest and read by no stage.
PLACES = frozenset(
    {
        "name",
        "model.source",
        "model.path",
        "model.id",
        "model.revision",
        "model.config",
        "gate.prompts_file",
        "gate.task",
    }
)
_MODEL = frozenset({"model.seed", "model.dtype", "model.max_length"})
_COUNTS = frozenset({"shapes.decode_batch_sizes", "shapes.prefill_lengths"})
_CACHE = frozenset({"shapes.kv_block_size", "shapes.kv_cache_tokens"})
_QUANTIZATION = frozenset(
    {"quantization.scheme", "quantization.targets", "quantization.ignore", "quantization.group_size"}
    | {"quantization.symmetric", "quantization.algorithm", "quantization.groups"}
)
_BUDGETS = frozenset({"gate.budgets.max_relative_error", "gate.budgets.mean_kl", "gate.budgets.top1"})
_GATE = frozenset({"gate.prompts", "gate.max_tokens", "gate.seed", *_BUDGETS})
_ACCURACY = frozenset({"gate.accuracy_tokens"})
_TASK = frozenset({"gate.task_examples", "gate.task_exact_match"})
_PASSES = frozenset({"passes.skip"})
_BACK_END = frozenset({"target.isa", "target.autotune"})

_NOT_CODE = PLACES | _MODEL | _COUNTS | _CACHE | _QUANTIZATION | _PASSES | _GATE | _ACCURACY | _TASK

# The counts of engines are in the fields of each engine; what passes made of the recipe is in graphs and weights'
# expressions, which the later stages have in their keys.
UNREAD: dict[str, frozenset[str]] = {
    "trace": PLACES | {"model.seed"} | _COUNTS | _GATE | _ACCURACY | _TASK | _BACK_END,
    "weights": PLACES | {"model.max_length"} | _COUNTS | _CACHE | _GATE | _ACCURACY | _TASK | _PASSES | _BACK_END,
    "kernels": _NOT_CODE | {"target.autotune"},
    "engine": _NOT_CODE,
    "gate": PLACES | _ACCURACY | _TASK | _PASSES | _BACK_END,
    "accuracy": PLACES | {"gate.prompts", "gate.max_tokens"} | _TASK | _PASSES | _BACK_END,
    "speed": PLACES | _GATE | _ACCURACY | _TASK | _PASSES | _BACK_END,
    "task": PLACES | _GATE | _ACCURACY | _COUNTS | _PASSES | _BACK_END,
}


def recipe_slice(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The recipe's keys that `stage` reads, by dotted name."""
    unread = UNREAD[stage]
    return {name: value for name, value in flatten(recipe.to_dict()).items() if name not in unread}
