"""Steps of the attention kernels: scores, RMSNorm and RoPE of a few heads, chunks of a row, partial softmaxes.

All are inlined by Triton; `decode_kernel.py` and `prefill_kernel.py` read as the sequence of these.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(scores: tl.tensor, SCALE: tl.constexpr, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Raw dot products in float32 -> scaled and soft-capped scores times log2(e), for exp2."""
    if SOFTCAP != 0.0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): saturates without overflow at both ends.
        grown = tl.exp2(scores * (2.0 * SCALE * LOG2E / SOFTCAP))
        return (1.0 - 2.0 / (grown + 1.0)) * (SOFTCAP * LOG2E)
    else:
        return scores * (SCALE * LOG2E)


@triton.jit
def _normed(
    x: tl.tensor,
    inverse: tl.tensor,
    weight: tl.tensor,
    DTYPE: tl.constexpr,
    OFFSET: tl.constexpr,
    NARROW_FIRST: tl.constexpr,
) -> tl.tensor:
    """x times the inverse of its root mean square and the weight, rounded as `reference.rms_norm` rounds."""
    if NARROW_FIRST:
        if OFFSET != 0.0:
            weight = (weight.to(tl.float32) + OFFSET).to(weight.dtype)
        return ((x * inverse).to(DTYPE).to(tl.float32) * weight.to(tl.float32)).to(DTYPE).to(tl.float32)
    else:
        return (x * inverse * (weight.to(tl.float32) + OFFSET)).to(DTYPE).to(tl.float32)


@triton.jit
def prepared_heads(
    rows: tl.tensor,
    seen: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    norm: tl.tensor,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    DIM_STRIDE: tl.constexpr,
    COS_STRIDE: tl.constexpr,
    SIN_STRIDE: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    NARROW_FIRST: tl.constexpr,
) -> tl.tensor:
    """Heads at the pointers `rows` [R, 1] after norm and RoPE, [R, DIM_PADDED] in their dtype; 0 where not `seen`."""
    dtype = rows.dtype.element_ty
    d = tl.arange(0, DIM_PADDED)[None, :]
    inside = d < DIM
    x = tl.load(rows + d * DIM_STRIDE, mask=seen & inside, other=0.0).to(tl.float32)
    inverse = x
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / DIM + EPS)[:, None]
        weight = tl.load(norm + d * NORM_STRIDE, mask=inside, other=0.0)
        x = _normed(x, inverse, weight, dtype, OFFSET, NARROW_FIRST)
    if HAS_ROPE:
        # rotate_half pairs d with d + DIM / 2: the partner is loaded again, from a cache near by, not exchanged.
        first = d < DIM // 2
        partner = tl.where(first, d + DIM // 2, d - DIM // 2)
        turned = tl.load(rows + partner * DIM_STRIDE, mask=seen & inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight = tl.load(norm + partner * NORM_STRIDE, mask=inside, other=0.0)
            turned = _normed(turned, inverse, weight, dtype, OFFSET, NARROW_FIRST)
        turned = tl.where(first, -turned, turned)
        c = tl.load(cos + d * COS_STRIDE, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + d * SIN_STRIDE, mask=inside, other=0.0).to(tl.float32)
        x = (x * c).to(dtype).to(tl.float32) + (turned * s).to(dtype).to(tl.float32)
    return x.to(dtype)


@triton.jit
def chunk_of_split(
    position: tl.tensor, split: tl.tensor, SPLITS: tl.constexpr, GRAIN: tl.constexpr, WINDOW: tl.constexpr
) -> tl.tensor:
    """The cached tokens [low, high) of this split, and how many splits have work (at least one)."""
    start = tl.maximum(position - WINDOW + 1, 0) if WINDOW else 0
    cached = tl.maximum(position - start, 0)
    size = tl.cdiv(tl.cdiv(cached, SPLITS), GRAIN) * GRAIN
    low = start + split * size
    active = tl.maximum(tl.cdiv(cached, tl.maximum(size, 1)), 1)
    return low, tl.minimum(low + size, position), active


@triton.jit
def prefetch_rows(rows: tl.tensor, DIM: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr) -> None:
    """Ask for the DIM elements at each of the pointers `rows` [R], in LINES lines of LINE elements, to come into L2."""
    lines = rows[:, None] + tl.minimum(tl.arange(0, LINES) * LINE, DIM - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0",
        "=r,l",
        [lines.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def combine_splits(
    partial: tl.tensor,
    stats: tl.tensor,
    active: tl.tensor,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PADDED: tl.constexpr,
) -> tl.tensor:
    """The softmax over all active splits of one (row, kv head): maximum [G], sum [G], values [G, V_DIM_PADDED]."""
    g = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, V_DIM_PADDED)[None, None, :]
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, V_DIM_PADDED], tl.float32)
    for first in tl.range(0, active, STEP, num_stages=1):
        split = first + tl.arange(0, STEP)
        seen = (split < active)[:, None] & (g < GROUP)[None, :]
        at = split[:, None] * GROUP + g[None, :]
        # Other multiprocessors wrote these: L1 must not answer.
        tops = tl.load(stats + at, mask=seen, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + SPLITS * GROUP + at, mask=seen, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial + at[:, :, None] * V_DIM + d, mask=seen[:, :, None] & (d < V_DIM), other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(top, tl.max(tops, 0))
        # Heads beyond GROUP have -inf everywhere.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2(top - level)
        weights = tl.exp2(tops - level[None, :])
        total = total * kept + tl.sum(totals * weights, 0)
        acc = acc * kept[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = higher
    return top, total, acc


@triton.jit
def write_heads(
    out: tl.tensor,
    sinks: tl.tensor,
    g: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    position: tl.tensor,
    SINK_STRIDE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PADDED: tl.constexpr,
) -> None:
    """Adds the sink to the denominator, divides, and writes the group's heads; a padding row becomes zeros."""
    known = g < GROUP
    if HAS_SINKS:
        sink = tl.load(sinks + g * SINK_STRIDE, mask=known, other=0.0).to(tl.float32) * LOG2E
        level = tl.maximum(top, sink)
        kept = tl.exp2(top - level)
        total = total * kept + tl.exp2(sink - level)
        acc = acc * kept[:, None]
    d = tl.arange(0, V_DIM_PADDED)
    result = tl.where(position >= 0, acc / tl.where(known, total, 1.0)[:, None], 0.0)
    tl.store(
        out + g[:, None] * V_DIM + d[None, :],
        result.to(out.dtype.element_ty),
        mask=known[:, None] & (d < V_DIM)[None, :],
    )
