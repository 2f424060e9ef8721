"""How fast an artifact is: whole calls of `LLM`, timed. `python -m ingot.runtime.speed REQUEST.json RESULT.json` is one
turn of a comparison, in a process of its own that holds one artifact alone.

Times are taken around whole calls; only the time to the first token, which is subtracted from a decoding run, is the
runtime's own.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artifacts.manifest import Manifest
from ..artifacts.store import OpenArtifact
from .child import serve
from .llm import LLM
from .params import SamplingParams

SHORTEST_S = 0.3  # a sample is the mean over as many runs as this takes: a tiny model's single run is all jitter
_CONTEXT = 16


def decode(llm: LLM, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Generate `tokens` tokens behind the first one, greedily and past any end of sequence: seconds for those, and all.

    Raises:
        RuntimeError: fewer came, so that the seconds would mean something else.
    """
    count = tokens + 1
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    output = llm.generate(prompt, params)[0]
    seconds = time.perf_counter() - begin
    found = output.outputs[0].token_ids
    if len(found) != count or output.metrics.ttft_ms is None:
        raise RuntimeError(f"{len(found)} tokens instead of {count}: {output.outputs[0].finish_reason}")
    return seconds - output.metrics.ttft_ms / 1000, found


def prefill(llm: LLM, prompt: list[int]) -> tuple[float, list[int]]:
    """Seconds from a prompt to its first token, and that."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    found = llm.generate(prompt, params)[0].outputs[0].token_ids
    return time.perf_counter() - begin, found


def main(request: str, result: str) -> None:
    """{"artifact", "prompt", "tokens", "vocabulary"} -> tokens/s of prompt and decoding, load seconds, peak bytes.

    An artifact that is not published yet is given by its "root" and "manifest"; "trust" is whose code may run.
    Prompts are random tokens, no two alike, so that no cache of prompts can serve one.
    """
    asked = json.loads(Path(request).read_text())
    length, tokens, vocabulary = asked["prompt"], asked["tokens"], asked["vocabulary"]
    numbers = random.Random(0)

    def prompt(size: int) -> list[int]:
        return [numbers.randrange(vocabulary) for _ in range(size)]

    begin = time.perf_counter()
    artifact: Any = asked.get("artifact")
    if artifact is None:
        artifact = OpenArtifact(Path(asked["root"]), Manifest.from_json(Path(asked["manifest"]).read_bytes()))
    with LLM(artifact, trust=asked.get("trust")) as llm:
        loaded = time.perf_counter() - begin
        context = min(_CONTEXT, length)
        prefill(llm, prompt(length))  # the first run of each kind warms up
        decode(llm, prompt(context), min(tokens, 8))
        found = {
            "prefill": _rate(lambda: prefill(llm, prompt(length))[0], length),
            "decode": _rate(lambda: decode(llm, prompt(context), tokens)[0], tokens),
        }
    Path(result).write_text(json.dumps({**found, "load_s": loaded, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int | None:
    """The most memory this program had; None where the system does not tell. getrusage would tell its parent's too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _rate(run: Callable[[], float], tokens: int) -> float:
    """Tokens per second over as many runs as fill the shortest time."""
    seconds, runs = 0.0, 0
    while seconds < SHORTEST_S:
        seconds += run()
        runs += 1
    return tokens * runs / seconds


if __name__ == "__main__":
    serve(main)
