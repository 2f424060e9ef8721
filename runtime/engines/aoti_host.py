"""Loads an artifact's native libraries: exactly the verified bytes, one kernels library per process.

The host library owns the tensors that engines pass around: the artifact's own kernels, or libtorch_cpu.so where a
build needed ATen. torch itself is never imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from ...artifacts.errors import ResourceError, VerificationError
from ...artifacts.store import OpenArtifact

Handle = ctypes.c_void_p
# Numbers of c10::ScalarType, a stable part of the C interface.
_SCALAR_TYPES = {
    "uint8": 0, "int8": 1, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "float64": 7, "bool": 11, "bfloat16": 15,
    "float8_e4m3fn": 24,
}  # fmt: skip
# What every kernels library exports, besides the tensor functions that only engines look for.
_KERNELS = ("ingot_kernels_id", "ingot_run", "ingot_last_error", "omp_set_num_threads", "omp_get_max_threads")


class Host:
    """The library that owns tensors, and the helper that runs an engine in one call."""

    def __init__(self, artifact: OpenArtifact) -> None:
        # Toolchains that link the C++ library statically put a copy into every engine; symbols that are unique in a
        # process then mix with those of the copy other extensions brought. With the shared one loaded first and
        # globally, all agree on it.
        with contextlib.suppress(OSError):
            ctypes.CDLL("libstdc++.so.6", ctypes.RTLD_GLOBAL)
        owner = open_library(_libtorch(), "libtorch") if artifact.manifest.target.host_library == "libtorch" else None
        libraries = dict.fromkeys(lib for e in artifact.manifest.engines for lib in e.libraries)
        if len(libraries) != 1:
            raise VerificationError(
                "the engines do not agree on one kernels library",
                f"they name {len(libraries)}",
                "build the artifact again",
            )
        name = next(iter(libraries))
        path = load_path(artifact, name)
        _refuse_other_kernels(open_library(path, name, ctypes.RTLD_LOCAL, _KERNELS))
        self.kernels = open_library(path, name)
        self.blob = (owner or self.kernels).aoti_torch_create_tensor_from_blob
        self.run = self.kernels.ingot_run
        self.run.argtypes = [Handle, Handle, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self.set_threads = self.kernels.omp_set_num_threads
        self.max_threads = self.kernels.omp_get_max_threads
        self.last_error = self.kernels.ingot_last_error
        self.last_error.restype = ctypes.c_char_p

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> int:
        """A handle on memory that the caller keeps alive."""
        strides: list[int] = []
        step = 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= max(size, 1)
        array = ctypes.c_int64 * max(len(shape), 1)
        handle = Handle()
        status = self.blob(
            ctypes.c_void_p(address), ctypes.c_int64(len(shape)), array(*shape), array(*strides), ctypes.c_int64(0),
            ctypes.c_int32(_SCALAR_TYPES[dtype]), ctypes.c_int32(0), ctypes.c_int32(0), ctypes.byref(handle),
        )  # fmt: skip
        if status or not handle.value:
            raise ResourceError("a tensor could not be made", f"{dtype}{list(shape)}", "")
        return handle.value


def open_library(path: Path, name: str, mode: int = ctypes.RTLD_GLOBAL, needs: Iterable[str] = ()) -> ctypes.CDLL:
    """Load a shared object that must export the functions `needs`; `name` is what messages call it.

    Raises:
        VerificationError: it cannot be loaded, or lacks a function.
    """
    try:
        library = ctypes.CDLL(str(path), mode)
    except OSError as error:
        raise VerificationError(
            f"{name} cannot be loaded",
            str(error),
            "build the artifact on this machine, or run it where it was built for",
        ) from error
    if missing := [function for function in needs if not hasattr(library, function)]:
        raise VerificationError(f"{name} is another library", f"it has no {missing[0]}", "build the artifact again")
    return library


def load_path(artifact: OpenArtifact, relative: str) -> Path:
    """A path that the dynamic linker loads exactly the verified bytes from.

    The bytes are read and digested once more into memory that nothing else can reach. A file's own path would not do:
    it can change between digest and load, and the linker takes a library it already has under that path for the same.

    Raises:
        VerificationError: the content is not what the manifest lists.
    """
    content = artifact.read(relative)
    descriptor = os.memfd_create(relative.replace("/", "-"), os.MFD_CLOEXEC)
    # Never closed: as long as the descriptor is open, its path stands for this content alone.
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return Path(f"/proc/self/fd/{descriptor}")


def _refuse_other_kernels(kernels: ctypes.CDLL) -> None:
    """Engines find their kernels among the process's global symbols, so only one version can be there.

    Raises:
        VerificationError: an artifact with other kernels was loaded before.
    """
    everything = ctypes.CDLL(None)
    if not hasattr(everything, "ingot_kernels_id"):
        return
    for library in (everything, kernels):
        library.ingot_kernels_id.restype = ctypes.c_char_p
    if everything.ingot_kernels_id() != kernels.ingot_kernels_id():
        raise VerificationError(
            "an artifact with other kernels is loaded in this process",
            "its kernels would serve this one's engines too",
            "use one process per artifact, or build both with the same version of Ingot",
        )


def _libtorch() -> Path:
    """libtorch_cpu.so of the installed torch, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise VerificationError(
            "this artifact needs torch's libraries",
            "torch is not installed",
            "pip install torch, or rebuild without ops that need ATen",
        )
    return Path(spec.origin).parent / "lib" / "libtorch_cpu.so"
