"""Writes the weights of an artifact as safetensors, one tensor at a time, and never more than one in memory.

The header is known before any value: shapes and dtypes come from the graphs. Every tensor starts at a multiple of 256
bytes; where sizes are odd, tensors named `ingot_padding_…` fill the gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifacts.errors import ResourceError

SHARD_BYTES = 4 << 30
# Where tensors start in the file, in bytes: a device that maps or copies it whole can load them as vectors.
_ALIGNMENT = 256
_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_weights(folder: Path, specs: Mapping[str, Spec], evaluate: Callable[[str], torch.Tensor]) -> list[str]:
    """Write all tensors into as many shards as needed; returns the shards' names in `folder`.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(specs):
        if shards[-1] and size + specs[name].nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += specs[name].nbytes
    files = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    try:
        for file, names in zip(files, shards):
            _write_shard(folder / file, {n: specs[n] for n in names}, evaluate)
    except OSError as error:
        raise ResourceError(
            f"cannot write the weights to {folder}", str(error), "free some disk space and build again"
        ) from error
    return files


def _write_shard(path: Path, specs: Mapping[str, Spec], evaluate: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, object] = {}
    offset = 0
    paddings: dict[str, int] = {}  # behind which tensor how many bytes
    # Tensors of odd sizes last: the format allows no gaps, so what aligns the next one must be a tensor itself.
    ordered = sorted(specs, key=lambda n: (specs[n].nbytes % _ALIGNMENT != 0, n))
    for before, name in zip((None, *ordered), ordered):
        if before is not None and (odd := -offset % _ALIGNMENT):
            paddings[before] = odd
            header[f"ingot_padding_{len(paddings)}"] = {
                "dtype": "U8", "shape": [odd], "data_offsets": [offset, offset + odd],
            }  # fmt: skip
            offset += odd
        spec = specs[name]
        header[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in ordered:
            value = evaluate(name)
            if tuple(value.shape) != specs[name].shape or value.dtype != specs[name].dtype:
                raise ValueError(f"weight {name} is {value.dtype}{tuple(value.shape)}, the graph wants {specs[name]}")
            if value.numel():
                value.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
            file.write(bytes(paddings.get(name, 0)))
        file.flush()
        os.fsync(file.fileno())
