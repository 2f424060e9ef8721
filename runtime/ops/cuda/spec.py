"""What a CUDA provider of an op says: which Triton kernels to launch, in which order, on what.

A provider is a module of this folder with two functions per op:

    candidates(operands: Operands) -> list[Config]      configurations worth measuring on the target, best guess first
    lower(operands: Operands, config: Config) -> Lowering

Shapes are fixed, so every number a kernel needs is a `tl.constexpr`: what is left at run time are pointers alone. An
absent operand is passed as any other pointer, with a constexpr flag that keeps the kernel from touching it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, int | bool | str]

# torch's dtype names to Triton's.
TRITON_DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int64": "i64", "int32": "i32", "int8": "i8",
    "uint8": "u8", "bool": "i1", "float8_e4m3fn": "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor operand: shape and strides in elements, dtype in torch's words ("bfloat16").

    `aligned` says that its address is a multiple of 16 bytes.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    aligned: bool = True

    @property
    def contiguous(self) -> bool:
        """Whether elements lie in order without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


@dataclass(frozen=True)
class Scratch:
    """Memory between the launches of one op. `zeroed`: zero before the first run, and the kernels leave it zero."""

    shape: tuple[int, ...]
    dtype: str
    zeroed: bool = False


@dataclass(frozen=True)
class Operands:
    """The arguments of one call of an op: tensors by the schema's names (None where absent), and plain values.

    `outputs` are freshly made, contiguous tensors that the kernels must fill completely: "out", or "out0", "out1" …
    `stable` names operands that no earlier launch of the same run writes (weights; inputs; a cache that only this call
    writes, in what it held before): a dependent launch may read them before it waits.
    """

    tensors: Mapping[str, TensorSpec | None]
    values: Mapping[str, Any]
    outputs: Mapping[str, TensorSpec]
    stable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class KernelCall:
    """One launch of a Triton kernel.

    Attributes:
        function: the `triton.jit` function.
        pointers: kernel parameter -> name of an operand, an output or a scratch; in the kernel's own order.
        constants: kernel parameter -> value of every `tl.constexpr`.
        dependent: launched as a programmatic dependent; the kernel calls `gdc_wait` before it touches anything that
            an earlier launch may write or read. Weights, which nothing writes, may be read before.
        carveout: shared memory that a multiprocessor sets aside for it, in percent; 0: the least that holds one
            program; -1: the driver's choice, what lets the most programs in. A multiprocessor changes its share only
            while it is idle: between kernels that differ much in it nothing overlaps.
        read_bytes: bytes that must be read from device memory for it (weights, keys and values), for the profile.
    """

    function: Any
    grid: tuple[int, int, int]
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    dependent: bool = False
    carveout: int = -1
    read_bytes: int = 0
    label: str = ""


@dataclass(frozen=True)
class Lowering:
    """All launches of one op, in order, and the scratch between them."""

    calls: tuple[KernelCall, ...]
    scratch: Mapping[str, Scratch] = field(default_factory=dict)
