"""The CPU kernels, compiled once per session and called through ctypes on tensors of their own shim."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ingot.compiler.backends.cpu_kernels import SOURCE_FOLDER, compile_kernels

_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.bfloat16: 15,
    torch.float8_e4m3fn: 24,
}
_BY_NUMBER = {number: dtype for dtype, number in _DTYPES.items()}
Handle = ctypes.c_void_p


class Kernels:
    """Calls C functions of the library with torch tensors, which only lend their memory."""

    def __init__(self, path: Path) -> None:
        # Local: this process also holds libtorch, whose functions have the same names.
        self.library = ctypes.CDLL(str(path), ctypes.RTLD_LOCAL)
        self.library.ingot_last_error.restype = ctypes.c_char_p

    def handle(self, tensor: torch.Tensor) -> Handle:
        """A handle on the tensor's memory, with its sizes and strides."""
        made, numbers = Handle(), ctypes.c_int64 * max(tensor.dim(), 1)
        status = self.library.aoti_torch_create_tensor_from_blob(
            Handle(tensor.data_ptr()),
            ctypes.c_int64(tensor.dim()),
            numbers(*tensor.shape),
            numbers(*tensor.stride()),
            ctypes.c_int64(0),
            _DTYPES[tensor.dtype],
            0,
            0,
            ctypes.byref(made),
        )
        assert status == 0, self.error()
        return made

    def error(self) -> str:
        return self.library.ingot_last_error().decode()

    def free(self, handle: Handle) -> None:
        assert self.library.aoti_torch_delete_tensor_object(handle) == 0

    def read(self, handle: Handle) -> torch.Tensor:
        """A copy of what a handle holds (contiguous results)."""
        dtype, dim, sizes, data = ctypes.c_int32(), ctypes.c_int64(), ctypes.POINTER(ctypes.c_int64)(), Handle()
        self.library.aoti_torch_get_dtype(handle, ctypes.byref(dtype))
        self.library.aoti_torch_get_dim(handle, ctypes.byref(dim))
        self.library.aoti_torch_get_sizes(handle, ctypes.byref(sizes))
        self.library.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
        out = torch.empty([sizes[d] for d in range(dim.value)], dtype=_BY_NUMBER[dtype.value])
        ctypes.memmove(out.data_ptr(), data.value or 0, out.numel() * out.itemsize)
        return out

    def call(
        self, name: str, *arguments: torch.Tensor | tuple[torch.Tensor] | list[int] | str | float | int | None
    ) -> torch.Tensor:
        """An op's result; a `None` is an absent optional tensor, a tuple of a tensor a present one, a list `int[]`."""
        function: Callable[..., int] = getattr(self.library, f"aoti_torch_cpu_{name}")
        handles: list[Handle] = []
        given: list[object] = []
        for argument in arguments:
            if isinstance(argument, tuple):
                handles.append(self.handle(argument[0]))
                given.append(ctypes.byref(handles[-1]))
            elif isinstance(argument, torch.Tensor):
                handles.append(self.handle(argument))
                given.append(handles[-1])
            elif isinstance(argument, str):
                given.append(argument.encode())
            elif isinstance(argument, list):
                given += [(ctypes.c_int64 * len(argument))(*argument), ctypes.c_int64(len(argument))]
            elif isinstance(argument, float):
                given.append(ctypes.c_double(argument))
            else:
                given.append(None if argument is None else ctypes.c_int64(argument))
        result = Handle()
        status = function(*given, ctypes.byref(result))
        for handle in handles:
            self.free(handle)
        if status:
            raise RuntimeError(self.error())
        out = self.read(result)
        self.free(result)
        return out


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    compile_kernels(path)
    return Kernels(path)


# What a -march adds that its kernels would be stopped without; the machine at hand may lack it.
_NEEDS = {"x86-64-v2": (), "x86-64-v3": ("avx2", "fma"), "x86-64-v4": ("avx512f", "avx512bw", "avx512vl")}


@pytest.fixture(scope="session", params=["native", *_NEEDS])
def products(request: pytest.FixtureRequest, kernels: Kernels, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels of products for each instruction set that this machine can run, the others skipped."""
    if request.param == "native":
        return kernels
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if platform.machine() != "x86_64" or not set(_NEEDS[request.param]) <= set(flags.split()):
        pytest.skip(f"this machine cannot run {request.param}")
    path = tmp_path_factory.mktemp("kernels") / f"{request.param}.so"
    names = ("linear", "linear_packed", "run", "shim", "memory")
    sources = [str(SOURCE_FOLDER / f"{name}.cpp") for name in names]
    flags_of_it = ["-O1", f"-march={request.param}", "-std=gnu++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
    subprocess.run(["g++", *flags_of_it, "-ffp-contract=fast", "-w", "-shared", *sources, "-o", str(path)], check=True)
    return Kernels(path)
