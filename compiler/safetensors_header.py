"""The header of a safetensors file, checked before anything is mapped.

Layout: 8 bytes little-endian header size n, n bytes of JSON (name -> dtype, shape, data_offsets), then the data, which
the tensors must cover without gap or overlap. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..artifacts.errors import ResourceError, UsageError
from .strict_json import parse_json

MAX_HEADER_BYTES = 25_000_000
MAX_RANK = 8
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name.

    Raises:
        UsageError: the file is no whole and sound safetensors file.
        ResourceError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                limit = f"at most {MAX_HEADER_BYTES} bytes of header are read" if size - 8 >= length else "cut short"
                raise _bad(path, f"its header claims {length} bytes in a file of {size} ({limit})")
            raw = file.read(length)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read", str(error), "check the disk and the permissions") from error
    header = parse_json(raw, f"{path} (header)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "__metadata__ is not an object of strings")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _entry(path, name, entry)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise _bad(path, f"{name} starts at byte {start} of the data, the tensor before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise _bad(path, f"its tensors need {end} bytes of data, it has {size - 8 - length}")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not _NAME.fullmatch(name):
        raise _bad(path, f"{ascii(name)[:80]} is no tensor name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(path, f"{name} has the unknown dtype {ascii(dtype)[:40]}")
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise _bad(path, f"{name} has no shape of at most {MAX_RANK} sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _bad(path, f"{name} has no pair of data_offsets")
    start, stop = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != needed:
        raise _bad(path, f"{name} spans {stop - start} bytes, its shape {shape} in {dtype} needs {needed}")
    return TensorInfo(tuple(shape), DTYPES[dtype]), (start, stop)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _bad(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path}: not a sound safetensors file", why, "fetch the file again and compare its size with the source's"
    )
