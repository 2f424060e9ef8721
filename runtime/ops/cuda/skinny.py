"""The decode kernel of `fused_linear` for up to 64 rows of x: tensor cores, the weight as the tall operand.

Where a weight has too few rows to fill the machine, several programs share a tile, each with a part of k (split-K): the
last one to arrive adds up what the others left. The RMSNorm in front is taken out of the sum as in `gemv`, or done by
`normalize` in a launch of its own, which pays when many rows would be scaled in every program again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear_parts import added_parts, ask_rows, gated, leave_part, load, rounded, weight_rows, with_offset


@triton.jit
def skinny(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
    partial: tl.tensor,
    partial_squares: tl.tensor,
    arrivals: tl.tensor,
    out: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    R_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    VECTOR: tl.constexpr,
    THREADS: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """SPLITS programs compute BLOCK_N columns of all M <= BLOCK_M rows; SPLITS divides the steps of BLOCK_K.

    AHEAD: how many columns of its part of the weight a program asks into the L2 cache before the wait.
    """
    if PDL:
        gdc_launch_dependents()
    GLU: tl.constexpr = ACTIVATION != ""
    ROWS: tl.constexpr = BLOCK_N * 2 if GLU else BLOCK_N
    COLUMNS: tl.constexpr = N // 2 if GLU else N
    PART: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K // SPLITS * BLOCK_K
    program = tl.program_id(0)
    first = program // SPLITS * BLOCK_N
    origin = program % SPLITS * PART
    rows = weight_rows(first, tl.arange(0, ROWS), N, GLU, GATE_FIRST, 8)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    k = origin + tl.arange(0, BLOCK_K)
    if PDL:
        if EARLY and AHEAD > 0:
            LANES: tl.constexpr = max(ROWS, THREADS)
            ask_rows(weight, first, origin, AHEAD, ROWS, N, K, GLU, GATE_FIRST, 8, WIDE_OFFSETS, LANES)
        gdc_wait()
    g = tl.zeros([BLOCK_K], tl.float32)
    if HAS_GAIN:
        g = with_offset(load(gain + k, k < K, True, ""), gain, OFFSET, ROUND_GAIN)
    m = tl.arange(0, BLOCK_M)
    # Rows past the last repeat it: whatever they give is not stored, and no row sees another.
    source = weight + index[:, None] * K + k[None, :]
    x_source = x + tl.minimum(m, M - 1)[:, None] * X_STRIDE + k[None, :]
    total = tl.zeros([ROWS, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K // VECTOR], tl.float32)
    MASKED: tl.constexpr = K % BLOCK_K != 0
    for start in range(0, PART, BLOCK_K):
        inside = k + start < K
        tile = load(source + start, inside[None, :], MASKED, "evict_first")
        value = load(x_source + start, inside[None, :], MASKED, "")
        if HAS_GAIN:
            wide = value.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, [BLOCK_M, BLOCK_K // VECTOR, VECTOR]), 2)
            value = (wide * g[None, :]).to(x.dtype.element_ty)
            following = k + (start + BLOCK_K)
            g = with_offset(load(gain + following, following < K, True, ""), gain, OFFSET, ROUND_GAIN)
        total = tl.dot(tile, tl.trans(value), total, input_precision="ieee")
    square = tl.sum(squares, 1)
    if SPLITS > 1:
        SIZE: tl.constexpr = ROWS * BLOCK_M
        place = tl.arange(0, ROWS)[:, None] * BLOCK_M + m[None, :]
        if HAS_GAIN:
            tl.store(partial_squares + program * BLOCK_M + m, square)
        if not leave_part(partial, arrivals, total, place, program, SIZE, SPLITS):
            return
        total = added_parts(partial, place, program, SIZE, SPLITS)
        if HAS_GAIN:
            square = added_parts(partial_squares, m, program, BLOCK_M, SPLITS)
    y = total
    if HAS_GAIN:
        y *= tl.rsqrt(square / K + EPS)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + rows).to(tl.float32)[:, None]
    if GLU:
        halves = tl.permute(tl.reshape(y, [BLOCK_N // 8, 2, 8, BLOCK_M]), [0, 2, 3, 1])
        gate, up = tl.split(halves)
        y = tl.reshape(gated(gate, up, out, ACTIVATION), [BLOCK_N, BLOCK_M])
    column = first + tl.arange(0, BLOCK_N)
    inside_out = (m < M)[None, :] & (column < COLUMNS)[:, None]
    if HAS_RESIDUAL:
        added = tl.load(residual + m[None, :] * R_STRIDE + column[:, None], mask=inside_out, other=0.0)
        y = rounded(y, out) + added.to(tl.float32)
    tl.store(out + m[None, :] * COLUMNS + column[:, None], y.to(out.dtype.element_ty), mask=inside_out)


@triton.jit
def normalize(
    x: tl.tensor,
    gain: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_GAIN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """RMSNorm of a row of x into a row [K] of `rows`, rounded once; BLOCK_K >= K."""
    if PDL:
        gdc_launch_dependents()
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    if PDL and not EARLY:
        gdc_wait()
    loaded = load(gain + k, inside, BLOCK_K != K, "")
    if PDL and EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    value = load(x + row * X_STRIDE + k, inside, BLOCK_K != K, "").to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / K + EPS)
    value *= with_offset(loaded, gain, OFFSET, ROUND_GAIN)
    tl.store(rows + row * K + k, value.to(rows.dtype.element_ty), mask=inside)
