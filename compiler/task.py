"""The task of a recipe: questions with checkable answers, asked of the finished artifact through the runtime.

A number people understand, before and after quantization: the share of answers that match to the letter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..artifacts.errors import UsageError
from ..artifacts.manifest import Manifest
from .facts import BuildFacts
from .lean_child import ask_child
from .plan import Plan
from .reference_model import ReferenceModel
from .task_file import read_task
from .tokenizer_check import load_tokenizer

Load = Callable[[str], Any]


def run_task(plan: Plan | BuildFacts, root: Path, manifest: Manifest, load: Load | None = None) -> dict[str, Any]:
    """Ask all questions of the artifact in a lean process.

    Args:
        load: gives a stored weight by name; with it the model itself, eager and in float32, is asked too.

    Returns:
        items, exact_match (0..1), required, some wrong answers, and with `load` reference_exact_match.
    """
    recipe = plan.recipe
    path = recipe.task_path()
    if path is None:
        raise UsageError("the recipe has no task", "gate.task is not set", "")
    items = read_task(path, recipe.gate.task_examples)
    answers = ask_child("ingot.runtime.answer", {"items": items}, root, manifest)
    wrong = [
        {"question": item["messages"][-1].get("content", ""), "answer": item["answer"], "given": given["text"]}
        for item, given in zip(items, answers, strict=True)
        if given["text"].strip() != item["answer"]
    ]
    share = 1 - len(wrong) / len(items)
    found = {"items": len(items), "exact_match": share, "required": recipe.gate.task_exact_match, "wrong": wrong[:5]}
    if load is not None:
        prompts = [answer["prompt_token_ids"] for answer in answers]
        found["reference_exact_match"] = _reference_match(plan, root, load, prompts, [i["answer"] for i in items])
    return found


def _reference_match(
    plan: Plan | BuildFacts, root: Path, load: Load, prompts: Sequence[list[int]], answers: Sequence[str]
) -> float:
    """The share of answers that eager transformers would give greedily, in float32.

    Nothing is generated: greedy decoding gives an answer if each of its tokens, and an end behind them, is the
    likeliest one after those before it. An answer in other tokens than the tokenizer's own counts as wrong.
    """
    tokenizer = load_tokenizer(root / "tokenizer.json")
    ends = json.loads((root / "generation.json").read_text())["eos_token_ids"]
    given = [tokenizer.encode(answer, add_special_tokens=False).ids for answer in answers]
    model = ReferenceModel(plan.config, "float32", load, plan.recipe.target.device)
    logits = model.logits([p + a for p, a in zip(prompts, given)], [len(p) - 1 for p in prompts])
    right = 0
    for found, answer in zip(logits, given):
        *said, end = found.argmax(-1).tolist()
        right += said == answer and end in ends
    return right / len(answers)
