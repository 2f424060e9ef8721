"""The decode kernel of `fused_linear` for one row of x, or a few: products and sums on the plain cores.

A program takes a few rows of the weight. What it can hold of them in registers it loads before it waits for the launch
before it, and for the programs behind it it asks for theirs into the L2 cache: so memory stays busy while all wait.
The RMSNorm in front is taken out of the sum: its weight scales x; its root mean square, summed beside the products,
scales the result. So x is read once and rounded less.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    TILES: tl.constexpr,
    AHEAD: tl.constexpr,
    WAVE: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    THREADS: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program computes BLOCK_N columns of all M rows, TILES * BLOCK_K columns of the weight at once.

    AHEAD: columns behind those that it asks for before the wait. WAVE: how many programs behind it is the one whose
    rows it asks for, 0 for none. PAIRED: bfloat16 is read in pairs; K, X_STRIDE and BLOCK_K are even. VECTOR: units,
    elements or pairs, in 16 bytes, what a thread loads at once.
    """
    if PDL:
        gdc_launch_dependents()
    GLU: tl.constexpr = ACTIVATION != ""
    ROWS: tl.constexpr = BLOCK_N * 2 if GLU else BLOCK_N
    COLUMNS: tl.constexpr = N // 2 if GLU else N
    first = tl.program_id(0) * BLOCK_N
    if PDL and EARLY:
        # Before the loads: this must not wait for what they bring.
        LANES: tl.constexpr = max(ROWS, THREADS)
        if AHEAD > 0:
            ask_rows(weight, first, TILES * BLOCK_K, AHEAD, ROWS, N, K, GLU, GATE_FIRST, 1, WIDE_OFFSETS, LANES)
        if WAVE > 0:
            ask_rows(weight, first + WAVE * BLOCK_N, 0, K, ROWS, N, K, GLU, GATE_FIRST, 1, WIDE_OFFSETS, LANES)
    # From here on, k counts units.
    UNIT: tl.constexpr = 2 if PAIRED else 1
    LENGTH: tl.constexpr = K // UNIT
    BLOCK: tl.constexpr = BLOCK_K // UNIT
    ROUND: tl.constexpr = TILES * BLOCK
    rows = weight_rows(first, tl.arange(0, ROWS), N, GLU, GATE_FIRST, 1)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    k = tl.arange(0, BLOCK)
    source = _units(weight, PAIRED) + index[:, None] * LENGTH + k[None, :]
    if PDL and not EARLY:
        gdc_wait()
    held = _tiles(source, k[None, :], 0, LENGTH, BLOCK, TILES, True, "evict_first")
    if HAS_GAIN:
        gain_source = _units(gain, PAIRED) + k
        gains = _tiles(gain_source, k, 0, LENGTH, BLOCK, TILES, True, "")
    if PDL and EARLY:
        gdc_wait()
    # Partial sums for each row of x: what each thread adds up of its own vector loads. Threads meet once, at the end.
    totals = (tl.zeros([ROWS, BLOCK // VECTOR], tl.float32),) * M
    squares = (tl.zeros([BLOCK // VECTOR], tl.float32),) * M
    for start in range(0, LENGTH, ROUND):
        if ROUND < LENGTH:
            # The next tiles are on their way while these are used.
            following = _tiles(source, k[None, :], start + ROUND, LENGTH, BLOCK, TILES, False, "evict_first")
            if HAS_GAIN:
                gains_following = _tiles(gain_source, k, start + ROUND, LENGTH, BLOCK, TILES, False, "")
        for tile in tl.static_range(TILES):
            at = start + tile * BLOCK
            inside = k + at < LENGTH
            w = _floats(held[tile], PAIRED)
            for row in tl.static_range(M):
                x_source = _units(x, PAIRED) + row * (X_STRIDE // UNIT) + at + k
                values = _floats(load(x_source, inside, LENGTH % ROUND != 0, ""), PAIRED)
                total = totals[0]
                square = squares[0]
                for part in tl.static_range(UNIT):
                    value = values[part]
                    if HAS_GAIN:
                        square += tl.sum(tl.reshape(value * value, [BLOCK // VECTOR, VECTOR]), 1)
                        value = value * with_offset(_floats(gains[tile], PAIRED)[part], gain, OFFSET, ROUND_GAIN)
                    total += tl.sum(tl.reshape(w[part] * value[None, :], [ROWS, BLOCK // VECTOR, VECTOR]), 2)
                # Tuples turn like wheels: from the front to the back, and after M rows all are in order again.
                totals = totals[1:] + (total,)  # noqa: RUF005
                squares = squares[1:] + (square,)  # noqa: RUF005
        if ROUND < LENGTH:
            held = following
            if HAS_GAIN:
                gains = gains_following
    column = first + tl.arange(0, BLOCK_N)
    RAGGED: tl.constexpr = COLUMNS % BLOCK_N != 0
    inside_columns = column < COLUMNS
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
            added = load(residual + row * R_STRIDE + column, inside_columns, RAGGED, "")
            y = rounded(y, out) + added.to(tl.float32)
        tl.store(out + row * COLUMNS + column, y.to(out.dtype.element_ty), mask=inside_columns)
