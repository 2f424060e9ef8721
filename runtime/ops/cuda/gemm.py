"""The prefill kernel of `fused_linear`: a tiled product on the tensor cores, more rows of x than a decode step has.

Tiles are walked in groups of rows, so that the programs that run at the same time share their operands in the L2
cache. Loads are pipelined by Triton (cp.async, `num_stages` tiles deep) and feed the warp groups' matrix instructions.
Where tiles are too few to fill the machine, several programs share one, each with a part of k, as in `skinny`. Where x
is quantized (`prepare`), so is the weight: products of numbers of a byte, scaled at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear_parts import added_parts, gated, leave_part, load, rounded, weight_rows


@triton.jit
def gemm(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    row_scale: tl.tensor,
    partial: tl.tensor,
    arrivals: tl.tensor,
    out: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    R_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """SPLITS programs compute a tile of BLOCK_M rows and, of the weight, BLOCK_N rows: half as many columns when gated.

    SPLITS divides the steps of BLOCK_K. FORMAT: "", or that of x and the weight, "int8" or "fp8": then a row of the
    weight has a scale, and so has a row of x.
    """
    if PDL:
        gdc_launch_dependents()
    GLU: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GLU else BLOCK_N
    COLUMNS: tl.constexpr = N // 2 if GLU else N
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    PART: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K // SPLITS * BLOCK_K
    program = tl.program_id(0)
    tile_index = program // SPLITS
    group = tile_index // (GROUP * TILES_N)
    height = min(TILES_M - group * GROUP, GROUP)
    within = tile_index % (GROUP * TILES_N)
    first_m = (group * GROUP + within % height) * BLOCK_M
    first_n = within // height * WIDTH

    m = first_m + tl.arange(0, BLOCK_M)
    m = m.to(tl.int64) if WIDE_OFFSETS else m
    rows = weight_rows(first_n, tl.arange(0, BLOCK_N), N, GLU, GATE_FIRST, 1)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    k = program % SPLITS * PART + tl.arange(0, BLOCK_K)
    # Rows past the last repeat it: whatever they give is not stored, and no row sees another.
    x_source = x + tl.minimum(m, M - 1)[:, None] * X_STRIDE + k[None, :]
    source = weight + index[:, None] * K + k[None, :]
    if PDL:
        gdc_wait()
    SUM: tl.constexpr = tl.int32 if FORMAT == "int8" else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for start in range(0, PART, BLOCK_K):
        inside = (k + start < K)[None, :]
        value = load(x_source + start, inside, K % BLOCK_K != 0, "")
        tile = load(source + start, inside, K % BLOCK_K != 0, "")
        total = tl.dot(value, tl.trans(tile), total, input_precision="ieee", out_dtype=SUM)
    total = total.to(tl.float32)
    if SPLITS > 1:
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        if not leave_part(partial, arrivals, total, place, program, BLOCK_M * BLOCK_N, SPLITS):
            return
        total = added_parts(partial, place, program, BLOCK_M * BLOCK_N, SPLITS)
    y = total
    if FORMAT != "":
        y *= tl.load(row_scale + tl.minimum(m, M - 1))[:, None] * tl.load(scale + rows).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + rows).to(tl.float32)[None, :]
    if GLU:
        gate, up = tl.split(tl.reshape(y, [BLOCK_M, WIDTH, 2]))
        y = gated(gate, up, out, ACTIVATION)
    column = first_n + tl.arange(0, WIDTH)
    inside = (m < M)[:, None] & (column < COLUMNS)[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + m[:, None] * R_STRIDE + column[None, :], mask=inside, other=0.0)
        y = rounded(y, out) + added.to(tl.float32)
    tl.store(out + m[:, None] * COLUMNS + column[None, :], y.to(out.dtype.element_ty), mask=inside)
