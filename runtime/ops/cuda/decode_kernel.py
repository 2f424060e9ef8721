"""The Triton kernel of a decode step's attention: norm, RoPE, cache write and split-KV attention in one launch.

Flash-decoding (Dao et al. 2023) over a paged cache: every program takes one chunk of a row's tokens for all query heads
that share a kv head, so that each key and value is read once. Programs leave their part of the softmax in scratch; the
last one to arrive adds the parts up in the order of the splits, so that the result does not depend on timing. A small
batch is bound by latency, not by memory: what can be read before the launch before has finished is read then.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_combine import combine_splits, with_sink
from .attention_parts import (
    attend,
    attend_chunk,
    capped,
    chunk_of_split,
    optional,
    partner_of,
    prefetch_rows,
    prepared_heads,
    tile_rows,
    tile_scales,
)
from .quantize import codes_of, row_scale_of


@triton.jit
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    block_tables: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    sinks: tl.tensor,
    partial: tl.tensor,
    levels: tl.tensor,
    arrivals: tl.tensor,
    out: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    K_CACHE_STRIDES: tl.constexpr,
    V_CACHE_STRIDES: tl.constexpr,
    SCALE_STRIDES: tl.constexpr,
    CACHE: tl.constexpr,
    TABLE_STRIDES: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    COS_STRIDES: tl.constexpr,
    SIN_STRIDES: tl.constexpr,
    Q_NORM_STRIDE: tl.constexpr,
    K_NORM_STRIDE: tl.constexpr,
    SINK_STRIDE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    ROPE_BY_POSITION: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    NARROW_FIRST: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    COMBINE_STEP: tl.constexpr,
    COMBINE_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    K_LINES: tl.constexpr,
    V_LINES: tl.constexpr,
    LINE: tl.constexpr,
    PRELOAD: tl.constexpr,
    WAIT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One split of one kv head of one row; see `attention_step.lower` for what the constants mean."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = block_tables + row * TABLE_STRIDES[0]
    k_heads = k_cache + head * K_CACHE_STRIDES[2]
    v_heads = v_cache + head * V_CACHE_STRIDES[2]
    k_scales = k_scale + head * SCALE_STRIDES[2]
    v_scales = v_scale + head * SCALE_STRIDES[2]
    if PDL:
        gdc_launch_dependents()
        if WAIT == 0:
            gdc_wait()
    position = tl.load(positions + row * POSITION_STRIDE).to(tl.int32)
    low, high = chunk_of_split(position, split, SPLITS, GRAIN, WINDOW)
    # The new token belongs to the last split, whose chunk is the shortest. It is written to the cache and attended to
    # from registers: no program ever reads what this launch writes.
    mine = split == SPLITS - 1
    write = mine & (position >= 0)
    own = tl.load(table + position // BLOCK_SIZE * TABLE_STRIDES[1], mask=write, other=0).to(tl.int64)
    t = low + tl.arange(0, BLOCK)
    blocks = tl.load(table + t // BLOCK_SIZE * TABLE_STRIDES[1], mask=t < high, other=0)
    # Nobody writes position, table and older tokens in this run: time to fetch the first tile while the launch before
    # still computes q, k and v. (Unseen tokens name the null block, which is there.)
    if PRELOAD:
        keys = tile_rows(k_heads, blocks, t, high, K_CACHE_STRIDES, DIM, DIM_PADDED, BLOCK_SIZE)
        values = tile_rows(v_heads, blocks, t, high, V_CACHE_STRIDES, V_DIM, V_DIM_PADDED, BLOCK_SIZE)
        key_scales = tile_scales(k_scales, blocks, t, high, SCALE_STRIDES, BLOCK_SIZE, CACHE)
        value_scales = tile_scales(v_scales, blocks, t, high, SCALE_STRIDES, BLOCK_SIZE, CACHE)
    elif PDL and WAIT > 0:
        near, inner = blocks.to(tl.int64), t % BLOCK_SIZE
        prefetch_rows(k_heads + near * K_CACHE_STRIDES[0] + inner * K_CACHE_STRIDES[1], DIM, K_LINES, LINE)
        prefetch_rows(v_heads + near * V_CACHE_STRIDES[0] + inner * V_CACHE_STRIDES[1], V_DIM, V_LINES, LINE)
    if PDL and WAIT == 1:
        gdc_wait()

    # All that q's heads and the new key are made of has one shape and so one layout: nothing moves between threads.
    g = tl.arange(0, GROUP_PADDED)
    known = g < GROUP
    d = tl.broadcast_to(tl.arange(0, DIM_PADDED)[None, :], [GROUP_PADDED, DIM_PADDED])
    e = tl.arange(0, V_DIM_PADDED)
    other = partner_of(d, DIM)
    angle = tl.maximum(position, 0) if ROPE_BY_POSITION else row
    c = optional(cos + angle * COS_STRIDES[0], d, COS_STRIDES[1], DIM, HAS_ROPE)
    s = optional(sin + angle * SIN_STRIDES[0], d, SIN_STRIDES[1], DIM, HAS_ROPE)
    q_weight = optional(q_norm, d, Q_NORM_STRIDE, DIM, HAS_Q_NORM)
    q_weight_other = optional(q_norm, other, Q_NORM_STRIDE, DIM, HAS_Q_NORM and HAS_ROPE)
    k_weight = optional(k_norm, d, K_NORM_STRIDE, DIM, HAS_K_NORM)
    k_weight_other = optional(k_norm, other, K_NORM_STRIDE, DIM, HAS_K_NORM and HAS_ROPE)
    if PDL and WAIT == 2:
        gdc_wait()
    q_row = q + row * Q_STRIDES[0] + (head * GROUP + g)[:, None] * Q_STRIDES[1]
    queries = prepared_heads(
        q_row, d, Q_STRIDES[3], known[:, None], c, s, q_weight, q_weight_other, DIM, HAS_ROPE, HAS_Q_NORM, EPS, OFFSET,
        NARROW_FIRST,
    )  # fmt: skip
    key = prepared_heads(
        k + row * K_STRIDES[0] + head * K_STRIDES[1], d, K_STRIDES[3], mine, c, s, k_weight, k_weight_other, DIM,
        HAS_ROPE, HAS_K_NORM, EPS, OFFSET, NARROW_FIRST,
    )  # fmt: skip
    v_row = v + row * V_STRIDES[0] + head * V_STRIDES[1]
    value = tl.load(v_row + e * V_STRIDES[3], mask=(e < V_DIM) & mine, other=0.0)
    inner = position % BLOCK_SIZE
    k_slot = k_heads + own * K_CACHE_STRIDES[0] + inner * K_CACHE_STRIDES[1]
    v_slot = v_heads + own * V_CACHE_STRIDES[0] + inner * V_CACHE_STRIDES[1]
    CODE: tl.constexpr = k_cache.dtype.element_ty
    if CACHE != "":
        # What is attended to is what the cache will hold.
        MOST: tl.constexpr = 127.0 if CACHE == "int8" else 448.0
        key, value = key.to(tl.float32), value.to(tl.float32)
        key_scale, value_scale = row_scale_of(key, MOST), row_scale_of(value, MOST)
        key, value = codes_of(key, key_scale, MOST, CODE), codes_of(value, value_scale, MOST, CODE)
        at = own * SCALE_STRIDES[0] + inner * SCALE_STRIDES[1]
        tl.store(k_scales + at + tl.zeros_like(g)[:, None], key_scale, mask=(g == 0)[:, None] & write)
        tl.store(v_scales + at + tl.arange(0, 1), value_scale, mask=write)
    tl.store(k_slot + d * K_CACHE_STRIDES[3], key, mask=(g == 0)[:, None] & (d < DIM) & write)
    tl.store(v_slot + e * V_CACHE_STRIDES[3], value, mask=(e < V_DIM) & write)
    if CACHE != "":
        key, value = key.to(tl.float32) * key_scale, value.to(tl.float32) * value_scale
    score = capped(tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1), SCALE, SOFTCAP)

    pair = row * KV_HEADS + head
    if SPLITS == 1:
        top, total = score, tl.full([GROUP_PADDED], 1.0, tl.float32)
        acc = tl.zeros([GROUP_PADDED, V_DIM_PADDED], tl.float32) + value.to(tl.float32)[None, :]
    else:
        # Who adds the splits up begins with the new token; its score is left for them.
        levels += pair * (SPLITS + 1) * GROUP
        partial += pair * SPLITS * GROUP * V_DIM
        tl.store(levels + SPLITS * GROUP + g, score, mask=known & mine)
        top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PADDED], tl.float32)
        acc = tl.zeros([GROUP_PADDED, V_DIM_PADDED], tl.float32)
    if PRELOAD:
        top, total, acc = attend(
            queries, keys, values, key_scales, value_scales, t < high, top, total, acc, SCALE, SOFTCAP, PRECISION,
            CACHE, PDL,
        )  # fmt: skip
        low += BLOCK
        # A chunk of one tile does not even fill the loop's pipeline.
        if low < high:
            t = low + tl.arange(0, BLOCK)
            blocks = tl.load(table + t // BLOCK_SIZE * TABLE_STRIDES[1], mask=t < high, other=0)
            top, total, acc = attend_chunk(
                queries, k_heads, v_heads, k_scales, v_scales, table, blocks, low, high, top, total, acc, DIM,
                DIM_PADDED, V_DIM, V_DIM_PADDED, BLOCK_SIZE, K_CACHE_STRIDES, V_CACHE_STRIDES, TABLE_STRIDES[1], SCALE,
                SOFTCAP, BLOCK,
                PRECISION, SCALE_STRIDES, CACHE, PDL,
            )  # fmt: skip
    else:
        top, total, acc = attend_chunk(
            queries, k_heads, v_heads, k_scales, v_scales, table, blocks, low, high, top, total, acc, DIM, DIM_PADDED,
            V_DIM, V_DIM_PADDED, BLOCK_SIZE, K_CACHE_STRIDES, V_CACHE_STRIDES, TABLE_STRIDES[1], SCALE, SOFTCAP, BLOCK,
            PRECISION, SCALE_STRIDES, CACHE, PDL,
        )  # fmt: skip

    out += pair * GROUP * V_DIM
    sinks += head * GROUP * SINK_STRIDE
    if SPLITS == 1:
        total, acc = with_sink(top, total, acc, sinks, g, known, SINK_STRIDE, HAS_SINKS)
        result = tl.where(position >= 0, acc / tl.where(known, total, 1.0)[:, None], 0.0).to(out.dtype.element_ty)
        tl.store(out + g[:, None] * V_DIM + e[None, :], result, mask=known[:, None] & (e < V_DIM)[None, :])
    else:
        # A chunk of no tokens weighs nothing and holds zeros.
        at = split * GROUP + g
        total = tl.where(total > 0.0, total, 1.0)
        tl.store(levels + at, top + tl.log2(total), mask=known)
        acc *= (1.0 / total)[:, None]
        tl.store(partial + at[:, None] * V_DIM + e[None, :], acc, mask=known[:, None] & (e < V_DIM)[None, :])
        # All threads have stored before one of them releases; the last program's acquire sees every split's stores.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(arrivals + pair, 0)
            combine_splits(
                out, partial, levels, v_row, sinks, position, SPLITS, COMBINE_STEP, COMBINE_VECTOR, GROUP,
                GROUP_PADDED, V_DIM, V_DIM_PADDED, V_STRIDES[3], SINK_STRIDE, HAS_SINKS, CACHE, CODE,
            )  # fmt: skip
