"""The prefill kernel of `fused_linear` for Hopper: persistent programs whose tiles come through the copy engine (TMA).

As many programs as multiprocessors take tile after tile; the loads of the next tile are under way while the last one's
epilogue runs. Tensor descriptors are made on the device, before the program waits for the launch before it,
in memory that no other launch touches.

A gated activation is a launch of its own behind it, `activate_product`: gate and up side by side in a tile would be two
products of half its width, which cost more than the pass over the result does.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear_parts import gated, rounded


@triton.jit
def _store(
    y: tl.tensor,
    first_m: tl.tensor,
    first_n: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    target: tl.tensor,
    out: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    R_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """Part of a tile, float32 [BLOCK_M, WIDTH] from (first_m, first_n) on, with bias and residual, through `target`."""
    column = first_n + tl.arange(0, y.shape[1])
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        m = first_m + tl.arange(0, y.shape[0])
        inside = (m < M)[:, None] & (column < N)[None, :]
        added = tl.load(residual + m.to(tl.int64)[:, None] * R_STRIDE + column[None, :], mask=inside, other=0.0)
        y = rounded(y, out) + added.to(tl.float32)
    target.store([first_m, first_n], y.to(out.dtype.element_ty))


@triton.jit
def tma_gemm(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    R_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """PROGRAMS programs share all tiles of BLOCK_M rows of x and BLOCK_N rows of the weight.

    Tiles are walked in groups of GROUP tiles along M. Whatever lies past an edge is read as zero and not stored.
    """
    if PDL:
        gdc_launch_dependents()
    HALF: tl.constexpr = BLOCK_N // 2
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows = tl.make_tensor_descriptor(x, [M, K], [X_STRIDE, 1], [BLOCK_M, BLOCK_K])
    tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    target = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, HALF])
    if PDL:
        gdc_wait()
    for tile in tl.range(tl.program_id(0), TILES_M * TILES_N, PROGRAMS, flatten=True):
        group = tile // (GROUP * TILES_N)
        height = min(TILES_M - group * GROUP, GROUP)
        within = tile % (GROUP * TILES_N)
        first_m = (group * GROUP + within % height) * BLOCK_M
        first_n = within // height * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            total = tl.dot(rows.load([first_m, k]), tiles.load([first_n, k]).T, total)
        # In two halves: the store's buffer takes half the shared memory.
        left, right = tl.split(tl.permute(tl.reshape(total, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        _store(left, first_m, first_n, bias, residual, target, out, M, N, R_STRIDE, HAS_BIAS, HAS_RESIDUAL)
        _store(right, first_m, first_n + HALF, bias, residual, target, out, M, N, R_STRIDE, HAS_BIAS,
               HAS_RESIDUAL)  # fmt: skip


@triton.jit
def activate_product(
    product: tl.tensor,
    out: tl.tensor,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """out [M, COLUMNS] = act(gate) * up, halves of product's rows [2 * COLUMNS]; a program takes BLOCK of one row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    first = tl.load(product + row * 2 * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(product + row * 2 * COLUMNS + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    gate, up = (first, second) if GATE_FIRST else (second, first)
    y = gated(gate, up, out, ACTIVATION)
    tl.store(out + row * COLUMNS + column, y.to(out.dtype.element_ty), mask=inside)
