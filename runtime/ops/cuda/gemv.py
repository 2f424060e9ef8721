"""The decode kernels of `fused_linear`: every weight is read once, as fast as memory gives it.

`gemv` serves a few rows of x: products and sums on the plain cores, a program per few rows of the weight. `skinny`
serves up to 64 rows on the tensor cores, the weight as the tall operand. Both start reading a weight that nothing
writes (EARLY) before they wait for the launch before them. The RMSNorm in front is taken out of the sum: its weight
scales x; its root mean square, summed beside the products, scales the result. So x is read once and rounded less.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear_parts import gated, load, rounded, weight_rows


@triton.jit
def _gain(
    gain: tl.tensor,
    k: tl.tensor,
    inside: tl.tensor,
    MASKED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_GAIN: tl.constexpr,
) -> tl.tensor:
    """The norm's weight at k, plus its offset, in float32."""
    g = load(gain + k, inside, MASKED, "").to(tl.float32)
    if OFFSET != 0.0:
        g += OFFSET
        if ROUND_GAIN:
            g = rounded(g, gain)
    return g


@triton.jit
def gemv(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program computes BLOCK_N columns of all M rows. VECTOR: elements in 16 bytes, what a thread loads at once."""
    if PDL:
        gdc_launch_dependents()
    GLU: tl.constexpr = ACTIVATION != ""
    ROWS: tl.constexpr = BLOCK_N * 2 if GLU else BLOCK_N
    COLUMNS: tl.constexpr = N // 2 if GLU else N
    first = tl.program_id(0) * BLOCK_N
    rows = weight_rows(first, ROWS, N, GLU, GATE_FIRST, 1)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    k = tl.arange(0, BLOCK_K)
    source = weight + index[:, None] * K + k[None, :]
    if PDL and not EARLY:
        gdc_wait()
    tile = load(source, (k < K)[None, :], K < BLOCK_K, "evict_first")
    # Partial sums for each row of x: what each thread adds up of its own vector loads. Threads meet once, at the end.
    totals = (tl.zeros([ROWS, BLOCK_K // VECTOR], tl.float32),) * M
    squares = (tl.zeros([BLOCK_K // VECTOR], tl.float32),) * M
    if PDL and EARLY:
        gdc_wait()
    for start in range(0, K, BLOCK_K):
        # The next tile is on its way while this one is used.
        after = load(source + (start + BLOCK_K), (k + (start + BLOCK_K) < K)[None, :], True, "evict_first")
        inside = k + start < K
        w = tile.to(tl.float32)
        if HAS_GAIN:
            g = _gain(gain, k + start, inside, K % BLOCK_K != 0, OFFSET, ROUND_GAIN)
        for row in tl.static_range(M):
            value = load(x + row * X_STRIDE + k + start, inside, K % BLOCK_K != 0, "").to(tl.float32)
            square = squares[0]
            if HAS_GAIN:
                square += tl.sum(tl.reshape(value * value, [BLOCK_K // VECTOR, VECTOR]), 1)
                value = value * g
            product = tl.reshape(w * value[None, :], [ROWS, BLOCK_K // VECTOR, VECTOR])
            # Tuples turn like wheels: from the front to the back, and after M rows all are in order again.
            totals = totals[1:] + (totals[0] + tl.sum(product, 2),)  # noqa: RUF005 - Triton has no unpacking here
            squares = squares[1:] + (square,)  # noqa: RUF005
        tile = after
    column = first + tl.arange(0, BLOCK_N)
    RAGGED: tl.constexpr = COLUMNS % BLOCK_N != 0
    inside = column < COLUMNS
    for row in tl.static_range(M):
        y = tl.sum(totals[row], 1)
        if HAS_GAIN:
            y *= tl.rsqrt(tl.sum(squares[row], 0) / K + EPS)
        if HAS_BIAS:
            y += tl.load(bias + rows).to(tl.float32)
        if GLU:
            gate, up = tl.split(tl.reshape(y, [BLOCK_N, 2]))
            y = gated(gate, up, out, ACTIVATION)
        if HAS_RESIDUAL:
            y = rounded(y, out) + load(residual + row * R_STRIDE + column, inside, RAGGED, "").to(tl.float32)
        tl.store(out + row * COLUMNS + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def skinny(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
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
    VECTOR: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program computes BLOCK_N columns of all M <= BLOCK_M rows.

    AHEAD: elements of each weight row asked into the L2 cache before the wait, a power of two; not more than K, but
    at least the 128 bytes of a cache line.
    """
    if PDL:
        gdc_launch_dependents()
    GLU: tl.constexpr = ACTIVATION != ""
    ROWS: tl.constexpr = BLOCK_N * 2 if GLU else BLOCK_N
    COLUMNS: tl.constexpr = N // 2 if GLU else N
    first = tl.program_id(0) * BLOCK_N
    rows = weight_rows(first, ROWS, N, GLU, GATE_FIRST, 8)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    k = tl.arange(0, BLOCK_K)
    if PDL and EARLY:
        # VECTOR elements are 16 bytes, 8 * VECTOR a cache line.
        lines = tl.arange(0, AHEAD // (8 * VECTOR)) * (8 * VECTOR)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0",
            "=r,l",
            [(weight + index[:, None] * K + lines[None, :]).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    if PDL:
        gdc_wait()
    g = tl.zeros([BLOCK_K], tl.float32)
    if HAS_GAIN:
        g = _gain(gain, k, k < K, True, OFFSET, ROUND_GAIN)
    m = tl.arange(0, BLOCK_M)
    # Rows past the last repeat it: whatever they give is not stored, and no row sees another.
    source = weight + index[:, None] * K + k[None, :]
    x_source = x + tl.minimum(m, M - 1)[:, None] * X_STRIDE + k[None, :]
    total = tl.zeros([ROWS, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K // VECTOR], tl.float32)
    MASKED: tl.constexpr = K % BLOCK_K != 0
    for start in range(0, K, BLOCK_K):
        inside = k + start < K
        tile = load(source + start, inside[None, :], MASKED, "evict_first")
        value = load(x_source + start, inside[None, :], MASKED, "")
        if HAS_GAIN:
            wide = value.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, [BLOCK_M, BLOCK_K // VECTOR, VECTOR]), 2)
            value = (wide * g[None, :]).to(x.dtype.element_ty)
            following = k + (start + BLOCK_K)
            g = _gain(gain, following, following < K, True, OFFSET, ROUND_GAIN)
        total = tl.dot(tile, tl.trans(value), total, input_precision="ieee")
    y = total
    if HAS_GAIN:
        y *= tl.rsqrt(tl.sum(squares, 1) / K + EPS)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + rows).to(tl.float32)[:, None]
    if GLU:
        halves = tl.permute(tl.reshape(y, [BLOCK_N // 8, 2, 8, BLOCK_M]), [0, 2, 3, 1])
        gate, up = tl.split(halves)
        y = tl.reshape(gated(gate, up, out, ACTIVATION), [BLOCK_N, BLOCK_M])
    column = first + tl.arange(0, BLOCK_N)
    inside = (m < M)[None, :] & (column < COLUMNS)[:, None]
    if HAS_RESIDUAL:
        added = tl.load(residual + m[None, :] * R_STRIDE + column[:, None], mask=inside, other=0.0)
        y = rounded(y, out) + added.to(tl.float32)
    tl.store(out + m[None, :] * COLUMNS + column[:, None], y.to(out.dtype.element_ty), mask=inside)
