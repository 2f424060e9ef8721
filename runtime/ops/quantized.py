"""Quantized weights in plain PyTorch: what each format's bytes mean, and the products and look-ups made of them.

The oracle of every kernel that reads such weights. A weight [n, k] is its values, a scale for each block of `group` =
[rows, columns] and, for int4, perhaps a zero point for each block; element = (value - zero) * scale.

| format | weight | scale [ceil(n / rows), ceil(k / columns)] | zero |
| --- | --- | --- | --- |
| int8 | int8 [n, k] | float32 | none |
| int4 | uint8 [n, k / 2], the even column in the low nibble | float16, bfloat16 or float32 | uint8, or none: 8 |
| fp8 | float8_e4m3fn [n, k] | float32 | none |
| int4_halves | uint8 [n, k / 2], columns j and k / 2 + j in the low and high nibble of byte j | as int4 | as int4 |
| mxfp4 | uint8 [n, k / 2], nibbles of 1, 2 and 1 bits (e2m1) | uint8, the exponent (e8m0) | none |
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "int4_halves", "fp8", "mxfp4")
PACKED = ("int4", "int4_halves", "mxfp4")
INT8_MOST, FP8_MOST = 127.0, 448.0
_NO_ZERO = 8


def pack_nibbles(values: Tensor) -> Tensor:
    """Values 0..15 of [..., k], k even, as uint8 [..., k / 2]: the even column in the low nibble."""
    values = values.to(torch.uint8)
    return values[..., 0::2] | values[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., k / 2] as values 0..15, uint8 [..., k]."""
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 15).flatten(-2)


def in_halves(packed: Tensor) -> Tensor:
    """Nibbles [..., k / 2] of int4 in the order of int4_halves, of which a kernel can read many columns in order."""
    low, high = unpack_nibbles(packed).chunk(2, -1)
    return low | high << 4


def e2m1_values(nibbles: Tensor) -> Tensor:
    """Nibbles 0..15 as float32: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and, with the highest bit, their negatives."""
    exponent, mantissa = (nibbles >> 1) & 3, nibbles & 1
    normal = (2.0 + mantissa) * (1 << exponent.int()) / 4
    magnitude = torch.where(exponent == 0, mantissa * 0.5, normal)
    return torch.where(nibbles >= 8, -magnitude, magnitude)


def e8m0_values(bits: Tensor) -> Tensor:
    """uint8 exponents as float32 2 ** (bits - 127); 255 is NaN (OCP MX formats 1.0)."""
    wide = bits.int() << 23
    wide = torch.where(bits == 0, 1 << 22, wide)
    return torch.where(bits == 255, 0x7FC00000, wide).view(torch.float32)


def values_of(weight: Tensor, format: str) -> Tensor:
    """The stored values as float32 [..., k], without zero point and scale."""
    if format == "int4":
        return unpack_nibbles(weight).float()
    if format == "int4_halves":
        return torch.cat((weight & 15, weight >> 4), -1).float()
    if format == "mxfp4":
        return e2m1_values(unpack_nibbles(weight))
    if format in FORMATS:
        return weight.float()
    raise ValueError(f"there is no weight format {format!r}; there are {', '.join(FORMATS)}")


def dequantize_rows(weight: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int) -> Tensor:
    """Float32 rows [..., k] of stored rows, each with its own scales and zero points [..., ceil(k / columns)]."""
    values = values_of(weight, format)
    k = values.shape[-1]

    def spread(blocks: Tensor) -> Tensor:
        return blocks if blocks.shape[-1] == 1 else blocks.repeat_interleave(columns, -1)[..., :k]

    if format in ("int4", "int4_halves"):
        values = values - (_NO_ZERO if zero is None else spread(zero.float()))
    return values * spread(e8m0_values(scale) if format == "mxfp4" else scale.float())


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: list[int]) -> Tensor:
    """The float32 matrix [n, k] that a quantized weight stands for."""
    rows, columns = group

    def spread(blocks: Tensor) -> Tensor:
        return blocks if rows == 1 else blocks.repeat_interleave(rows, 0)[: weight.shape[0]]

    return dequantize_rows(weight, spread(scale), None if zero is None else spread(zero), format, columns)


def quantize_rows(x: Tensor, activations: str) -> tuple[Tensor, Tensor]:
    """Symmetric quantization of each row of x [..., k] on the fly, to "int8" or "fp8".

    Returns:
        Values as float32 [..., k], whole numbers up to 127 (ties to even) or floats of e4m3 up to 448, and scales
        float32 [..., 1]: the row's largest magnitude over 127 or 448, 1 for a row of zeros.
    """
    if activations not in ("int8", "fp8"):
        raise ValueError(f"activations are not quantized to {activations!r}; there are int8 and fp8")
    wide = x.float()
    most = INT8_MOST if activations == "int8" else FP8_MOST
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / most)
    scaled = (wide / scale).clamp(-most, most)
    return (scaled.round() if activations == "int8" else scaled.to(torch.float8_e4m3fn).float()), scale


def product(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, format: str, group: list[int],
    activations: str,
) -> Tensor:  # fmt: skip
    """`linear_quantized` before it is rounded to x's dtype: float32."""
    matrix = dequantize(weight, scale, zero, format, group).t()
    if activations:
        values, factor = quantize_rows(x, activations)
        out = torch.matmul(values, matrix) * factor
    else:
        out = torch.matmul(x.float(), matrix)
    return out if bias is None else out + bias.float()


def linear_quantized(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, format: str, group: list[int],
    activations: str,
) -> Tensor:  # fmt: skip
    """x [..., k] times a quantized weight [n, k] transposed, summed in float32, in x's dtype.

    Args:
        weight, scale, zero, format, group: see the top of this file.
        activations: "" takes x as it is, "int8" or "fp8" quantizes each row of it first (see `quantize_rows`).
    """
    return product(x, weight, scale, zero, bias, format, group, activations).to(x.dtype)


def embedding_quantized(
    ids: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, like: Tensor, format: str, group: list[int]
) -> Tensor:
    """Rows `ids` of a quantized weight [n, k]: [..., k]; the dtype is that of `like`, an empty tensor."""
    rows, columns = group
    block = ids if rows == 1 else ids // rows
    # float8 tensors cannot be indexed everywhere, their bytes can.
    picked = weight.view(torch.uint8)[ids].view(weight.dtype)
    zeros = None if zero is None else zero[block]
    return dequantize_rows(picked, scale[block], zeros, format, columns).to(like.dtype)
