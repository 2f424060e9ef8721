"""A GPU in pure Python with the methods of `ingot.runtime.engines.cuda.Driver`: strict, lazy, kernels are functions.

Work in a stream is done only when somebody waits for it, so whoever touches memory too early is found out. Every
address is looked up: what lies outside of an allocation is an error, as is a call from a thread without a context.
Kernels see pinned memory at other addresses than the host does, so that nobody takes one for the other.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from ingot.runtime.engines.cuda import OUT_OF_MEMORY, CudaError

ELF = b"\x7fELF"
Kernel = Callable[..., Any]
# From the host's address of pinned memory to the device's.
_MAPPED = 1 << 60


def fake_cubin(kernels: dict[str, list[int]], arch: str = "sm_90") -> bytes:
    """A cubin: the sizes of each kernel's parameters by its symbol."""
    return ELF + json.dumps({"arch": arch, "kernels": kernels}).encode()


@dataclass(eq=False)
class FakeStream:
    waiting: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None


@dataclass(eq=False)
class FakeEvent:
    stream: FakeStream | None = None
    recorded: int = 0
    happened: int = 0  # the number of the recording that was reached


class FakeDriver:
    """`kernels` maps symbols to functions (driver, *argument values); `fail` maps method names to error codes."""

    def __init__(self, kernels: Mapping[str, Kernel], total: int = 1 << 24, used: int = 0, arch: str = "sm_90") -> None:
        self.kernels, self.total, self.others, self.arch = kernels, total, used, arch
        self.fail: dict[str, str] = {}
        self.memory: dict[int, bytearray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.live: list[Any] = []  # streams, events, modules and graphs not given back
        self.launched = self.uploads = 0
        self.enqueued: list[str] = []  # what went into a stream to be done, in order
        self.replayed: list[Any] = []  # graphs
        self.dependent: list[bool] = []
        self.closed = False
        self._next = 0x7000_0000_0000
        self._lock = threading.RLock()
        self._threads: set[int] = set()

    def _enter(self, method: str) -> None:
        assert threading.get_ident() in self._threads, "no context in this thread"
        assert not self.closed
        if method in self.fail:
            raise CudaError(method, self.fail[method], "planted")

    def activate(self) -> None:
        self._threads.add(threading.get_ident())

    def close(self) -> None:
        self.closed = True

    def view(self, address: int, nbytes: int, dtype: str = "uint8") -> np.ndarray:
        """Memory at a device address as an array: it must lie in one allocation, of device or pinned memory."""
        mapped = ((base + _MAPPED, content) for base, content in self.host.items())
        blocks: Iterable[tuple[int, Any]] = chain(self.memory.items(), mapped)
        for base, content in blocks:
            if base <= address and address + nbytes <= base + len(content):
                return np.frombuffer(content, dtype, nbytes // np.dtype(dtype).itemsize, address - base)
        raise AssertionError(f"illegal address {address:#x} + {nbytes}")

    # --- memory

    def memory_info(self) -> tuple[int, int]:
        self._enter("memory_info")
        return self.total - self.others - sum(map(len, self.memory.values())), self.total

    def allocate(self, nbytes: int) -> int:
        self._enter("allocate")
        if nbytes > self.memory_info()[0]:
            raise CudaError("allocate", OUT_OF_MEMORY, "out of memory")
        address, self._next = self._next, self._next + nbytes + 512 - nbytes % 512
        self.memory[address] = bytearray(b"\xaa" * max(nbytes, 1))
        return address

    def free(self, address: int) -> None:
        self._enter("free")
        del self.memory[address]

    def pinned(self, nbytes: int) -> np.ndarray:
        self._enter("pinned")
        with self._lock:
            array = np.full(nbytes, 0xBB, np.uint8)
            self.host[array.ctypes.data] = array
            return array

    def device_address(self, array: np.ndarray) -> int:
        self._enter("device_address")
        assert array.ctypes.data in self.host
        return array.ctypes.data + _MAPPED

    def free_pinned(self, array: np.ndarray) -> None:
        self._enter("free_pinned")
        array[:] = 0xDD
        del self.host[array.ctypes.data]

    def zero(self, address: int, nbytes: int, stream: FakeStream) -> None:
        def work() -> None:
            self.view(address, nbytes)[:] = 0

        self._enqueue("zero", stream, work)

    def upload(self, address: int, source: int, nbytes: int, stream: FakeStream) -> None:
        assert any(base <= source and source + nbytes <= base + len(a) for base, a in self.host.items())

        def work() -> None:
            self.view(address, nbytes)[:] = np.frombuffer(ctypes.string_at(source, nbytes), np.uint8)

        self.uploads += 1
        self._enqueue("upload", stream, work)

    def download(self, target: int, address: int, nbytes: int, stream: FakeStream) -> None:
        self._enqueue("download", stream, lambda: ctypes.memmove(target, self.view(address, nbytes).tobytes(), nbytes))

    # --- streams and events

    def _enqueue(self, method: str, stream: FakeStream, work: Callable[[], Any]) -> None:
        self._enter(method)
        with self._lock:
            if stream.recording is None:
                self.enqueued.append(method)
                stream.waiting.append(work)
            else:
                stream.recording.append(work)

    def stream(self) -> FakeStream:
        return self._made(FakeStream())

    def _made(self, thing: Any) -> Any:
        self._enter("stream")
        with self._lock:
            self.live.append(thing)
        return thing

    def _destroy(self, thing: Any) -> None:
        self._enter("destroy")
        with self._lock:
            self.live.remove(thing)

    destroy_stream = destroy_event = destroy_graph = unload_module = _destroy

    def synchronize(self, stream: FakeStream) -> None:
        self._enter("synchronize")
        with self._lock:
            while stream.waiting:
                stream.waiting.pop(0)()

    def event(self, timing: bool = False) -> FakeEvent:
        return self._made(FakeEvent())

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        event.stream, event.recorded = stream, event.recorded + 1
        number = event.recorded

        def work() -> None:
            event.happened = number

        self._enqueue("record", stream, work)

    def wait(self, event: FakeEvent) -> None:
        self._enter("wait")
        with self._lock:
            while event.happened < event.recorded:
                assert event.stream
                event.stream.waiting.pop(0)()

    # --- kernels and graphs

    def load_module(self, cubin: bytes) -> dict[str, Any]:
        self._enter("load_module")
        found = json.loads(cubin[len(ELF) :])
        if found["arch"] != self.arch:
            raise CudaError("load a cubin", "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available")
        return self._made(found["kernels"])

    def function(
        self, module: dict[str, Any], symbol: str, shared_bytes: int, carveout: int = -1
    ) -> tuple[str, list[int]]:
        self._enter("function")
        if symbol not in module:
            raise CudaError(f"find kernel {symbol}", "CUDA_ERROR_NOT_FOUND", "named symbol not found")
        return symbol, module[symbol]

    def parameter_bytes(self, function: tuple[str, list[int]]) -> tuple[int, ...]:
        return tuple(function[1])

    def launch(
        self, function: Any, grid: Any, threads: int, shared: int, arguments: Any, stream: FakeStream, dependent: bool
    ) -> None:
        values = [argument.value for argument in arguments]

        def work() -> None:
            self.launched += 1
            self.kernels[function[0]](self, *values)

        self.dependent.append(dependent)
        self._enqueue("launch", stream, work)

    def begin_capture(self, stream: FakeStream) -> None:
        self._enter("begin_capture")
        stream.recording = []

    def end_capture(self, stream: FakeStream) -> list[Callable[[], None]]:
        graph, stream.recording = stream.recording, None
        self._enter("end_capture")
        return self._made(graph)

    def abandon_capture(self, stream: FakeStream) -> None:
        stream.recording = None

    def launch_graph(self, graph: list[Callable[[], None]], stream: FakeStream) -> None:
        self._enter("launch_graph")
        with self._lock:
            self.enqueued.append("launch_graph")
            self.replayed.append(graph)
            stream.waiting += graph
