"""A thin wrapper over the CUDA driver (NVIDIA's cuda-bindings): what the plan engine needs, errors as exceptions.

Handles and device addresses are plain values that only this class looks into; host memory is numpy. Nothing here knows
of plans or models. Tests put an object with the same methods in its place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...artifacts.errors import ResourceError

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
# cuFuncLoad and cuFuncGetParamInfo are of CUDA 12.4.
_OLDEST = 12_040
# A launch may use so much shared memory without asking first.
_SHARED_BYTES = 48 << 10
_FIXES = {
    OUT_OF_MEMORY: "stop what else uses the GPU (see nvidia-smi), or build for shorter sequences or smaller batches",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "build the artifact again for this GPU, or update the NVIDIA driver",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has the GPU for itself: see nvidia-smi",
}
_FIX = "see nvidia-smi and the system's log (dmesg) for the state of the GPU; if it is fine, build the artifact again"


class CudaError(ResourceError):
    """The driver refused a call; `code` is its name for the reason, such as "CUDA_ERROR_OUT_OF_MEMORY"."""

    def __init__(self, doing: str, code: str, text: str) -> None:
        self.code = code
        super().__init__(f"the GPU cannot {doing}", f"{code}: {text}", _FIXES.get(code, _FIX))


class Driver:
    """Device `ordinal` and its primary context, which other libraries of the process share.

    Raises:
        CudaError: (from any method) the driver refuses.
        ResourceError: cuda-bindings is not installed, or the driver is too old.
    """

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import driver as api
        except ImportError as error:
            raise ResourceError(
                "cuda-bindings cannot be imported", str(error), '`pip install "ingot[cuda]"`'
            ) from error
        self._api: Any = api
        try:
            self._call("start", api.cuInit(0))
            (version,) = self._call("tell its version", api.cuDriverGetVersion())
            if version < _OLDEST:
                why = f"it is for CUDA {version // 1000}.{version % 1000 // 10}, at least 12.4 is needed"
                raise ResourceError("the NVIDIA driver is too old", why, "update the NVIDIA driver")
            (self.device,) = self._call("be found", api.cuDeviceGet(ordinal))
            (self._context,) = self._call("make a context", api.cuDevicePrimaryCtxRetain(self.device))
        except RuntimeError as error:  # how the bindings say that libcuda or a function in it is missing
            fix = "install a current NVIDIA driver, or a cuda-bindings version that fits it"
            raise ResourceError("the NVIDIA driver does not fit cuda-bindings", str(error), fix) from error
        self.activate()

    def _call(self, doing: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values of an answer (status, values …); `doing` completes "the GPU cannot …"."""
        status = answer[0]
        if status != 0:
            text = self._api.cuGetErrorString(status)[1] or b""
            raise CudaError(doing, getattr(status, "name", str(status)), text.decode(errors="replace"))
        return answer[1:]

    def activate(self) -> None:
        """Make the context this thread's: needed once per thread before any other method."""
        self._call("switch threads", self._api.cuCtxSetCurrent(self._context))

    def close(self) -> None:
        """Give the primary context back; everything made here must have been freed."""
        self._call("release its context", self._api.cuDevicePrimaryCtxRelease(self.device))

    # --- memory ------------------------------------------------------------------------------------------------------

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        free, total = self._call("tell its free memory", self._api.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """The address of new device memory, a multiple of 256; its content is undefined."""
        (address,) = self._call(f"allocate {nbytes:,} bytes", self._api.cuMemAlloc(max(nbytes, 1)))
        return int(address)

    def free(self, address: int) -> None:
        """Give device memory back; the device must have finished with it."""
        self._call("free memory", self._api.cuMemFree(address))

    def pinned(self, nbytes: int) -> np.ndarray:
        """New page-locked host memory, uint8 [nbytes]: free it with `free_pinned`, after its last use."""
        answer = self._api.cuMemHostAlloc(nbytes, self._api.CU_MEMHOSTALLOC_DEVICEMAP)
        (address,) = self._call(f"pin {nbytes:,} bytes of host memory", answer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address)))

    def device_address(self, array: np.ndarray) -> int:
        """Where kernels find what `pinned` gave.

        The host sees what a kernel wrote there once an event behind the kernel has happened.
        """
        return int(self._call("map host memory", self._api.cuMemHostGetDevicePointer(array.ctypes.data, 0))[0])

    def free_pinned(self, array: np.ndarray) -> None:
        """Give page-locked memory back."""
        self._call("free pinned memory", self._api.cuMemFreeHost(array.ctypes.data))

    def zero(self, address: int, nbytes: int, stream: Any) -> None:
        """Fill device memory with zeros."""
        if nbytes:
            self._call("clear memory", self._api.cuMemsetD8Async(address, 0, nbytes, stream))

    def upload(self, address: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy host memory at the address `source` to the device; returns before it is done if that is pinned."""
        self._call("take data", self._api.cuMemcpyHtoDAsync(address, source, nbytes, stream))

    def download(self, target: int, address: int, nbytes: int, stream: Any) -> None:
        """Copy device memory to host memory at the address `target`, as `upload`."""
        self._call("hand out data", self._api.cuMemcpyDtoHAsync(target, address, nbytes, stream))

    # --- streams and events ------------------------------------------------------------------------------------------

    def stream(self) -> Any:
        """A new stream that does not wait for the default one."""
        return self._call("make a stream", self._api.cuStreamCreate(self._api.CUstream_flags.CU_STREAM_NON_BLOCKING))[0]

    def destroy_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self._call("destroy a stream", self._api.cuStreamDestroy(stream))

    def synchronize(self, stream: Any) -> None:
        """Wait until all work in the stream is done."""
        self._call("finish its work", self._api.cuStreamSynchronize(stream))

    def event(self, timing: bool = False) -> Any:
        """A new event; waiting for one that was never recorded returns at once."""
        flags = self._api.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        return self._call("make an event", self._api.cuEventCreate(flag))[0]

    def destroy_event(self, event: Any) -> None:
        """Give an event back."""
        self._call("destroy an event", self._api.cuEventDestroy(event))

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when the work now in the stream is done."""
        self._call("record an event", self._api.cuEventRecord(event, stream))

    def wait(self, event: Any) -> None:
        """Wait for an event."""
        self._call("finish its work", self._api.cuEventSynchronize(event))

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two timing events that have happened."""
        return float(self._call("tell the time", self._api.cuEventElapsedTime(start, end))[0])

    # --- kernels and graphs ------------------------------------------------------------------------------------------

    def load_module(self, cubin: bytes) -> Any:
        """Load a cubin from memory."""
        return self._call("load a cubin", self._api.cuModuleLoadData(cubin))[0]

    def unload_module(self, module: Any) -> None:
        """Give a module back; none of its functions may be used any more."""
        self._call("unload a cubin", self._api.cuModuleUnload(module))

    def function(self, module: Any, symbol: str, shared_bytes: int, carveout: int = -1) -> Any:
        """A kernel of a module, allowed to use so much dynamic shared memory; carveout: see `PlanKernel`."""
        (function,) = self._call(f"find kernel {symbol}", self._api.cuModuleGetFunction(module, symbol.encode()))
        if shared_bytes > _SHARED_BYTES:
            limit = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            answer = self._api.cuFuncSetAttribute(function, limit, shared_bytes)
            self._call(f"give kernel {symbol} {shared_bytes:,} bytes of shared memory", answer)
        preference = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        self._call(f"set up kernel {symbol}", self._api.cuFuncSetAttribute(function, preference, carveout))
        # Else it is loaded with its first launch, which is not possible while a graph is recorded.
        self._call(f"load kernel {symbol}", self._api.cuFuncLoad(function))
        return function

    def parameter_bytes(self, function: Any) -> tuple[int, ...]:
        """The sizes of a kernel's parameters."""
        sizes: list[int] = []
        while True:
            status, *found = self._api.cuFuncGetParamInfo(function, len(sizes))
            if status != 0:  # past the last one
                return tuple(sizes)
            sizes.append(int(found[1]))

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[ctypes._SimpleCData[Any]],
        stream: Any,
        dependent: bool,
    ) -> None:
        """Launch a kernel with one argument per parameter.

        dependent: programmatic dependent launch, it may start while the kernel before it in the stream still runs.
        """
        pointers = (ctypes.c_void_p * max(len(arguments), 1))(*map(ctypes.addressof, arguments))
        config = self._api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        if dependent:
            attribute = self._api.CUlaunchAttribute()
            attribute.id = self._api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        answer = self._api.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0)
        self._call("launch a kernel", answer)

    def begin_capture(self, stream: Any) -> None:
        """From here on, what is launched in the stream is recorded and not run."""
        # Thread local: what other threads do with the device meanwhile is not this graph's concern.
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("record a graph", self._api.cuStreamBeginCapture(stream, mode))

    def end_capture(self, stream: Any) -> Any:
        """The recorded graph, ready to be launched."""
        (graph,) = self._call("record a graph", self._api.cuStreamEndCapture(stream))
        try:
            return self._call("prepare a graph", self._api.cuGraphInstantiate(graph, 0))[0]
        finally:
            self._call("free a graph", self._api.cuGraphDestroy(graph))

    def abandon_capture(self, stream: Any) -> None:
        """End a recording that failed; what was recorded is dropped."""
        status, *graph = self._api.cuStreamEndCapture(stream)
        if status == 0 and int(graph[0]):
            self._call("free a graph", self._api.cuGraphDestroy(graph[0]))

    def launch_graph(self, graph: Any, stream: Any) -> None:
        """Run a recorded graph."""
        self._call("launch a graph", self._api.cuGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Any) -> None:
        """Give a graph back."""
        self._call("free a graph", self._api.cuGraphExecDestroy(graph))
