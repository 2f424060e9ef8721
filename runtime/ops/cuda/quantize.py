"""Rows quantized on the fly, as `quantized.quantize_rows` says: activations, and what a quantized KV cache takes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_scale_of(x: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """The scales [..., 1] of rows [..., K] of float32: the largest magnitude over MOST, 1 for zeros; NaN where x is."""
    axis: tl.constexpr = len(x.shape) - 1
    largest = tl.max(tl.abs(x), axis, keep_dims=True)
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, MOST))
    # A row that holds NaN or an infinity is NaN.
    return scale + 0.0 * tl.sum(x, axis, keep_dims=True)


@triton.jit
def codes_of(x: tl.tensor, scale: tl.tensor, MOST: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """x over its scales, in int8 or float8, to the nearest."""
    value = tl.minimum(tl.maximum(tl.div_rn(x, tl.broadcast_to(scale, x.shape)), -MOST), MOST)
    WHOLE: tl.constexpr = DTYPE == tl.int8  # noqa: SIM300
    if WHOLE:
        # Ties go to even: 1.5 * 2**23 leaves no room for fractions.
        value = (value + 12582912.0) - 12582912.0
    return value.to(DTYPE)
