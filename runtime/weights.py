"""An artifact's safetensors files: where each tensor lies in them, and the files mapped into memory; copies nothing."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifacts.errors import VerificationError
from ..artifacts.files import open_plain, os_errors

_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip
ITEM_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1,
}  # fmt: skip
_LARGEST_HEADER = 25 << 20


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a mapped file: its raw bytes (read only), shape and dtype in numpy's words."""

    data: np.ndarray
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its first byte counted from the file's, its bytes, shape and dtype in numpy's words."""

    start: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightsFile:
    """A weights file before its data is read: its size, the bytes up to the data, and its tensors by name."""

    path: Path
    size: int
    header: bytes
    tensors: dict[str, StoredTensor]


def read_headers(paths: Iterable[Path]) -> list[WeightsFile]:
    """The headers of all files.

    Raises:
        VerificationError: a header is malformed, or two files hold one name.
        ResourceError: a file cannot be read.
    """
    files = [_read_header(path) for path in paths]
    _refuse_twins((file.path, file.tensors) for file in files)
    return files


def map_weights(paths: Iterable[Path]) -> dict[str, MappedTensor]:
    """All tensors of all files by name.

    Raises:
        VerificationError: a header is malformed, or two files hold one name.
    """
    mapped = [(path, _map_file(path)) for path in paths]
    _refuse_twins(mapped)
    return {name: tensor for _, tensors in mapped for name, tensor in tensors.items()}


def _refuse_twins(files: Iterable[tuple[Path, Iterable[str]]]) -> None:
    known: set[str] = set()
    for path, names in files:
        if (twin := next((name for name in names if name in known), None)) is not None:
            raise VerificationError(
                f"{path.name} holds {twin!r} once more", "two weights files hold one tensor", "build the artifact again"
            )
        known.update(names)


def _read_header(path: Path) -> WeightsFile:
    with open_plain(path) as descriptor, os_errors(f"cannot read {path}"):
        size = os.fstat(descriptor).st_size
        header = os.pread(descriptor, 8, 0)
        header += os.pread(descriptor, _header_bytes(path, header, size), 8)
    return WeightsFile(path, size, header, _parse(path, header, size))


def _map_file(path: Path) -> dict[str, MappedTensor]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    raw = np.frombuffer(mapped, dtype=np.uint8)
    header = raw[: 8 + _header_bytes(path, raw[:8].tobytes(), len(raw))].tobytes()
    return {
        name: MappedTensor(raw[t.start : t.start + t.nbytes], t.shape, t.dtype)
        for name, t in _parse(path, header, len(raw)).items()
    }


def _header_bytes(path: Path, first: bytes, size: int) -> int:
    """The header's length, from the first 8 bytes of a file of this size."""
    length = int.from_bytes(first, "little") if len(first) == 8 else -1
    if not 0 < length <= min(_LARGEST_HEADER, size - 8):
        raise VerificationError(
            f"{path.name} is no safetensors file", "its header length is impossible", "build the artifact again"
        )
    return length


def _parse(path: Path, header: bytes, size: int) -> dict[str, StoredTensor]:
    start = len(header)
    found = {}
    try:
        for name, entry in json.loads(header[8:]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - start:
                raise ValueError(f"{name} lies outside the file")
            shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            if any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"{name} has an impossible shape")
            if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
                raise ValueError(
                    f"{name} has {end - begin} bytes, its shape {list(shape)} in {dtype} needs another number"
                )
            found[name] = StoredTensor(start + begin, end - begin, shape, dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path.name} is malformed", str(error), "build the artifact again") from error
    return found
