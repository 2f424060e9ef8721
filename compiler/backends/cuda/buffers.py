"""Memory of an engine while it is lowered: buffers, and typed regions of them that launches read and write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ....artifacts.kernel_plan import ALIGNMENT
from ....runtime.ops.cuda.spec import TensorSpec


@dataclass(eq=False)
class Buffer:
    """One piece of memory. `space` and `name` as in `PlanArgument`; `offset` in the arena is planned later.

    `exclusive`: no other buffer has its bytes at any time, since a launch writes it before it waits for earlier ones.
    """

    space: str
    name: str
    nbytes: int
    zeroed: bool = False
    exclusive: bool = False
    offset: int = 0
    first: int = field(default=-1)  # index of the first and last launch that touch it
    last: int = field(default=-1)

    @property
    def padded(self) -> int:
        """nbytes rounded up, so that whatever follows is aligned."""
        return -(-max(self.nbytes, 1) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Region:
    """A tensor in a buffer: offset in bytes, shape and strides in elements."""

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes from the first to behind the last element."""
        if 0 in self.shape:
            return 0
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        return (span + 1) * self.dtype.itemsize

    def spec(self) -> TensorSpec:
        """What a provider is told of it."""
        name = str(self.dtype).removeprefix("torch.")
        return TensorSpec(self.shape, self.strides, name, aligned=self.offset % 16 == 0)

    def viewed(self, shape: tuple[int, ...], strides: tuple[int, ...], start: int) -> Region:
        """`torch.as_strided` of it: `start` is counted in elements from the beginning of the buffer."""
        return Region(self.buffer, start * self.dtype.itemsize, shape, strides, self.dtype)


@dataclass(frozen=True)
class Scalar:
    """A number passed by value, as `dtype` ("int32", "int64", "float32", "float64")."""

    dtype: str
    value: Any


Argument = Region | Scalar
