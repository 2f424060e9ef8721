"""Where the time from process start to first token goes: named phases, each from the end of the one before."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of time. `nbytes` is what it moved, 0 where that says nothing."""

    name: str
    seconds: float
    nbytes: int = 0


class Phases:
    """A clock that starts when it is made, or at `start` on time.perf_counter's clock."""

    def __init__(self, start: float | None = None) -> None:
        self._last = time.perf_counter() if start is None else start
        self.done: list[Phase] = []

    def mark(self, name: str, nbytes: int = 0) -> None:
        """What has passed since the last mark was the phase `name`."""
        now = time.perf_counter()
        self.done.append(Phase(name, now - self._last, nbytes))
        self._last = now

    def add(self, name: str, seconds: float) -> None:
        """A phase that was measured elsewhere."""
        self.done.append(Phase(name, seconds))
        self._last = time.perf_counter()

    def as_list(self) -> list[dict[str, str | float | int]]:
        """The phases as plain data."""
        return [dataclasses.asdict(phase) for phase in self.done]

    def __str__(self) -> str:
        """One line per phase, and their sum."""
        lines = [("process start to first token", sum(p.seconds for p in self.done), 0)]
        lines += [(f"  {p.name}", p.seconds, p.nbytes) for p in self.done]
        return "\n".join(f"{name:<30}{seconds:9.3f} s{_rate(seconds, size)}" for name, seconds, size in lines)


def _rate(seconds: float, nbytes: int) -> str:
    return f"   {nbytes / 1e9:.2f} GB, {nbytes / 1e9 / seconds:.1f} GB/s" if nbytes and seconds > 0 else ""


def process_start(stat: Path = Path("/proc/self/stat")) -> float:
    """When this process was started, on time.perf_counter's clock, to 10 ms; now where the system does not tell."""
    now = time.perf_counter()
    try:
        # The command's name stands in parentheses and may hold anything; the start is the 20th field behind it.
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return now
    return now - max(age, 0.0)
