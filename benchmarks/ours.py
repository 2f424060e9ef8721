"""Ingot's side of a comparison: a worker that decodes and prefills through `LLM`, and the program whose start is timed.

`python -m ingot.benchmarks.ours ARTIFACT` answers {"op": "decode" | "prefill", "prompt": [ids], "tokens": n} and
{"op": "batch", "prompts": [[ids] …], "tokens": n}. Times are the harness's own around whole calls; only the time to the
first token, which is subtracted from a decoding run, is the runtime's, and the times of a batch's rows are.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from ..runtime import LLM, SamplingParams, speed
from .children import serve

# A fresh interpreter running what a user's shortest program would be; digests are verified in full.
START = """
import json, sys, time
from ingot.runtime import LLM, SamplingParams
prompt = json.loads(sys.argv[2])
params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=isinstance(prompt, str))
with LLM(sys.argv[1]) as llm:
    token = llm.generate(prompt, params)[0].outputs[0].token_ids[0]
    now = time.monotonic()
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"first_token": now, "token": token, "peak": peak}))
"""


def decode(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `tokens` tokens behind the first one, which is not counted: see `speed.decode`."""
    seconds, tokens = speed.decode(llm, request["prompt"], request["tokens"])
    return {"seconds": seconds, "token_ids": tokens}


def batch(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """As `decode` for several prompts at once; the seconds are those in which all rows decode together.

    Raises:
        RuntimeError: tokens are missing, or not all rows decoded together.
    """
    count = request["tokens"] + 1
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate(request["prompts"], params)
    if any(len(output.outputs[0].token_ids) != count for output in outputs):
        raise RuntimeError(f"not every row has {count} tokens")
    # Prompts are prefilled one after the other. Behind the last one, all rows decode: its steps are the full ones.
    metrics = [output.metrics for output in outputs]
    arrivals = [m.arrival_s or 0.0 for m in metrics]
    starts = [at + m.queue_ms / 1000 for at, m in zip(arrivals, metrics) if m.queue_ms is not None]
    ends = [at + m.total_ms / 1000 for at, m in zip(arrivals, metrics) if m.total_ms is not None]
    steps = [m.tpot_ms for m in metrics if m.tpot_ms is not None]
    if len(steps) != len(outputs) or max(starts) > min(ends):
        raise RuntimeError(f"{len(outputs)} rows did not decode together: the KV cache or the engines hold fewer")
    return {"seconds": min(steps) * request["tokens"] / 1000}


def prefill(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from a prompt to its first token."""
    seconds, tokens = speed.prefill(llm, request["prompt"])
    return {"seconds": seconds, "token_ids": tokens}


def main(artifact: str) -> None:
    """Serve until stdin closes."""
    with LLM(artifact) as llm:
        ways = {"decode": decode, "batch": batch, "prefill": prefill}
        serve({op: functools.partial(way, llm) for op, way in ways.items()})


if __name__ == "__main__":
    main(sys.argv[1])
