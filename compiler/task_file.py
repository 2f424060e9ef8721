"""Reads a task: questions with checkable answers, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..artifacts.errors import UsageError

_LARGEST_BYTES = 16 << 20


def read_task(path: Path, limit: int) -> list[dict[str, Any]]:
    """The first `limit` items: {"messages": […], "answer": "…"} a line.

    Raises:
        UsageError: names the line that is no item.
    """
    if path.stat().st_size > _LARGEST_BYTES:
        raise UsageError(f"{path} is larger than {_LARGEST_BYTES >> 20} MiB", "", "use fewer items")
    items = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            answer, messages = item["answer"], item["messages"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} is no task item", str(error), 'write {"messages": [...], "answer": "..."}'
            ) from error
        if not isinstance(answer, str) or not isinstance(messages, list):
            raise UsageError(f"{path}, line {number} is no task item", "answer is a string, messages a list", "")
        items.append({"messages": messages, "answer": answer})
    if not items:
        raise UsageError(f"{path} holds no task items", "", "")
    return items[:limit]
