"""Times the kernels of a recorded CUDA graph: the whole of it, and each kind of launch alone.

Alone means: all launches of one kind (the layers') in turn, plainly one after the other, so that each finds its own
weights and none overlaps with the next. Events take the time, behind a replay that keeps the device busy meanwhile.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..runtime.engines.cuda import Driver

_COPIES = 128  # launches in the graph of one kind, at least
_ROUNDS = 3
_STEPS, _STEP_ROUNDS = 10, 5  # replays of the whole graph that are timed together, and how often
# The launch that moves positions on to the next token runs so often, at most, between two resets.
MOST_STEPS = max(2 * _COPIES * _ROUNDS, (1 + _STEPS) * _STEP_ROUNDS) + 1


@dataclass(frozen=True)
class Recorded:
    """A launch as the engine made it."""

    function: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: Sequence[Any]


@dataclass(frozen=True)
class RecordedGraph:
    """A graph, and the launches in it."""

    graph: Any
    launches: tuple[Recorded, ...]


class Recorder:
    """A driver that remembers what is launched into each graph; all else is the driver's own."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.graphs: list[RecordedGraph] = []
        self._launches: list[Recorded] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def begin_capture(self, stream: Any) -> None:
        """Forget what was launched before."""
        self._launches = []
        self.driver.begin_capture(stream)

    def launch(
        self, function: Any, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: Sequence[Any],
        stream: Any, dependent: bool,
    ) -> None:  # fmt: skip
        """Note a launch and make it."""
        self._launches.append(Recorded(function, grid, threads, shared_bytes, arguments))
        self.driver.launch(function, grid, threads, shared_bytes, arguments, stream, dependent)

    def end_capture(self, stream: Any) -> Any:
        """Keep the graph with its launches."""
        graph = self.driver.end_capture(stream)
        self.graphs.append(RecordedGraph(graph, tuple(self._launches)))
        return graph


class StepTimer:
    """Times one graph; a context manager.

    Args:
        reset: puts the engine's inputs back to where the step begins, and runs it once.
    """

    def __init__(self, driver: Driver, recorded: RecordedGraph, reset: Callable[[], None]) -> None:
        self._driver, self._recorded, self._reset = driver, recorded, reset
        driver.activate()
        self._stream = driver.stream()
        self._events = (driver.event(timing=True), driver.event(timing=True))

    def __enter__(self) -> StepTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in self._events:
            self._driver.destroy_event(event)
        self._driver.destroy_stream(self._stream)

    def whole(self) -> float:
        """Seconds of the whole graph."""
        self._reset()
        times = [self._seconds(self._recorded.graph, _STEPS) for _ in range(_STEP_ROUNDS)]
        return statistics.median(times)

    def alone(self, places: Sequence[int]) -> float:
        """Seconds of the launches at these places, one after the other."""
        copies = -(-_COPIES // len(places))
        before = self._capture(self._recorded.launches[: places[0]])
        graph = self._capture([self._recorded.launches[place] for place in places] * copies)
        try:
            self._reset()
            # The arena as the first of them finds it: what it takes for indices must be indices.
            self._driver.launch_graph(before, self._stream)
            return statistics.median(self._seconds(graph, 1) for _ in range(_ROUNDS)) / copies
        finally:
            self._driver.destroy_graph(graph)
            self._driver.destroy_graph(before)

    def _seconds(self, graph: Any, times: int) -> float:
        """Seconds of one replay, of so many that follow each other."""
        driver, stream = self._driver, self._stream
        start, end = self._events
        driver.launch_graph(graph, stream)
        driver.record(start, stream)
        for _ in range(times):
            driver.launch_graph(graph, stream)
        driver.record(end, stream)
        driver.wait(end)
        return driver.elapsed_ms(start, end) / 1000 / times

    def _capture(self, launches: Sequence[Recorded]) -> Any:
        driver, stream = self._driver, self._stream
        driver.begin_capture(stream)
        try:
            for one in launches:
                driver.launch(one.function, one.grid, one.threads, one.shared_bytes, one.arguments, stream, False)
        except BaseException:
            driver.abandon_capture(stream)
            raise
        return driver.end_capture(stream)
