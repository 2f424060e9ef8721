"""What a call of `fused_linear` asks for, as numbers: shapes, strides and flags out of the operands, checked."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from .spec import Operands, TensorSpec

ACTIVATIONS = ("", "silu", "relu", "gelu", "gelu_tanh")
# (format, activations) of the quantized weights that there are kernels for.
FORMATS: frozenset[tuple[str, str]] = frozenset()
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# With more rows of x, a norm in front is a kernel of its own.
DECODE_ROWS = 64


@dataclass(frozen=True)
class Problem:
    """What a call asks for: m rows of x [m, k] times weight [n, k], the result [m, columns]; strides in elements.

    `flags` name what is fused. `paired`: x, weight and the norm's weight can be read as pairs of bfloat16. `askable`:
    rows of the weight start at multiples of 16 bytes, as the instruction that asks for them into L2 wants. `tileable`:
    rows of x, weight and result do, and lie dense, as the copy engine wants, and its kernel knows what is fused.
    """

    m: int
    n: int
    k: int
    columns: int
    item_bytes: int
    dtype: str
    x_stride: int
    residual_stride: int
    normed: bool
    activation: str
    flags: tuple[str, ...]
    paired: bool
    askable: bool
    tileable: bool

    @property
    def gated(self) -> int:
        """Rows of the weight behind a column of the result."""
        return 2 if self.activation else 1


def problem_of(operands: Operands) -> Problem:
    """The call's numbers.

    Raises:
        ValueError: the operands are not what the kernels take; the message says which.
    """
    x, weight = operands.tensors.get("x"), operands.tensors.get("weight")
    out = operands.outputs.get("out")
    if x is None or weight is None or out is None:
        raise ValueError("fused_linear needs x, weight and the output out")
    form = (str(operands.values["format"]), str(operands.values["activations"]))
    if form[0] and form not in FORMATS:
        raise ValueError(f"fused_linear has no CUDA kernel for {form[0]} weights with {form[1] or 'plain'} activations")
    if len(weight.shape) != 2 or not x.shape or x.shape[-1] != weight.shape[1] or 0 in x.shape + weight.shape:
        raise ValueError(f"fused_linear: x {list(x.shape)} and weight {list(weight.shape)} do not multiply")
    if x.dtype not in ITEM_BYTES or weight.dtype != x.dtype:
        raise ValueError(
            f"fused_linear takes {', '.join(ITEM_BYTES)}, the same twice, not {x.dtype} and {weight.dtype}"
        )
    if not weight.contiguous:
        raise ValueError("fused_linear: weight must be contiguous")
    activation, wide = str(operands.values["activation"]), bool(operands.values["wide"])
    n, k = weight.shape
    if activation not in ACTIVATIONS or (activation and n % 2):
        raise ValueError(f"fused_linear: activation {activation!r} over {n} columns is not one of {ACTIVATIONS[1:]}")
    m, columns = math.prod(x.shape[:-1]), n // 2 if activation else n
    if out.shape != (*x.shape[:-1], columns) or not out.contiguous or out.dtype != ("float32" if wide else x.dtype):
        raise ValueError(f"fused_linear: out {list(out.shape)} {out.dtype} is not what it computes")
    bias, gain, residual = (operands.tensors.get(name) for name in ("bias", "norm_weight", "residual"))
    for name, spec, shape in (("bias", bias, (n,)), ("norm_weight", gain, (k,)), ("residual", residual, out.shape)):
        if spec is not None and spec.shape != shape:
            raise ValueError(f"fused_linear: {name} is {list(spec.shape)}, not {list(shape)}")
        if spec is not None and name != "residual" and not spec.contiguous:
            raise ValueError(f"fused_linear: {name} must be contiguous")
    if gain is not None and m > DECODE_ROWS:
        raise ValueError(f"fused_linear: no norm in front of {m} rows of x; {DECODE_ROWS} are the most")
    x_stride = _row_stride("x", x)
    read = [spec for spec in (x, weight, gain) if spec is not None]
    pairs = all(spec.dtype == "bfloat16" and spec.aligned for spec in read) and k % 2 == x_stride % 2 == 0
    item = ITEM_BYTES[x.dtype]
    lined_up = x.aligned and weight.aligned and all(length * item % 16 == 0 for length in (k, x_stride, columns))
    plain = not activation or (bias is None and residual is None)
    notes = {"norm": gain, activation: activation, "bias": bias, "residual": residual, "wide": wide}
    return Problem(
        m=m,
        n=n,
        k=k,
        columns=columns,
        item_bytes=ITEM_BYTES[x.dtype],
        dtype=x.dtype,
        x_stride=x_stride,
        residual_stride=0 if residual is None else _row_stride("residual", residual),
        normed=gain is not None,
        activation=activation,
        flags=tuple(name for name, present in notes.items() if present),
        paired=pairs,
        tileable=lined_up and plain and not wide and gain is None and x.dtype != "float32",
        askable=weight.aligned and k * ITEM_BYTES[x.dtype] % 16 == 0,
    )


def _row_stride(name: str, spec: TensorSpec) -> int:
    """Elements from a row to the next when all leading dimensions are taken as one."""
    sizes = [(size, stride) for size, stride in zip(spec.shape[:-1], spec.strides[:-1]) if size != 1]
    if spec.shape[-1] != 1 and spec.strides[-1] != 1:
        raise ValueError(f"fused_linear: the last dimension of {name} must be dense, its stride is {spec.strides[-1]}")
    for (_, outer), (size, inner) in itertools.pairwise(sizes):
        if outer != size * inner:
            raise ValueError(f"fused_linear: the rows of {name}, strides {list(spec.strides)}, have no common stride")
    return sizes[-1][1] if sizes else spec.shape[-1]


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor's elements."""
    return math.prod(spec.shape) * ITEM_BYTES[spec.dtype]
