"""The Triton kernel of paged attention for many queries of a row: FlashAttention-2 (Dao 2023) over a block table.

Every program takes a tile of queries of one head and walks over the keys that any of them sees. Only the tiles at the
diagonal and at the window's edge are masked; those between are seen by all queries of the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_parts import LOG2E, capped, tile_scales
from .linear_formats import narrowed


@triton.jit
def _attend(
    queries: tl.tensor,
    position: tl.tensor,
    k_heads: tl.tensor,
    v_heads: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    table: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    MASKED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_CACHE_STRIDES: tl.constexpr,
    V_CACHE_STRIDES: tl.constexpr,
    SCALE_STRIDES: tl.constexpr,
    CACHE: tl.constexpr,
    PDL: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """The online softmax continued over the tokens [low, high); without MASKED all queries must see all of them."""
    d = tl.arange(0, DIM_PADDED)[None, :]
    e = tl.arange(0, V_DIM_PADDED)[None, :]
    # exp2 takes scores times FACTOR; the soft cap has applied it already.
    FACTOR: tl.constexpr = 1.0 if SOFTCAP != 0.0 else SCALE * LOG2E
    # As in `decode_kernel`, the table is read one tile ahead so that it does not take part in the pipeline.
    t = low + tl.arange(0, KEYS)
    coming = tl.load(table + t // BLOCK_SIZE * TABLE_STRIDE, mask=t < high, other=0)
    for first in tl.range(low, high, KEYS):
        block = coming.to(tl.int64)
        t = first + tl.arange(0, KEYS)
        ahead = t + KEYS
        coming = tl.load(table + ahead // BLOCK_SIZE * TABLE_STRIDE, mask=ahead < high, other=0)
        k_slots = block * K_CACHE_STRIDES[0] + t % BLOCK_SIZE * K_CACHE_STRIDES[1]
        v_slots = block * V_CACHE_STRIDES[0] + t % BLOCK_SIZE * V_CACHE_STRIDES[1]
        k_seen, v_seen = d < DIM, e < V_DIM
        if MASKED:
            # Masked rows are zeros, not what lies there: 0 * NaN would be NaN.
            k_seen, v_seen = k_seen & (t < high)[:, None], v_seen & (t < high)[:, None]
        keys = tl.load(k_heads + k_slots[:, None] + d * K_CACHE_STRIDES[3], mask=k_seen, other=0.0)
        values = tl.load(v_heads + v_slots[:, None] + e * V_CACHE_STRIDES[3], mask=v_seen, other=0.0)
        if CACHE != "":
            keys = narrowed(keys, CACHE, 0, False, queries.dtype, PDL)
            values = narrowed(values, CACHE, 0, False, queries.dtype, PDL)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if CACHE != "":
            scores *= tile_scales(k_scales, block, t, high, SCALE_STRIDES, BLOCK_SIZE, CACHE)[None, :]
        if SOFTCAP != 0.0:
            scores = capped(scores, SCALE, SOFTCAP)
        if MASKED:
            visible = t[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (t[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * FACTOR)
        # A query that has seen nothing yet must not compute inf - inf.
        level = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        kept = tl.exp2(top - level)
        weights = tl.exp2(scores * FACTOR - level[:, None])
        total = total * kept + tl.sum(weights, 1)
        if CACHE != "":
            weights *= tile_scales(v_scales, block, t, high, SCALE_STRIDES, BLOCK_SIZE, CACHE)[None, :]
        acc = tl.dot(weights.to(values.dtype), values, acc * kept[:, None], input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit
def prefill_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    block_tables: tl.tensor,
    positions: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    Q_STRIDES: tl.constexpr,
    K_CACHE_STRIDES: tl.constexpr,
    V_CACHE_STRIDES: tl.constexpr,
    SCALE_STRIDES: tl.constexpr,
    CACHE: tl.constexpr,
    TABLE_STRIDES: tl.constexpr,
    POSITION_STRIDES: tl.constexpr,
    SINK_STRIDE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One tile of QUERIES queries of one head of one row; see `paged_attention.lower`."""
    head, row = tl.program_id(0), tl.program_id(2)
    # The last queries see most: their programs start first, so that short ones fill the gaps at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tile * QUERIES + tl.arange(0, QUERIES)
    inside = m < LENGTH
    position = tl.load(positions + row * POSITION_STRIDES[0] + m * POSITION_STRIDES[1], mask=inside, other=-1)
    position = position.to(tl.int32)
    newest = tl.max(position, 0)
    oldest = tl.min(tl.where(position >= 0, position, CAPACITY), 0)
    d = tl.arange(0, DIM_PADDED)[None, :]
    q_rows = q + row * Q_STRIDES[0] + head * Q_STRIDES[1] + m[:, None] * Q_STRIDES[2]
    queries = tl.load(q_rows + d * Q_STRIDES[3], mask=inside[:, None] & (d < DIM), other=0.0)
    table = block_tables + row * TABLE_STRIDES[0]
    k_heads = k_cache + head // GROUP * K_CACHE_STRIDES[2]
    v_heads = v_cache + head // GROUP * V_CACHE_STRIDES[2]
    k_scales = k_scale + head // GROUP * SCALE_STRIDES[2]
    v_scales = v_scale + head // GROUP * SCALE_STRIDES[2]
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, V_DIM_PADDED], tl.float32)

    # Tokens [low, high) are seen by some query of the tile, those of [inner_low, inner_high) by all of them.
    high = newest + 1
    inner_low = 0
    if WINDOW:
        low = tl.maximum(oldest - WINDOW + 1, 0)
        inner_low = low + tl.cdiv(tl.maximum(newest - WINDOW + 1 - low, 0), KEYS) * KEYS
        top, total, acc = _attend(
            queries, position, k_heads, v_heads, k_scales, v_scales, table, top, total, acc,
            low, tl.minimum(inner_low, high), True, DIM, DIM_PADDED, V_DIM, V_DIM_PADDED, BLOCK_SIZE, K_CACHE_STRIDES,
            V_CACHE_STRIDES, SCALE_STRIDES, CACHE, PDL, TABLE_STRIDES[1], SCALE, WINDOW, SOFTCAP, KEYS, PRECISION,
        )  # fmt: skip
    inner_high = inner_low + tl.maximum(tl.minimum(oldest + 1, high) - inner_low, 0) // KEYS * KEYS
    top, total, acc = _attend(
        queries, position, k_heads, v_heads, k_scales, v_scales, table, top, total, acc,
        inner_low, inner_high, False, DIM, DIM_PADDED, V_DIM, V_DIM_PADDED, BLOCK_SIZE, K_CACHE_STRIDES,
        V_CACHE_STRIDES, SCALE_STRIDES, CACHE, PDL, TABLE_STRIDES[1], SCALE, WINDOW, SOFTCAP, KEYS, PRECISION,
    )  # fmt: skip
    top, total, acc = _attend(
        queries, position, k_heads, v_heads, k_scales, v_scales, table, top, total, acc,
        inner_high, high, True, DIM, DIM_PADDED, V_DIM, V_DIM_PADDED, BLOCK_SIZE, K_CACHE_STRIDES,
        V_CACHE_STRIDES, SCALE_STRIDES, CACHE, PDL, TABLE_STRIDES[1], SCALE, WINDOW, SOFTCAP, KEYS, PRECISION,
    )  # fmt: skip

    if HAS_SINKS:
        sink = tl.load(sinks + head * SINK_STRIDE).to(tl.float32) * LOG2E
        level = tl.maximum(top, sink)
        kept = tl.exp2(top - level)
        total = total * kept + tl.exp2(sink - level)
        acc = acc * kept[:, None]
    known = position >= 0
    result = tl.where(known[:, None], acc / tl.where(known, total, 1.0)[:, None], 0.0)
    e = tl.arange(0, V_DIM_PADDED)[None, :]
    out += (row * LENGTH * HEADS + head) * V_DIM
    tl.store(
        out + m[:, None] * (HEADS * V_DIM) + e,
        result.to(out.dtype.element_ty),
        mask=inside[:, None] & (e < V_DIM),
    )
