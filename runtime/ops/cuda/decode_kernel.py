"""The Triton kernel of a decode step's attention: norm, RoPE, cache write and split-KV attention in one launch.

Flash-decoding (Dao et al. 2023) over a paged cache: every program takes one chunk of a row's tokens for all query heads
that share a kv head, so that each key and value is read once. Programs leave their partial softmax in scratch; the
last one to arrive adds the partials up in the order of the splits, so that the result does not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_parts import capped, chunk_of_split, combine_splits, prefetch_rows, prepared_heads, write_heads


@triton.jit
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    block_tables: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    sinks: tl.tensor,
    partial: tl.tensor,
    stats: tl.tensor,
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
    TABLE_STRIDES: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    COS_STRIDES: tl.constexpr,
    SIN_STRIDES: tl.constexpr,
    Q_NORM_STRIDE: tl.constexpr,
    K_NORM_STRIDE: tl.constexpr,
    SINK_STRIDE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
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
    BLOCK: tl.constexpr,
    GRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    K_LINES: tl.constexpr,
    V_LINES: tl.constexpr,
    LINE: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One split of one kv head of one row; see `attention_step.lower` for what the constants mean."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = block_tables + row * TABLE_STRIDES[0]
    k_heads = k_cache + head * K_CACHE_STRIDES[2]
    v_heads = v_cache + head * V_CACHE_STRIDES[2]
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    position = tl.load(positions + row * POSITION_STRIDE).to(tl.int32)
    low, high, active = chunk_of_split(position, split, SPLITS, GRAIN, WINDOW)
    if split >= active:
        return

    # The table is read one tile ahead of its use: were it read in the loop that uses it, Triton would pipeline it as
    # well, and half of `num_stages` would go to it instead of keys and values.
    t = low + tl.arange(0, BLOCK)
    coming = tl.load(table + t // BLOCK_SIZE * TABLE_STRIDES[1], mask=t < high, other=0)
    if PDL and EARLY:
        # Nobody writes position and table in this run, so they are known while the launch before still computes
        # q, k and v: time to bring the first tile into L2. (Unseen tokens name the null block, which is there.)
        near, inside = coming.to(tl.int64), t % BLOCK_SIZE
        prefetch_rows(k_heads + near * K_CACHE_STRIDES[0] + inside * K_CACHE_STRIDES[1], DIM, K_LINES, LINE)
        prefetch_rows(v_heads + near * V_CACHE_STRIDES[0] + inside * V_CACHE_STRIDES[1], V_DIM, V_LINES, LINE)
        gdc_wait()
    g = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, DIM_PADDED)
    e = tl.arange(0, V_DIM_PADDED)
    cos_row, sin_row = cos + row * COS_STRIDES[0], sin + row * SIN_STRIDES[0]
    q_rows = q + row * Q_STRIDES[0] + (head * GROUP + g)[:, None] * Q_STRIDES[1]
    queries = prepared_heads(
        q_rows, (g < GROUP)[:, None], cos_row, sin_row, q_norm, DIM, DIM_PADDED, Q_STRIDES[3], COS_STRIDES[3],
        SIN_STRIDES[3], Q_NORM_STRIDE, HAS_ROPE, HAS_Q_NORM, EPS, OFFSET, NARROW_FIRST,
    )  # fmt: skip

    # The new token belongs to the last active split, whose chunk is the shortest. It is written to the cache and
    # attended to from registers: no program ever reads what this launch writes.
    mine = split == active - 1
    one = tl.arange(0, 1)[:, None]
    key = prepared_heads(
        k + row * K_STRIDES[0] + head * K_STRIDES[1] + one, (one == 0) & mine, cos_row, sin_row, k_norm, DIM,
        DIM_PADDED, K_STRIDES[3], COS_STRIDES[3], SIN_STRIDES[3], K_NORM_STRIDE, HAS_ROPE, HAS_K_NORM, EPS, OFFSET,
        NARROW_FIRST,
    ).to(k_cache.dtype.element_ty)  # fmt: skip
    value = tl.load(v + row * V_STRIDES[0] + head * V_STRIDES[1] + e * V_STRIDES[3], mask=(e < V_DIM) & mine, other=0.0)
    value = value.to(v_cache.dtype.element_ty)
    write = mine & (position >= 0)
    own = tl.load(table + position // BLOCK_SIZE * TABLE_STRIDES[1], mask=write, other=0)
    k_slot = own.to(tl.int64) * K_CACHE_STRIDES[0] + position % BLOCK_SIZE * K_CACHE_STRIDES[1]
    v_slot = own.to(tl.int64) * V_CACHE_STRIDES[0] + position % BLOCK_SIZE * V_CACHE_STRIDES[1]
    d_row = d[None, :]
    tl.store(k_heads + k_slot + d_row * K_CACHE_STRIDES[3], key, mask=(d_row < DIM) & write)
    tl.store(v_heads + v_slot + e * V_CACHE_STRIDES[3], value, mask=(e < V_DIM) & write)

    score = capped(tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1), SCALE, SOFTCAP)
    top = tl.where(mine, score, float("-inf"))
    total = tl.where(mine, tl.full([GROUP_PADDED], 1.0, tl.float32), 0.0)
    acc = tl.zeros([GROUP_PADDED, V_DIM_PADDED], tl.float32) + value.to(tl.float32)[None, :]
    for first in tl.range(low, high, BLOCK):
        block = coming.to(tl.int64)
        t = first + tl.arange(0, BLOCK)
        seen = t < high
        ahead = t + BLOCK
        coming = tl.load(table + ahead // BLOCK_SIZE * TABLE_STRIDES[1], mask=ahead < high, other=0)
        k_slots = block * K_CACHE_STRIDES[0] + t % BLOCK_SIZE * K_CACHE_STRIDES[1]
        v_slots = block * V_CACHE_STRIDES[0] + t % BLOCK_SIZE * V_CACHE_STRIDES[1]
        # Masked rows are zeros, not what lies there: 0 * NaN would be NaN.
        keys = tl.load(
            k_heads + k_slots[:, None] + d[None, :] * K_CACHE_STRIDES[3],
            mask=seen[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        values = tl.load(
            v_heads + v_slots[:, None] + e[None, :] * V_CACHE_STRIDES[3],
            mask=seen[:, None] & (e < V_DIM)[None, :],
            other=0.0,
        )
        scores = capped(tl.dot(queries, tl.trans(keys), input_precision=PRECISION), SCALE, SOFTCAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        kept = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * kept[:, None], input_precision=PRECISION)
        top = higher

    out += (row * KV_HEADS + head) * GROUP * V_DIM
    sinks += head * GROUP * SINK_STRIDE
    if SPLITS > 1 and active > 1:
        pair = row * KV_HEADS + head
        partial += pair * SPLITS * GROUP * V_DIM
        stats += pair * 2 * SPLITS * GROUP
        at = split * GROUP + g
        tl.store(stats + at, top, mask=g < GROUP)
        tl.store(stats + SPLITS * GROUP + at, total, mask=g < GROUP)
        tl.store(partial + at[:, None] * V_DIM + e[None, :], acc, mask=(g < GROUP)[:, None] & (e < V_DIM)[None, :])
        # All threads have stored before one of them releases; the last program's acquire sees every split's stores.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == active - 1:
            tl.store(arrivals + pair, 0)
            level, sums, mixed = combine_splits(
                partial, stats, active, SPLITS, COMBINE_STEP, GROUP, GROUP_PADDED, V_DIM, V_DIM_PADDED
            )
            write_heads(out, sinks, g, level, sums, mixed, position, SINK_STRIDE, HAS_SINKS, GROUP, V_DIM, V_DIM_PADDED)
    else:
        write_heads(out, sinks, g, top, total, acc, position, SINK_STRIDE, HAS_SINKS, GROUP, V_DIM, V_DIM_PADDED)
