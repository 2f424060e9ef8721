"""The decode kernel of `fused_linear` for one row of x, or a few: products and sums on the plain cores.

A program takes a few rows of the weight. What it can hold of them in registers it loads before it waits for the launch
before it, and for the programs behind it it asks for theirs into the L2 cache: so memory stays busy while all wait.
The RMSNorm in front is taken out of the sum: its weight scales x; its root mean square, summed beside the products,
scales the result. So x is read once and rounded less. Quantized weights become numbers in registers; a scale per row is
applied to the sum, scales of groups to what each thread sums of one group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear_formats import base_of, expanded, scale_of, scale_tiles, zero_of
from .linear_parts import ask_rows, gated, load, rounded, weight_rows, with_offset


@triton.jit
def _units(pointer: tl.tensor, PAIRED: tl.constexpr) -> tl.tensor:
    """The pointer as one to pairs of bfloat16, if wanted."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True) if PAIRED else pointer


@triton.jit
def _floats(units: tl.tensor, PAIRED: tl.constexpr) -> tl.tuple:
    """Units in float32; of pairs, the first ones and the second ones: an instruction each, where a cast takes two."""
    if PAIRED:
        return (units << 16).to(tl.float32, bitcast=True), (units & -65536).to(tl.float32, bitcast=True)
    else:
        return (units.to(tl.float32),)


@triton.jit
def _tiles(
    source: tl.tensor,
    k: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    IS_FIRST: tl.constexpr,
    EVICTION: tl.constexpr,
) -> tl.tuple:
    """TILES loads side by side from column `start` on, zero past K. `k` lies along the source's last dimension."""
    found: tl.tuple = ()
    for tile in tl.static_range(TILES):
        at = start + tile * BLOCK_K
        value = load(source + at, k + at < K, not IS_FIRST or (tile + 1) * BLOCK_K > K, EVICTION)
        found = found + (value,)  # noqa: RUF005 - Triton has no unpacking here
    return found


@triton.jit
def _x_values(
    x: tl.tensor, k: tl.tensor, inside: tl.tensor, MASKED: tl.constexpr, PAIRED: tl.constexpr, HALF: tl.constexpr
) -> tl.tuple:
    """A tile of x in float32, parts as those of the weight: one, those of pairs, or of both halves of k."""
    if HALF > 0:
        return (
            load(x + k, inside, MASKED, "").to(tl.float32),
            load(x + HALF + k, inside, MASKED, "").to(tl.float32),
        )
    else:
        return _floats(load(_units(x, PAIRED) + k, inside, MASKED, ""), PAIRED)


@triton.jit
def _added(
    totals: tl.tuple,
    squares: tl.tuple,
    held: tl.tuple,
    gains: tl.tuple,
    scales: tl.tuple,
    x: tl.tensor,
    gain: tl.tensor,
    k: tl.tensor,
    start: tl.tensor,
    M: tl.constexpr,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_GAIN: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    PAIRED: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUPED: tl.constexpr,
    RAISED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PDL: tl.constexpr,
) -> tl.tuple:
    """The sums of all M rows, and of their squares, after the tiles `held` of the weight from unit `start` on."""
    UNIT: tl.constexpr = K // LENGTH
    HALF: tl.constexpr = LENGTH if FORMAT == "int4_halves" else 0
    for tile in tl.static_range(TILES):
        at = start + tile * BLOCK
        inside = k + at < LENGTH
        w = expanded(held[tile], FORMAT, RAISED, PDL) if FORMAT != "" else _floats(held[tile], PAIRED)
        for row in tl.static_range(M):
            values = _x_values(x + row * X_STRIDE, at + k, inside, LENGTH % (TILES * BLOCK) != 0, PAIRED, HALF)
            total = totals[0]
            square = squares[0]
            for part in tl.static_range(UNIT):
                value = values[part]
                if HAS_GAIN:
                    square += tl.sum(tl.reshape(value * value, [BLOCK // VECTOR, VECTOR]), 1)
                    g = gains[part * TILES + tile].to(tl.float32) if HALF > 0 else _floats(gains[tile], PAIRED)[part]
                    value = value * with_offset(g, gain, OFFSET, ROUND_GAIN)
                products = tl.sum(tl.reshape(w[part] * value[None, :], [ROWS, BLOCK // VECTOR, VECTOR]), 2)
                if RAISED:
                    above = base_of(FORMAT, part)
                    if HALF > 0:
                        above += zero_of(scales, part, tile, TILES, HAS_ZERO)
                    products -= tl.sum(tl.reshape(value, [BLOCK // VECTOR, VECTOR]), 1)[None, :] * above
                if GROUPED:
                    products *= scale_of(scales, part, tile, TILES)
                total += products
            # Tuples turn like wheels: from the front to the back, and after M rows all are in order again.
            totals = totals[1:] + (total,)  # noqa: RUF005
            squares = squares[1:] + (square,)  # noqa: RUF005
    return totals, squares


@triton.jit
def gemv(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
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
    TILES: tl.constexpr,
    AHEAD: tl.constexpr,
    WAVE: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    THREADS: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program computes BLOCK_N columns of all M rows, TILES * BLOCK_K columns of the weight at once.

    AHEAD: stored elements behind those that it asks for before the wait. WAVE: how many programs behind it is the one
    whose rows it asks for, 0 for none. PAIRED: bfloat16 is read in pairs; K, X_STRIDE and BLOCK_K are even. VECTOR:
    units, elements or pairs, what a thread loads at once, 16 bytes or fewer; of one group of scales. FORMAT: "" or a
    quantized weight's, see `linear_formats`; scale and zero [N / SCALE_ROWS, K / SCALE_COLUMNS], rounded up.
    """
    if PDL:
        gdc_launch_dependents()
    GLU: tl.constexpr = ACTIVATION != ""
    HALVES: tl.constexpr = FORMAT == "int4_halves"
    ROWS: tl.constexpr = BLOCK_N * 2 if GLU else BLOCK_N
    COLUMNS: tl.constexpr = N // 2 if GLU else N
    first = tl.program_id(0) * BLOCK_N
    if PDL and EARLY:
        # Before the loads: this must not wait for what they bring.
        LANES: tl.constexpr = max(ROWS, THREADS)
        STORED: tl.constexpr = K // 2 if HALVES else K
        HELD: tl.constexpr = TILES * BLOCK_K // 2 if HALVES else TILES * BLOCK_K
        if AHEAD > 0:
            ask_rows(weight, first, HELD, AHEAD, ROWS, N, STORED, GLU, GATE_FIRST, 1, WIDE_OFFSETS, LANES)
        if WAVE > 0:
            ask_rows(
                weight, first + WAVE * BLOCK_N, 0, STORED, ROWS, N, STORED, GLU, GATE_FIRST, 1, WIDE_OFFSETS, LANES
            )
    # From here on, k counts units.
    UNIT: tl.constexpr = 2 if PAIRED or HALVES else 1
    LENGTH: tl.constexpr = K // UNIT
    BLOCK: tl.constexpr = BLOCK_K // UNIT
    ROUND: tl.constexpr = TILES * BLOCK
    HALF: tl.constexpr = LENGTH if HALVES else 0
    # Sums with float32 are kept as exact as they were.
    RAISED: tl.constexpr = HALVES or (FORMAT == "int8" and x.dtype.element_ty != tl.float32)
    GROUPED: tl.constexpr = FORMAT != "" and (HALVES or SCALE_ROWS > 1 or SCALE_COLUMNS < K)
    rows = weight_rows(first, tl.arange(0, ROWS), N, GLU, GATE_FIRST, 1)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    k = tl.arange(0, BLOCK)
    # With fewer than 16 bytes a thread, its columns are those that it loads of x.
    w_k = tl.max_contiguous(k, VECTOR) if FORMAT != "" else k
    source = _units(weight, PAIRED) + index[:, None] * LENGTH + w_k[None, :]
    GROUPS: tl.constexpr = (K + SCALE_COLUMNS - 1) // SCALE_COLUMNS
    group_k = tl.arange(0, BLOCK // VECTOR) * VECTOR
    group_row = index // SCALE_ROWS * GROUPS
    if PDL and not EARLY:
        gdc_wait()
    held = _tiles(source, k[None, :], 0, LENGTH, BLOCK, TILES, True, "evict_first")
    scales: tl.tuple = ()
    gains: tl.tuple = ()
    if GROUPED:
        scales = scale_tiles(
            scale, zero, group_row, group_k, 0, LENGTH, BLOCK, TILES, SCALE_COLUMNS, HALF, HAS_ZERO, True
        )
    if HAS_GAIN:
        gain_source = _units(gain, PAIRED) + k
        gains = _tiles(gain_source, k, 0, LENGTH, BLOCK, TILES, True, "")
        if HALVES:
            gains += _tiles(gain_source + HALF, k, 0, LENGTH, BLOCK, TILES, True, "")
    if PDL and EARLY:
        gdc_wait()
    # Partial sums for each row of x: what each thread adds up of its own vector loads. Threads meet once, at the end.
    totals = (tl.zeros([ROWS, BLOCK // VECTOR], tl.float32),) * M
    squares = (tl.zeros([BLOCK // VECTOR], tl.float32),) * M
    if FORMAT == "":
        for start in range(0, LENGTH, ROUND):
            if ROUND < LENGTH:
                # The next tiles are on their way while these are used.
                following = _tiles(source, k[None, :], start + ROUND, LENGTH, BLOCK, TILES, False, "evict_first")
                if HAS_GAIN:
                    gains_following = _tiles(gain_source, k, start + ROUND, LENGTH, BLOCK, TILES, False, "")
            totals, squares = _added(
                totals, squares, held, gains, scales, x, gain, k, start, M, K, LENGTH, BLOCK, TILES, ROWS, VECTOR,
                X_STRIDE, OFFSET, ROUND_GAIN, HAS_GAIN, PAIRED, FORMAT, GROUPED, RAISED, HAS_ZERO, PDL,
            )  # fmt: skip
            if ROUND < LENGTH:
                held = following
                if HAS_GAIN:
                    gains = gains_following
    else:
        totals, squares = _added(
            totals, squares, held, gains, scales, x, gain, k, 0, M, K, LENGTH, BLOCK, TILES, ROWS, VECTOR, X_STRIDE,
            OFFSET, ROUND_GAIN, HAS_GAIN, PAIRED, FORMAT, GROUPED, RAISED, HAS_ZERO, PDL,
        )  # fmt: skip
        # Bytes that go from one turn of a loop to the next would be taken apart: other programs keep memory busy.
        for start in range(ROUND, LENGTH, ROUND):
            held = _tiles(source, k[None, :], start, LENGTH, BLOCK, TILES, LENGTH % ROUND == 0, "evict_first")
            if GROUPED:
                scales = scale_tiles(
                    scale, zero, group_row, group_k, start, LENGTH, BLOCK, TILES, SCALE_COLUMNS, HALF, HAS_ZERO,
                    LENGTH % ROUND == 0,
                )  # fmt: skip
            if HAS_GAIN:
                gains = _tiles(gain_source, k, start, LENGTH, BLOCK, TILES, LENGTH % ROUND == 0, "")
                if HALVES:
                    gains += _tiles(gain_source + HALF, k, start, LENGTH, BLOCK, TILES, LENGTH % ROUND == 0, "")
            totals, squares = _added(
                totals, squares, held, gains, scales, x, gain, k, start, M, K, LENGTH, BLOCK, TILES, ROWS, VECTOR,
                X_STRIDE, OFFSET, ROUND_GAIN, HAS_GAIN, PAIRED, FORMAT, GROUPED, RAISED, HAS_ZERO, PDL,
            )  # fmt: skip
    column = first + tl.arange(0, BLOCK_N)
    RAGGED: tl.constexpr = COLUMNS % BLOCK_N != 0
    inside_columns = column < COLUMNS
    for row in tl.static_range(M):
        y = tl.sum(totals[row], 1)
        if HAS_GAIN:
            y *= tl.rsqrt(tl.sum(squares[row], 0) / K + EPS)
        if FORMAT != "" and not GROUPED:
            y *= tl.load(scale + rows).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + rows).to(tl.float32)
        if GLU:
            gate, up = tl.split(tl.reshape(y, [BLOCK_N, 2]))
            y = gated(gate, up, out, ACTIVATION)
        if HAS_RESIDUAL:
            added = load(residual + row * R_STRIDE + column, inside_columns, RAGGED, "")
            y = rounded(y, out) + added.to(tl.float32)
        tl.store(out + row * COLUMNS + column, y.to(out.dtype.element_ty), mask=inside_columns)
