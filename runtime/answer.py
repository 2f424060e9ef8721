"""Answers chat questions from a request file: `python -m ingot.runtime.answer REQUEST.json RESULT.json`.

A build runs it in a process of its own to score the finished artifact on the recipe's task.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..artifacts.manifest import Manifest
from ..artifacts.store import OpenArtifact
from .child import serve
from .llm import LLM
from .params import SamplingParams

_MAX_TOKENS = 64


def main(request: str, result: str) -> None:
    """{"root", "manifest", "items": [{"messages"}]} -> a greedy answer for each: {"prompt_token_ids", "text"}."""
    asked = json.loads(Path(request).read_text())
    artifact = OpenArtifact(Path(asked["root"]), Manifest.from_json(Path(asked["manifest"]).read_bytes()))
    with LLM(artifact) as llm:
        outputs = llm.chat(
            [item["messages"] for item in asked["items"]], SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
        )
    Path(result).write_text(
        json.dumps([{"prompt_token_ids": o.prompt_token_ids, "text": o.outputs[0].text} for o in outputs])
    )


if __name__ == "__main__":
    serve(main)
