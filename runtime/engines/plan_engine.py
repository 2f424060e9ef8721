"""One kernel plan on the device: resolved launches, captured into a CUDA graph and replayed.

The host writes numpy buffers; `run` stages them in pinned memory and sends them in one copy. Behind every launch the
sampled tokens are copied into a ring, so that they can be read while the next step already runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...artifacts.errors import ResourceError, UsageError, VerificationError
from ...artifacts.kernel_plan import KernelPlan, PlanArgument
from ...artifacts.manifest import Buffer, EngineEntry
from .base import logits_of
from .cuda import OUT_OF_MEMORY, CudaError, Driver
from .plan_layout import RESULTS, Block, aligned, is_cache, lay_out_inputs, lay_out_outputs

_SCALARS: dict[str, Callable[[Any], ctypes._SimpleCData[Any]]] = {
    "int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float, "float64": ctypes.c_double,
}  # fmt: skip
# Copies that may be under way at once: of inputs to the device, of results from it.
_UPLOADS = 3
_RESULTS = 4


@dataclass(frozen=True)
class Launch:
    """A launch with its arguments resolved."""

    function: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: Sequence[ctypes._SimpleCData[Any]]
    dependent: bool


class _Ring:
    """Equal pieces of pinned memory, taken in turn; a piece's event says when its last copy was done."""

    def __init__(self, driver: Driver, memory: np.ndarray, count: int) -> None:
        size = len(memory) // count
        self.slots = [memory[i * size : (i + 1) * size] for i in range(count)]
        self.addresses = [int(slot.ctypes.data) for slot in self.slots]
        self.events = [driver.event() for _ in range(count)]


class PlanEngine:
    """See `ingot.runtime.engines.base.AsyncEngine`.

    Args:
        inputs, outputs: device addresses of this engine's blocks (`lay_out_inputs`, `lay_out_outputs`).
        addresses: device address of whatever a plan's pointer can name, by (space, name).
        functions: kernels by place in the plan.
    """

    def __init__(
        self,
        driver: Driver,
        stream: Any,
        entry: EngineEntry,
        plan: KernelPlan,
        functions: Sequence[Any],
        inputs: int,
        outputs: int,
        addresses: Mapping[tuple[str, str], int],
    ) -> None:
        self.entry = entry
        self._driver, self._stream, self._inputs_at, self._outputs_at = driver, stream, inputs, outputs
        self._graph: Any = None
        self._closed = False
        taken, made = lay_out_inputs(entry.inputs), lay_out_outputs(entry.outputs)
        here = dict(addresses)
        here |= {("input", name): inputs + place.offset for name, place in taken.places.items()}
        here |= {("output", name): outputs + place.offset for name, place in made.places.items()}
        self._launches = _resolve(driver, entry, plan, functions, here)
        self._memory = np.zeros(taken.nbytes, np.uint8)
        self._buffers = {b.name: _view(self._memory, taken, b) for b in entry.inputs if not is_cache(b.name)}
        self._logits_at = outputs + made.places["logits"].offset
        self._logits = np.zeros(next(b.shape for b in entry.outputs if b.name == "logits"), np.float32)
        results = [b for b in entry.outputs if b.name in RESULTS]
        self._result_bytes = sum(aligned(made.places[b.name].nbytes) for b in results)
        self._pinned = driver.pinned(_UPLOADS * taken.nbytes + _RESULTS * self._result_bytes)
        split = _UPLOADS * taken.nbytes
        self._uploads = _Ring(driver, self._pinned[:split], _UPLOADS)
        self._results = _Ring(driver, self._pinned[split:], _RESULTS)
        views = [{b.name: _view(slot, made, b) for b in results} for slot in self._results.slots]
        self._tokens = [view["next_tokens"] for view in views]
        self._sampled = [view.get("sampled_logits") for view in views]
        self._sent = self._done = 0  # uploads and launches so far

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """See `Engine.inputs`."""
        return self._buffers

    @property
    def asynchronous(self) -> bool:
        """See `Engine.asynchronous`: without the output sampled_logits each step's logits would have to be read."""
        return self._sampled[0] is not None

    def capture(self) -> None:
        """Record all launches into a CUDA graph, which later runs replay. Without it they are launched one by one.

        Raises:
            VerificationError: the device refuses a launch. ResourceError: it has no memory for the graph.
        """
        driver, stream = self._driver, self._stream
        driver.begin_capture(stream)
        try:
            self._launch_each()
        except BaseException:
            driver.abandon_capture(stream)
            raise
        try:
            self._graph = driver.end_capture(stream)
        except CudaError as error:
            raise _refused(error, f"engine {self.entry.name} cannot be made a CUDA graph") from error

    def run(self) -> None:
        """See `Engine.run`.

        Raises:
            ResourceError: the device failed, now or in an earlier step.
        """
        driver, ring = self._enter(), self._uploads
        slot = self._sent % _UPLOADS
        driver.wait(ring.events[slot])  # its last copy, long done
        ring.slots[slot][:] = self._memory
        driver.upload(self._inputs_at, ring.addresses[slot], len(self._memory), self._stream)
        driver.record(ring.events[slot], self._stream)
        self._sent += 1
        self._step()

    def advance(self) -> None:
        """See `Engine.advance`: the graph's last launch has prepared the inputs on the device already."""
        self._enter()
        self._step()

    def next_tokens(self) -> np.ndarray:
        """See `Engine.next_tokens`."""
        return self._tokens[self._wait(1)]

    def sampled_logits(self) -> np.ndarray:
        """See `Engine.sampled_logits`."""
        found = self._sampled[slot := self._wait(1)]
        return logits_of(self.logits(), self._tokens[slot]) if found is None else found

    def earlier(self) -> tuple[np.ndarray, np.ndarray]:
        """See `AsyncEngine.earlier`."""
        slot = self._wait(2)
        sampled = self._sampled[slot]
        if sampled is None:
            raise UsageError(f"engine {self.entry.name} cannot run ahead", "it has no output sampled_logits", "")
        return self._tokens[slot], sampled

    def logits(self) -> np.ndarray:
        """See `Engine.logits`."""
        driver = self._enter()
        driver.download(self._logits.ctypes.data, self._logits_at, self._logits.nbytes, self._stream)
        driver.synchronize(self._stream)
        return self._logits

    def close(self) -> None:
        """Give graph, events and pinned memory back; the device must have finished."""
        if self._closed:
            return
        self._closed = True
        if self._graph is not None:
            self._driver.destroy_graph(self._graph)
        for event in (*self._uploads.events, *self._results.events):
            self._driver.destroy_event(event)
        self._driver.free_pinned(self._pinned)

    def _enter(self) -> Driver:
        """The driver, ready for this thread: callers may come from any."""
        if self._closed:
            raise UsageError(f"engine {self.entry.name} is closed", "close() was called", "open the artifact again")
        self._driver.activate()
        return self._driver

    def _step(self) -> None:
        """One launch of everything, and the copy of its results behind it."""
        driver, stream, ring, slot = self._driver, self._stream, self._results, self._done % _RESULTS
        if self._graph is None:
            self._launch_each()
        else:
            driver.launch_graph(self._graph, stream)
        driver.download(ring.addresses[slot], self._outputs_at, self._result_bytes, stream)
        driver.record(ring.events[slot], stream)
        self._done += 1

    def _wait(self, back: int) -> int:
        """Wait for the results of the last step (1) or the one before it (2); their place in the ring."""
        driver = self._enter()
        if self._done < back:
            raise UsageError(f"engine {self.entry.name} has no results yet", "it has not run", "call run() first")
        slot = (self._done - back) % _RESULTS
        driver.wait(self._results.events[slot])
        return slot

    def _launch_each(self) -> None:
        for index, launch in enumerate(self._launches):
            try:
                self._driver.launch(
                    launch.function, launch.grid, launch.threads, launch.shared_bytes, launch.arguments, self._stream,
                    launch.dependent,
                )  # fmt: skip
            except CudaError as error:
                raise _refused(error, f"launch {index} of engine {self.entry.name} is not possible") from error


def _resolve(
    driver: Driver,
    entry: EngineEntry,
    plan: KernelPlan,
    functions: Sequence[Any],
    addresses: Mapping[tuple[str, str], int],
) -> list[Launch]:
    """Launches whose arguments are addresses; each must be what its kernel takes, or it would read past them."""
    taken = [driver.parameter_bytes(function) for function in functions]
    launches = []
    for index, launch in enumerate(plan.launches):
        kernel = plan.kernels[launch.kernel]
        arguments = [_argument(argument, addresses) for argument in launch.arguments]
        given = tuple(ctypes.sizeof(argument) for argument in arguments)
        if given != taken[launch.kernel]:
            raise VerificationError(
                f"launch {index} of engine {entry.name} does not fit its kernel {kernel.name}",
                f"it passes parameters of {_listed(given)} bytes, the kernel takes {_listed(taken[launch.kernel])}",
                "build the artifact again",
            )
        function = functions[launch.kernel]
        launches.append(Launch(function, launch.grid, kernel.threads, kernel.shared_bytes, arguments, launch.dependent))
    return launches


def _argument(argument: PlanArgument, addresses: Mapping[tuple[str, str], int]) -> ctypes._SimpleCData[Any]:
    if argument.space == "scalar":
        value = argument.integer if argument.dtype.startswith("int") else argument.real
        return _SCALARS[argument.dtype](value)
    if argument.space == "null":
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(addresses[argument.space, argument.name] + argument.offset)


def _view(memory: np.ndarray, block: Block, buffer: Buffer) -> np.ndarray:
    place = block.places[buffer.name]
    return memory[place.offset : place.offset + place.nbytes].view(buffer.dtype).reshape(buffer.shape)


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes)) or "no"


def _refused(error: CudaError, what: str) -> ResourceError | VerificationError:
    """What the device would not take: a lack of memory is one thing, a plan that asks for the impossible another."""
    if error.code == OUT_OF_MEMORY:
        return ResourceError(what, error.why, "lower gpu_memory_utilization, which leaves more memory beside the cache")
    return VerificationError(what, f"{error.what}: {error.why}", "build the artifact again for this GPU and driver")
