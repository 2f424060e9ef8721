"""The task of a recipe: questions with checkable answers, asked of the finished artifact through the runtime.

A number people understand, before and after quantization: the share of answers that match to the letter.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..artifacts.errors import UsageError
from ..artifacts.manifest import Manifest
from .gate import run_child
from .recipe import Recipe
from .task_file import read_task


def run_task(recipe: Recipe, root: Path, manifest: Manifest) -> dict[str, Any]:
    """Ask all questions of the artifact in a lean process.

    Returns:
        items, exact_match (0..1), required, and some wrong answers.
    """
    path = recipe.task_path()
    if path is None:
        raise UsageError("the recipe has no task", "gate.task is not set", "")
    items = read_task(path, recipe.gate.task_examples)
    with tempfile.TemporaryDirectory(prefix="ingot-task-") as scratch:
        folder = Path(scratch)
        (folder / "manifest.json").write_text(manifest.to_json())
        request = {"root": str(root), "manifest": str(folder / "manifest.json"), "items": items}
        (folder / "request.json").write_text(json.dumps(request))
        run_child("ingot.runtime.answer", str(folder / "request.json"), str(folder / "result.json"))
        answers = json.loads((folder / "result.json").read_text())
    wrong = [
        {"question": item["messages"][-1].get("content", ""), "answer": item["answer"], "given": given}
        for item, given in zip(items, answers, strict=True)
        if given.strip() != item["answer"]
    ]
    share = 1 - len(wrong) / len(items)
    return {"items": len(items), "exact_match": share, "required": recipe.gate.task_exact_match, "wrong": wrong[:5]}
