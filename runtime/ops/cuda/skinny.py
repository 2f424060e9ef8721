"""The decode kernel of `fused_linear` for up to 64 rows of x: tensor cores, the weight as the tall operand.

Quantized weights take it for more rows as well: as the tall operand they become numbers on their way from shared memory
into registers, where a matrix instruction reads them.

Where a weight has too few rows to fill the machine, several programs share a tile, each with a part of k (split-K): the
last one to arrive adds up what the others left. The RMSNorm in front is taken out of the sum as in `gemv`, or done by
`prepare` in a launch of its own, which pays when many rows would be scaled in every program again. Quantized weights
become numbers of x's dtype in registers, whole numbers exactly; a group's scales are applied to its sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear_formats import less, narrowed
from .linear_parts import added_parts, ask_rows, gated, leave_part, load, rounded, weight_rows, with_offset
from .quantize import codes_of, row_scale_of


@triton.jit
def skinny(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
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
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GROUPED: tl.constexpr,
    THREADS: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """SPLITS programs compute BLOCK_N columns of BLOCK_M rows; SPLITS divides the steps of BLOCK_K.

    AHEAD: how many stored elements of its part of the weight's rows a program asks into the L2 cache before the wait.
    FORMAT: "" or a quantized weight's, see `linear_formats`; GROUPED: scales are of groups of columns, each of whole
    steps, or of blocks of rows, not of whole rows.
    """
    if PDL:
        gdc_launch_dependents()
    GLU: tl.constexpr = ACTIVATION != ""
    ROWS: tl.constexpr = BLOCK_N * 2 if GLU else BLOCK_N
    COLUMNS: tl.constexpr = N // 2 if GLU else N
    # A step takes as many columns of each half where the weight is stored in halves; from here on, k counts in one.
    HALVES: tl.constexpr = 2 if FORMAT == "int4_halves" else 1
    LENGTH: tl.constexpr = K // HALVES
    BLOCK: tl.constexpr = BLOCK_K // HALVES
    PART: tl.constexpr = (LENGTH + BLOCK - 1) // BLOCK // SPLITS * BLOCK
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    # Neighbours share a tile of the weight.
    first = program // SPLITS // TILES_M * BLOCK_N
    origin = program % SPLITS * PART
    rows = weight_rows(first, tl.arange(0, ROWS), N, GLU, GATE_FIRST, 8)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    k = origin + tl.arange(0, BLOCK)
    if PDL:
        if EARLY and AHEAD > 0:
            LANES: tl.constexpr = max(ROWS, THREADS)
            ask_rows(weight, first, origin, AHEAD, ROWS, N, LENGTH, GLU, GATE_FIRST, 8, WIDE_OFFSETS, LANES)
        gdc_wait()
    m = tl.arange(0, BLOCK_M)
    if TILES_M > 1:
        m += program // SPLITS % TILES_M * BLOCK_M
        m = m.to(tl.int64) if WIDE_OFFSETS else m
    # Rows past the last repeat it: whatever they give is not stored, and no row sees another.
    source = weight + index[:, None] * LENGTH + k[None, :]
    x_source = x + tl.minimum(m, M - 1)[:, None] * X_STRIDE + k[None, :]
    total = tl.zeros([ROWS, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK // VECTOR], tl.float32)
    MASKED: tl.constexpr = LENGTH % BLOCK != 0
    GROUPS: tl.constexpr = (K + SCALE_COLUMNS - 1) // SCALE_COLUMNS
    # The norm's weight, scales and zero points are loaded a step ahead.
    gains: tl.tuple = ()
    scales: tl.tuple = ()
    for half in tl.static_range(HALVES):
        if HAS_GAIN:
            loaded = load(gain + half * LENGTH + k, k < LENGTH, True, "")
            gains = gains + (with_offset(loaded, gain, OFFSET, ROUND_GAIN),)  # noqa: RUF005 - Triton has no unpacking
        if GROUPED:
            at = index // SCALE_ROWS * GROUPS + (half * LENGTH + origin) // SCALE_COLUMNS
            scales = scales + (tl.load(scale + at),)  # noqa: RUF005
            if HAS_ZERO:
                scales = scales + (tl.load(zero + at),)  # noqa: RUF005
    for start in range(0, PART, BLOCK):
        inside = k + start < LENGTH
        following = k + (start + BLOCK)
        # Past the end, the last group's again.
        next_step = tl.minimum(origin + start + BLOCK, LENGTH - 1)
        tile = load(source + start, inside[None, :], MASKED, "evict_first")
        for half in tl.static_range(HALVES):
            if FORMAT == "":
                value = load(x_source + start, inside[None, :], MASKED, "")
            else:
                # Of few rows the repeated ones would be most of what is read: they are zeros.
                wanted = inside[None, :] & (m < M)[:, None]
                value = load(x_source + (half * LENGTH + start), wanted, MASKED or M % BLOCK_M != 0, "")
            if HAS_GAIN:
                wide = value.to(tl.float32)
                squares += tl.sum(tl.reshape(wide * wide, [BLOCK_M, BLOCK // VECTOR, VECTOR]), 2)
                value = (wide * gains[0][None, :]).to(x.dtype.element_ty)
                coming = load(gain + half * LENGTH + following, following < LENGTH, True, "")
                gains = gains[1:] + (with_offset(coming, gain, OFFSET, ROUND_GAIN),)  # noqa: RUF005
            numbers = tile if FORMAT == "" else narrowed(tile, FORMAT, half, HAS_ZERO, x.dtype.element_ty, PDL)
            if GROUPED:
                at = index // SCALE_ROWS * GROUPS + (half * LENGTH + next_step) // SCALE_COLUMNS
                factor = scales[0].to(tl.float32)
                scales = scales[1:] + (tl.load(scale + at),)  # noqa: RUF005
                if HAS_ZERO:
                    numbers = less(numbers, scales[0], PDL)
                    scales = scales[1:] + (tl.load(zero + at),)  # noqa: RUF005
                total += tl.dot(numbers, tl.trans(value), input_precision="ieee") * factor[:, None]
            else:
                total = tl.dot(numbers, tl.trans(value), total, input_precision="ieee")
    square = tl.sum(squares, 1)
    if SPLITS > 1:
        SIZE: tl.constexpr = ROWS * BLOCK_M
        within = tl.arange(0, BLOCK_M)
        place = tl.arange(0, ROWS)[:, None] * BLOCK_M + within[None, :]
        if HAS_GAIN:
            tl.store(partial_squares + program * BLOCK_M + within, square)
        if not leave_part(partial, arrivals, total, place, program, SIZE, SPLITS):
            return
        total = added_parts(partial, place, program, SIZE, SPLITS)
        if HAS_GAIN:
            square = added_parts(partial_squares, within, program, BLOCK_M, SPLITS)
    y = total
    if FORMAT != "" and not GROUPED:
        y *= tl.load(scale + rows).to(tl.float32)[:, None]
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
def prepare(
    x: tl.tensor,
    gain: tl.tensor,
    rows: tl.tensor,
    row_scale: tl.tensor,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_GAIN: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """RMSNorm of a row of x into a row [K] of `rows`, rounded once; BLOCK_K >= K.

    MOST: 0, or the largest number that the row is quantized to, of int8 or fp8, with a scale in `row_scale`.
    """
    if PDL:
        gdc_launch_dependents()
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    if PDL and not EARLY:
        gdc_wait()
    loaded = k
    if HAS_GAIN:
        loaded = load(gain + k, inside, BLOCK_K != K, "")
    if PDL and EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    value = load(x + row * X_STRIDE + k, inside, BLOCK_K != K, "").to(tl.float32)
    if HAS_GAIN:
        value *= tl.rsqrt(tl.sum(value * value, 0) / K + EPS)
        value *= with_offset(loaded, gain, OFFSET, ROUND_GAIN)
    if MOST > 0.0:
        value = rounded(value, x)
        scale = row_scale_of(value, MOST)
        tl.store(row_scale + row + tl.arange(0, 1), scale)
        value = codes_of(value, scale, MOST, rows.dtype.element_ty)
    tl.store(rows + row * K + k, value.to(rows.dtype.element_ty), mask=inside)
