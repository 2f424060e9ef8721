"""Completes prompts of token ids from a request file: `python -m ingot.runtime.complete REQUEST.json RESULT.json`.

In a process of its own: what is compared with transformers then is what a lean process gives, and artifacts with
different kernels, of which one process holds one version, can be asked in turn.
"""

from __future__ import annotations

import json
from pathlib import Path

from .child import serve
from .llm import LLM
from .params import SamplingParams


def greedy_tokens(llm: LLM, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """`count` greedy tokens behind each prompt, past any end of sequence: each prompt alone, and all in one call."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    return alone, [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def main(request: str, result: str) -> None:
    """{"artifact": folder, "prompts": lists of token ids, "tokens": count} -> [alone, batched] token ids."""
    asked = json.loads(Path(request).read_text())
    with LLM(asked["artifact"]) as llm:
        found = greedy_tokens(llm, asked["prompts"], asked["tokens"])
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    serve(main)
