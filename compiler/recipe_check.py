"""What a build would only meet after minutes of work, asked of its files before any of it. No torch."""

from __future__ import annotations

from .recipe import Recipe
from .task_file import read_task


def check_files(recipe: Recipe) -> None:
    """Raise UsageError for a task that is none, or a text that is missing."""
    path = recipe.task_path()
    if path is not None:
        read_task(path, recipe.gate.task_examples)
    recipe.accuracy_path()
