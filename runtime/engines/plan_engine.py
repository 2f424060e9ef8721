"""One kernel plan on the device: resolved launches, captured into CUDA graphs and replayed.

The host writes numpy buffers; `run` stages them in pinned memory and sends them in one copy. What the host reads after
a step, `RESULTS`, the kernels write straight into pinned memory: between two steps nothing is enqueued but an event.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ...artifacts.errors import ResourceError, UsageError, VerificationError
from ...artifacts.kernel_plan import KernelPlan, PlanArgument
from ...artifacts.manifest import Buffer, EngineEntry
from .base import logits_of
from .cuda import OUT_OF_MEMORY, CudaError, Driver
from .plan_layout import RESULTS, Block, is_cache, lay_out_inputs, lay_out_outputs, lay_out_results

_SCALARS: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float, "float64": ctypes.c_double,
}  # fmt: skip
# Copies of inputs to the device that may be under way at once.
_UPLOADS = 3


@dataclass(frozen=True)
class Launch:
    """A launch with its arguments resolved."""

    function: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: Sequence[ctypes._SimpleCData[Any]]
    dependent: bool


@dataclass
class _Slot:
    """A place for one step's results, the launches that write them there, and when the last of these were done."""

    tokens: np.ndarray
    sampled: np.ndarray | None
    launches: list[Launch]
    done: Any
    graph: Any = None


class _Staging:
    """Equal pieces of pinned memory for inputs, taken in turn; a piece's event says when its last copy was done."""

    def __init__(self, driver: Driver, memory: np.ndarray) -> None:
        size = len(memory) // _UPLOADS
        self._driver = driver
        self._pieces = [memory[i * size : (i + 1) * size] for i in range(_UPLOADS)]
        self._addresses = [int(piece.ctypes.data) for piece in self._pieces]
        self.events = [driver.event() for _ in range(_UPLOADS)]
        self._sent = 0

    def send(self, content: np.ndarray, address: int, stream: Any) -> None:
        """Copy to the device; `content` may change as soon as this returns."""
        driver, place = self._driver, self._sent % _UPLOADS
        driver.wait(self.events[place])  # long done
        self._pieces[place][:] = content
        driver.upload(address, self._addresses[place], len(content), stream)
        driver.record(self.events[place], stream)
        self._sent += 1


class PlanEngine:
    """See `ingot.runtime.engines.base.AsyncEngine`.

    A decode engine has two slots for results, written by even and by odd steps: two graphs that differ in nothing else.
    So the host may read step n while step n + 1 runs. Step n + 2 writes where step n did: arrays got of a run, from
    `next_tokens` or `earlier`, change once the second run behind it is launched. The results of the last two runs are
    always there, read or not; older ones cannot be asked for. Other engines have one slot and one graph, and keep the
    results of their last run alone.

    Args:
        inputs, outputs: device addresses of this engine's blocks (`lay_out_inputs`, `lay_out_outputs`).
        addresses: device address of whatever a plan's pointer can name, by (space, name).
        functions: kernels by place in the plan.

    Raises:
        VerificationError: a launch does not pass what its kernel takes.
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
        _check_parameters(entry, plan, [driver.parameter_bytes(function) for function in functions])
        self.entry = entry
        self._driver, self._stream, self._inputs_at = driver, stream, inputs
        self._closed = False
        taken, made, read = lay_out_inputs(entry.inputs), lay_out_outputs(entry.outputs), lay_out_results(entry.outputs)
        here = dict(addresses)
        here |= {("input", name): inputs + place.offset for name, place in taken.places.items()}
        here |= {("output", name): outputs + place.offset for name, place in made.places.items()}
        self._memory = np.zeros(taken.nbytes, np.uint8)
        self._buffers = {b.name: _view(self._memory, taken, b) for b in entry.inputs if not is_cache(b.name)}
        self._logits_at = outputs + made.places["logits"].offset
        self._logits = np.zeros(next(b.shape for b in entry.outputs if b.name == "logits"), np.float32)
        # Without sampled_logits the logits of each step have to be read before the next, which overwrites them.
        count = 2 if entry.phase == "decode" and "sampled_logits" in read.places else 1
        self._pinned = driver.pinned(count * read.nbytes + _UPLOADS * taken.nbytes)
        self._staging = _Staging(driver, self._pinned[count * read.nbytes :])
        self._slots: list[_Slot] = []
        for offset in range(0, count * read.nbytes, read.nbytes):
            memory, base = self._pinned[offset : offset + read.nbytes], driver.device_address(self._pinned) + offset
            views = {b.name: _view(memory, read, b) for b in entry.outputs if b.name in RESULTS}
            results = {("output", name): base + place.offset for name, place in read.places.items()}
            launches = _resolve(plan, functions, here | results)
            self._slots.append(_Slot(views["next_tokens"], views.get("sampled_logits"), launches, driver.event()))
        self._runs = 0

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """See `Engine.inputs`."""
        return self._buffers

    @property
    def asynchronous(self) -> bool:
        """See `Engine.asynchronous`: whether there is a slot for a further step's results."""
        return len(self._slots) > 1

    @property
    def graph(self) -> Any:
        """The graph of the even steps, for those who time it; None without `capture`."""
        return self._slots[0].graph

    def capture(self) -> None:
        """Record all launches into CUDA graphs, which later runs replay. Without it they are launched one by one.

        Raises:
            VerificationError: the device refuses a launch. ResourceError: it has no memory for the graphs.
        """
        driver, stream = self._driver, self._stream
        for slot in self._slots:
            driver.begin_capture(stream)
            try:
                self._launch_each(slot.launches)
            except BaseException:
                driver.abandon_capture(stream)
                raise
            try:
                slot.graph = driver.end_capture(stream)
            except CudaError as error:
                raise _refused(error, f"engine {self.entry.name} cannot be made a CUDA graph") from error

    def run(self) -> None:
        """See `Engine.run`.

        Raises:
            ResourceError: the device failed, now or in an earlier step.
        """
        driver = self._enter()
        self._staging.send(self._memory, self._inputs_at, self._stream)
        self._step(driver)

    def advance(self) -> None:
        """See `Engine.advance`: the last launch of a run has prepared the inputs of the next on the device already."""
        self._step(self._enter())

    def next_tokens(self) -> np.ndarray:
        """See `Engine.next_tokens`."""
        return self._wait(1).tokens

    def sampled_logits(self) -> np.ndarray:
        """See `Engine.sampled_logits`."""
        slot = self._wait(1)
        return logits_of(self.logits(), slot.tokens) if slot.sampled is None else slot.sampled

    def earlier(self) -> tuple[np.ndarray, np.ndarray]:
        """See `AsyncEngine.earlier`.

        Raises:
            UsageError: the engine is not asynchronous, or has not run twice.
        """
        if not self.asynchronous:
            why = "it keeps the results of its last run alone"
            raise UsageError(f"engine {self.entry.name} cannot run ahead", why, "read them before the next run")
        slot = self._wait(2)
        return slot.tokens, cast(np.ndarray, slot.sampled)

    def logits(self) -> np.ndarray:
        """See `Engine.logits`."""
        driver = self._enter()
        driver.download(self._logits.ctypes.data, self._logits_at, self._logits.nbytes, self._stream)
        driver.synchronize(self._stream)
        return self._logits

    def close(self) -> None:
        """Give graphs, events and pinned memory back; the device must have finished."""
        if self._closed:
            return
        self._closed = True
        for slot in self._slots:
            if slot.graph is not None:
                self._driver.destroy_graph(slot.graph)
            self._driver.destroy_event(slot.done)
        for event in self._staging.events:
            self._driver.destroy_event(event)
        self._driver.free_pinned(self._pinned)

    def _enter(self) -> Driver:
        """The driver, ready for this thread: callers may come from any."""
        if self._closed:
            raise UsageError(f"engine {self.entry.name} is closed", "close() was called", "open the artifact again")
        self._driver.activate()
        return self._driver

    def _step(self, driver: Driver) -> None:
        """One launch of everything, into the slot whose turn it is, and its event."""
        slot = self._slots[self._runs % len(self._slots)]
        if slot.graph is None:
            self._launch_each(slot.launches)
        else:
            driver.launch_graph(slot.graph, self._stream)
        driver.record(slot.done, self._stream)
        self._runs += 1

    def _wait(self, back: int) -> _Slot:
        """Wait for the results of the last run (1) or the one before it (2); where they are."""
        driver = self._enter()
        if self._runs < back:
            why = f"it has run {self._runs} times, not {back}"
            raise UsageError(f"engine {self.entry.name} has no results yet", why, "call run() first")
        slot = self._slots[(self._runs - back) % len(self._slots)]
        driver.wait(slot.done)
        return slot

    def _launch_each(self, launches: Sequence[Launch]) -> None:
        for index, launch in enumerate(launches):
            try:
                self._driver.launch(
                    launch.function, launch.grid, launch.threads, launch.shared_bytes, launch.arguments, self._stream,
                    launch.dependent,
                )  # fmt: skip
            except CudaError as error:
                raise _refused(error, f"launch {index} of engine {self.entry.name} is not possible") from error


def _check_parameters(entry: EngineEntry, plan: KernelPlan, taken: Sequence[tuple[int, ...]]) -> None:
    """Each launch must pass what its kernel takes, by the sizes in bytes, or the kernel would read past it."""
    for index, launch in enumerate(plan.launches):
        given = tuple(ctypes.sizeof(_SCALARS.get(argument.dtype, ctypes.c_void_p)) for argument in launch.arguments)
        if given != taken[launch.kernel]:
            raise VerificationError(
                f"launch {index} of engine {entry.name} does not fit its kernel {plan.kernels[launch.kernel].name}",
                f"it passes parameters of {_listed(given)} bytes, the kernel takes {_listed(taken[launch.kernel])}",
                "build the artifact again",
            )


def _resolve(plan: KernelPlan, functions: Sequence[Any], addresses: Mapping[tuple[str, str], int]) -> list[Launch]:
    """Launches whose arguments are addresses."""
    launches = []
    for launch in plan.launches:
        kernel = plan.kernels[launch.kernel]
        arguments = [_argument(argument, addresses) for argument in launch.arguments]
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
