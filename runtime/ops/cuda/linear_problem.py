"""What a call of `fused_linear` asks for, as numbers: shapes, strides and flags out of the operands, checked."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from .spec import Operands, TensorSpec

# (format, activations) of the quantized weights that there are kernels for; int4 as `int4_halves`.
FORMATS = frozenset({("int8", ""), ("int8", "int8"), ("fp8", ""), ("fp8", "fp8"), ("int4", "")})
# By format, "" for a weight in x's dtype: the stored dtype, values in a stored element.
_STORED = {"": ("", 1), "int8": ("int8", 1), "fp8": ("float8_e4m3fn", 1), "int4_halves": ("uint8", 2)}
ACTIVATIONS = ("", "silu", "relu", "gelu", "gelu_tanh")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# With more rows of x, a norm in front is a kernel of its own.
DECODE_ROWS = 64


@dataclass(frozen=True)
class Problem:
    """What a call asks for: m rows of x [m, k] times weight [n, k], the result [m, columns]; strides in elements.

    `item_bytes` are those of an element of x. `flags` name what is fused. `paired`: x, weight and the norm's weight can
    be read as pairs of bfloat16. `askable`: rows of the weight start at multiples of 16 bytes, as the instruction that
    asks for them into L2 wants. `tileable`: rows of x, a dense weight and the result do, and lie dense, as the copy
    engine wants, and its kernel knows what is fused. `format`: "" or that of a quantized weight; `stored`: its dtype;
    `activations`: what a row of x is quantized to, or ""; `row_bytes`: of a row of the weight; `group`: rows and
    columns of a scale; `grouped`: a row has several, or shares one; `zeroed`: there are zero points; `read_bytes`:
    of weight, scales, zero points and bias.
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
    format: str
    stored: str
    activations: str
    row_bytes: int
    group: tuple[int, int]
    grouped: bool
    zeroed: bool
    read_bytes: int

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
    form = str(operands.values["format"])
    stored, packed = _STORED.get(form, ("", 0))
    if not packed:
        known = ", ".join(filter(None, _STORED))
        raise ValueError(f"fused_linear has no kernel for {form} weights; formats are {known}")
    columns_held = weight.shape[-1] * packed
    if len(weight.shape) != 2 or not x.shape or x.shape[-1] != columns_held or 0 in x.shape + weight.shape:
        raise ValueError(f"fused_linear: x {list(x.shape)} and weight {list(weight.shape)} do not multiply")
    if x.dtype not in ITEM_BYTES or weight.dtype != (stored or x.dtype):
        raise ValueError(
            f"fused_linear takes {', '.join(ITEM_BYTES)} and weights of {stored or 'the same'}, "
            f"not {x.dtype} and {weight.dtype}"
        )
    if not weight.contiguous:
        raise ValueError("fused_linear: weight must be contiguous")
    activation, wide = str(operands.values["activation"]), bool(operands.values["wide"])
    n, k = weight.shape[0], columns_held
    row_bytes = k * ITEM_BYTES[x.dtype] if not form else weight.shape[1]
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
    if gain is not None and m > DECODE_ROWS and not (form and operands.values["activations"]):
        raise ValueError(f"fused_linear: no norm in front of {m} rows of x; {DECODE_ROWS} are the most")
    x_stride = _row_stride("x", x)
    group, read_bytes = _scales(operands, form, n, k)
    read_bytes += n * row_bytes + (0 if bias is None else n * ITEM_BYTES[bias.dtype])
    read = [spec for spec in (x, weight, gain) if spec is not None]
    pairs = all(spec.dtype == "bfloat16" and spec.aligned for spec in read) and k % 2 == x_stride % 2 == 0
    item = ITEM_BYTES[x.dtype]
    lined_up = x.aligned and weight.aligned and all(length * item % 16 == 0 for length in (k, x_stride, columns))
    plain = not form and (not activation or (bias is None and residual is None))
    activations = str(operands.values["activations"]) if form else ""
    notes = {
        form: form, f"{activations} activations": activations, "norm": gain, activation: activation, "bias": bias,
        "residual": residual, "wide": wide,
    }  # fmt: skip
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
        askable=weight.aligned and row_bytes % 16 == 0,
        format=form,
        stored=stored,
        activations=activations,
        row_bytes=row_bytes,
        group=group,
        grouped=form != "" and (packed > 1 or group != (1, k)),
        zeroed=operands.tensors.get("zero") is not None,
        read_bytes=read_bytes,
    )


def _scales(operands: Operands, form: str, n: int, k: int) -> tuple[tuple[int, int], int]:
    """Rows and columns of a scale of a quantized weight [n, k], and bytes of scales and zero points; checked."""
    scale, zero = operands.tensors.get("scale"), operands.tensors.get("zero")
    if not form:
        return (1, k), 0
    rows, columns = operands.values["group"]
    shape = (math.ceil(n / rows), math.ceil(k / columns))
    if scale is None or scale.shape != shape or not scale.contiguous or scale.dtype not in ITEM_BYTES:
        raise ValueError(f"fused_linear: the scale of a weight {[n, k]} in groups of {[rows, columns]} is not {scale}")
    fits = zero is None or (zero.shape == shape and zero.dtype == "uint8" and zero.contiguous)
    if not fits or (zero is not None and form != "int4_halves"):
        raise ValueError(f"fused_linear: {form} weights have no zero points {zero}")
    activations = operands.values["activations"]
    if activations and ((form, activations) not in FORMATS or (rows, columns) != (1, k)):
        raise ValueError(f"fused_linear: no kernel for {activations} activations with {form} in {[rows, columns]}")
    return (rows, columns), math.prod(shape) * (ITEM_BYTES[scale.dtype] + (zero is not None))


def _row_stride(name: str, spec: TensorSpec) -> int:
    """Elements from a row to the next when all leading dimensions are taken as one."""
    sizes = [(size, stride) for size, stride in zip(spec.shape[:-1], spec.strides[:-1]) if size != 1]
    if spec.shape[-1] != 1 and spec.strides[-1] != 1:
        raise ValueError(f"fused_linear: the last dimension of {name} must be dense, its stride is {spec.strides[-1]}")
    for (_, outer), (size, inner) in itertools.pairwise(sizes):
        if outer != size * inner:
            raise ValueError(f"fused_linear: the rows of {name}, strides {list(spec.strides)}, have no common stride")
    return sizes[-1][1] if sizes else spec.shape[-1]
