"""What the GPU can do at most: how fast it reads memory, and how fast it multiplies matrices in bfloat16.

Run as a child (`python -m ingot.benchmarks.gpu_ceilings GIGABYTES PASSES SIZE`), it prints one JSON object; its memory
is free again when it ends. Reading is measured in three ways, of which the fastest counts: a Triton kernel that adds up
what it reads (read_kernel.py), torch's sum, and a copy from device memory to device memory, which counts both ways. The
matrices are random: zeros would take less power, and run faster than any model's weights do.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .children import run, tail
from .results import Machine, Matmul, Pass


@dataclass(frozen=True)
class Ceilings:
    """What was found; empty, with a `problem`, where the child could not run."""

    problem: str = ""
    gpu: str = ""
    memory_bytes: int = 0
    l2_bytes: int = 0
    reads: list[Pass] = field(default_factory=list)
    matmuls: list[Matmul] = field(default_factory=list)

    def describe(self, machine: Machine) -> None:
        """Note the GPU's name and sizes in `machine`."""
        machine.gpu, machine.gpu_memory_bytes, machine.gpu_l2_bytes = self.gpu, self.memory_bytes, self.l2_bytes


def gpu_ceilings(quick: bool = False, timeout: float | None = None) -> Ceilings:
    """Measure in a child process; never raises for what the child does."""
    sizes = ("1", "5", "4096") if quick else ("8", "20", "8192")
    done = run([sys.executable, "-m", __name__, *sizes], device="cuda", timeout=timeout)
    if done.code:
        return Ceilings("it took too long" if done.timed_out else tail(done.stderr))
    found = json.loads(done.stdout.splitlines()[-1])
    return Ceilings(
        found["problem"], found["gpu"], int(found["memory_bytes"]), int(found["l2_bytes"]),
        [Pass(method, float(rate)) for method, rate in found["reads"]],
        [Matmul(method, float(rate)) for method, rate in found["matmuls"]],
    )  # fmt: skip


def best_seconds(torch: Any, once: Callable[[], object], passes: int, each: int = 1) -> float:
    """The shortest of some passes, each of `each` calls, by events on the device; seconds per call."""
    once()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
    events[0].record()
    for event in events[1:]:
        for _ in range(each):
            once()
        event.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return min(times) / 1000 / each


def measure(gigabytes: int, passes: int, size: int) -> dict[str, Any]:
    """Everything the child prints. A way of reading that fails is left out and named in `problem`."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU")
    facts = torch.cuda.get_device_properties(0)
    reads, problems = measure_reads(torch, gigabytes * 10**9, passes)
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    seconds = best_seconds(torch, lambda: torch.matmul(left, right, out=out), passes, each=5)
    return {
        "problem": "; ".join(problems), "gpu": facts.name, "memory_bytes": facts.total_memory,
        "l2_bytes": getattr(facts, "L2_cache_size", 0), "reads": reads,
        "matmuls": [(f"torch matmul {size}", 2 * size**3 / seconds / 1e12)],
    }  # fmt: skip


def measure_reads(torch: Any, nbytes: int, passes: int) -> tuple[list[tuple[str, float]], list[str]]:
    """(way, GB/s) of each way to read a buffer, and what went wrong with others."""
    words = torch.ones(nbytes // 4, dtype=torch.float32, device="cuda")
    half = words.numel() // 2

    def triton_read() -> Callable[[], object]:
        from .read_kernel import reader

        return reader(words)

    ways: dict[str, Callable[[], Callable[[], object]]] = {
        "Triton read": triton_read,
        "torch sum": lambda: words.sum,
        "copy, both ways": lambda: lambda: words[:half].copy_(words[half : 2 * half]),
    }
    reads, problems = [], []
    for name, make in ways.items():
        try:
            reads.append((name, words.nbytes / best_seconds(torch, make(), passes) / 1e9))
        except Exception as error:  # noqa: BLE001 - whatever one way meets, the others stand
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return reads, problems


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
