"""How fast this machine reads memory: the ceiling every decode step is measured against.

Run as a child (`python -m ingot.benchmarks.bandwidth MEGABYTES PASSES`), it prints one JSON list of results. There is
no compiler on a user's machine, so the loops are numpy's and torch's own; the ceiling is whichever is fastest:
- numpy: `maximum` over int32, a slice per thread. A reduction releases the GIL; the integer maximum is the cheapest
  operation numpy vectorizes (one instruction per vector, no chain of additions), so it waits for memory and nothing
  else. `dot` of a slice with itself also reads each byte once, through BLAS.
- torch: `sum` of float32, with torch's threads, as an independent witness, where torch is installed.
No one method is a proof of the ceiling; a share of more than 100 % would show that all of them are too slow.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .children import run, tail
from .machine import core_count, l3_bytes
from .results import Pass


def read_bandwidth(quick: bool = False) -> list[Pass]:
    """Measure in a child process: the buffer is at least 16 times the last-level cache (4 times in a quick run).

    Returns:
        The best pass of each method; empty when the child could not run (too little memory).
    """
    megabytes = max(l3_bytes() * (4 if quick else 16), 256 << 20) >> 20
    done = run([sys.executable, "-m", __name__, str(min(megabytes, 4096)), "5" if quick else "12"])
    if done.code:
        print(f"the read bandwidth could not be measured: {tail(done.stderr)}", file=sys.stderr)
        return []
    return [Pass(method, float(gb_s)) for method, gb_s in json.loads(done.stdout)]


def best_gb_s(once: Callable[[], object], size: int, passes: int) -> float:
    """The fastest of some passes over `size` bytes, in GB/s."""
    times = []
    for _ in range(passes):
        begin = time.perf_counter()
        once()
        times.append(time.perf_counter() - begin)
    return size / min(times) / 1e9


def measure(size: int, passes: int, threads: int) -> list[tuple[str, float]]:
    """(method, GB/s) of every method over one buffer of `size` bytes, each page of which has been written."""
    words = np.ones(size // 4, np.int32)
    parts = np.array_split(words, threads)
    floats = [part.view(np.float32) for part in parts]
    found = []
    with ThreadPoolExecutor(threads) as pool:
        methods: dict[str, Callable[[], Any]] = {
            "numpy maximum": lambda: list(pool.map(np.max, parts)),
            "numpy dot": lambda: list(pool.map(lambda x: np.dot(x, x), floats)),
        }
        for name, once in methods.items():
            once()
            found.append((f"{name}, {threads} threads", best_gb_s(once, words.nbytes, passes)))
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(threads)
    tensor = torch.from_numpy(words.view(np.float32))
    found.append((f"torch sum, {threads} threads", best_gb_s(tensor.sum, words.nbytes, passes)))
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) << 20, int(sys.argv[2]), core_count())))
