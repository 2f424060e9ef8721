"""Maps an artifact's safetensors files into memory and finds tensors in them by name; copies nothing."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifacts.errors import VerificationError

_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip
_ITEM_BYTES = {
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


def map_weights(paths: Iterable[Path]) -> dict[str, MappedTensor]:
    """All tensors of all files by name.

    Raises:
        VerificationError: a header is malformed, or two files hold one name.
    """
    tensors: dict[str, MappedTensor] = {}
    for path in paths:
        for name, tensor in _map_file(path).items():
            if name in tensors:
                raise VerificationError(
                    f"{path.name} holds {name!r} once more",
                    "two weights files hold one tensor",
                    "build the artifact again",
                )
            tensors[name] = tensor
    return tensors


def _map_file(path: Path) -> dict[str, MappedTensor]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    raw = np.frombuffer(mapped, dtype=np.uint8)
    size = int.from_bytes(raw[:8].tobytes(), "little") if len(raw) >= 8 else -1
    if not 0 < size <= min(_LARGEST_HEADER, len(raw) - 8):
        raise VerificationError(
            f"{path.name} is no safetensors file", "its header length is impossible", "build the artifact again"
        )
    start = 8 + size
    found = {}
    try:
        for name, entry in json.loads(raw[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(raw) - start:
                raise ValueError(f"{name} lies outside the file")
            shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            if any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"{name} has an impossible shape")
            if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
                raise ValueError(
                    f"{name} has {end - begin} bytes, its shape {list(shape)} in {dtype} needs another number"
                )
            found[name] = MappedTensor(raw[start + begin : start + end], shape, dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path.name} is malformed", str(error), "build the artifact again") from error
    return found
