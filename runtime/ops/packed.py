"""Weights packed into panels for the CPU: the layout, and what the ops over it mean.

64 rows of a weight [n, k] lie side by side, so that a step of k is one run of memory: 32-bit words of two bfloat16,
four int8 or eight int4 of one row each (`runtime/ops/cpu/packed_formats.h` reads them). Rows are filled up with zeros
to a multiple of 64, columns to one of 8. Packing happens when an artifact is built; these functions also undo it.

| format | weight | word, from its lowest bit |
| --- | --- | --- |
| bfloat16 | bfloat16 [n / 64, k / 2, 64, 2] | k, k + 1 |
| int8 | int8 [n / 64, k / 4, 64, 4] | k to k + 3 |
| int4 | uint8 [n / 64, k / 8, 64, 4] | k, k + 2, k + 4, k + 6, k + 1, k + 3, k + 5, k + 7 |

Scales and zero points are [n / 64, groups, 64].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import quantized

PANEL, UNIT = 64, 8
PER_WORD = {"bfloat16": 2, "int8": 4, "int4": 8}
_FILL = {"bfloat16": 0, "int8": 0, "int4": 8}  # a value that stands for zero where there are no zero points


def weight_shape(format: str, rows: int, columns: int) -> tuple[int, int, int, int]:
    """The shape of a packed weight of `rows` x `columns`."""
    panels, filled = -(-rows // PANEL), -(-columns // UNIT) * UNIT
    return panels, filled // PER_WORD[format], PANEL, 2 if format == "bfloat16" else 4


def pack_weight(weight: Tensor, format: str) -> Tensor:
    """A weight in its format's own layout (see quantized.py; bfloat16 [n, k]) as panels."""
    values = quantized.unpack_nibbles(weight) if format == "int4" else weight
    rows, columns = values.shape
    panels, steps, _, _ = weight_shape(format, rows, columns)
    per_word = PER_WORD[format]
    values = pad(values, (0, steps * per_word - columns, 0, panels * PANEL - rows), value=_FILL[format])
    words = values.reshape(panels, PANEL, steps, per_word).transpose(1, 2).contiguous()
    if format != "int4":
        return words
    words = words.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    return quantized.pack_nibbles(words)


def pack_groups(numbers: Tensor) -> Tensor:
    """Scales or zero points [n, groups] as [n / 64, groups, 64]; of rows that are none, 0."""
    rows, groups = numbers.shape
    panels = -(-rows // PANEL)
    return pad(numbers, (0, 0, 0, panels * PANEL - rows)).reshape(panels, PANEL, groups).transpose(1, 2).contiguous()


def _row_values(words: Tensor, format: str) -> Tensor:
    """Words [..., k / per word, 2 or 4] of some rows as numbers of the format [..., k]."""
    if format == "int4":
        words = quantized.unpack_nibbles(words).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    return words.flatten(-2)


def _rows(weight: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, group: int, ids: Tensor) -> Tensor:
    """Float32 rows `ids` [...] of a packed weight, with the columns that fill it up: [..., k]."""
    panel, row = ids // PANEL, ids % PANEL
    values = _row_values(weight[panel, :, row], format).float()

    def spread(numbers: Tensor) -> Tensor:
        mine = numbers[panel, :, row].float()
        return mine if mine.shape[-1] == 1 else mine.repeat_interleave(group, -1)[..., : values.shape[-1]]

    if format == "int4":
        values = values - (_FILL["int4"] if zero is None else spread(zero))
    return values if scale is None else values * spread(scale)


def linear_packed(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, rows: int, format: str,
    group: int, activations: str,
) -> Tensor:  # fmt: skip
    """x [..., k] times a packed weight [rows, k] transposed, summed in float32, in x's dtype.

    Args:
        scale, zero: [n / 64, groups, 64] or None; a scale belongs to `group` columns, 0: to a whole row.
        activations: "" takes x as it is, "int8" quantizes each row of it first (see quantized.quantize_rows).
    """
    matrix = _rows(weight, scale, zero, format, group, torch.arange(rows, device=x.device))[:, : x.shape[-1]]
    if activations:
        values, factor = quantized.quantize_rows(x, activations)
        out = torch.matmul(values, matrix.t()) * factor
    else:
        out = torch.matmul(x.float(), matrix.t())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def embedding_packed(
    ids: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, like: Tensor, columns: int, format: str,
    group: int,
) -> Tensor:  # fmt: skip
    """Rows `ids` of a packed weight with `columns` columns: [..., columns]; the dtype is that of `like`."""
    return _rows(weight, scale, zero, format, group, ids)[..., :columns].to(like.dtype)
