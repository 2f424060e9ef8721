"""Steps of the attention kernels: scores, RMSNorm and RoPE of a few heads, chunks of a row, partial softmaxes.

All are inlined by Triton; `decode_kernel.py` and `prefill_kernel.py` read as the sequence of these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_formats import narrowed

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
def optional(
    pointer: tl.tensor, index: tl.tensor, STRIDE: tl.constexpr, DIM: tl.constexpr, PRESENT: tl.constexpr
) -> tl.tensor:
    """Elements `index` of a vector of DIM that may be absent; then something that nobody uses."""
    if PRESENT:
        return tl.load(pointer + index * STRIDE, mask=index < DIM, other=0.0)
    else:
        return index


@triton.jit
def partner_of(d: tl.tensor, DIM: tl.constexpr) -> tl.tensor:
    """The element that `rotate_half` pairs with element `d`; where d is beyond DIM, the partner is as well."""
    return tl.where(d < DIM // 2, d + DIM // 2, tl.where(d < DIM, d - DIM // 2, d))


@triton.jit
def prepared_heads(
    heads: tl.tensor,
    d: tl.tensor,
    STRIDE: tl.constexpr,
    seen: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    weight_other: tl.tensor,
    DIM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    NARROW_FIRST: tl.constexpr,
) -> tl.tensor:
    """Heads at the pointers `heads` after norm and RoPE, in their dtype; 0 where not `seen`.

    `d` [R, DIM_PADDED] counts along each head; `cos`, `sin` and `weight` belong to d, `weight_other` to its partner.
    """
    dtype = heads.dtype.element_ty
    x = tl.load(heads + d * STRIDE, mask=seen & (d < DIM), other=0.0).to(tl.float32)
    inverse = x
    if HAS_ROPE:
        # The partner is loaded again, from a cache near by, not exchanged.
        other = partner_of(d, DIM)
        turned = tl.load(heads + other * STRIDE, mask=seen & (other < DIM), other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / DIM + EPS)[:, None]
        x = _normed(x, inverse, weight, dtype, OFFSET, NARROW_FIRST)
    if HAS_ROPE:
        if HAS_NORM:
            turned = _normed(turned, inverse, weight_other, dtype, OFFSET, NARROW_FIRST)
        turned = tl.where(d < DIM // 2, -turned, turned)
        x = (x * cos.to(tl.float32)).to(dtype).to(tl.float32) + (turned * sin.to(tl.float32)).to(dtype).to(tl.float32)
    return x.to(dtype)


@triton.jit
def chunk_of_split(
    position: tl.tensor, split: tl.tensor, SPLITS: tl.constexpr, GRAIN: tl.constexpr, WINDOW: tl.constexpr
) -> tl.tensor:
    """The cached tokens [low, high) of this split; of few tokens the last splits have none, and high <= low."""
    start = tl.maximum(position - WINDOW + 1, 0) if WINDOW else 0
    cached = tl.maximum(position - start, 0)
    size = tl.cdiv(tl.cdiv(cached, SPLITS), GRAIN) * GRAIN
    low = start + split * size
    return low, tl.minimum(low + size, position)


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
def tile_rows(
    heads: tl.tensor,
    blocks: tl.tensor,
    t: tl.tensor,
    high: tl.tensor,
    STRIDES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Keys or values of the tokens `t` [T] in the cache's `blocks` [T]: [T, DIM_PADDED], zeros from `high` on."""
    slots = blocks.to(tl.int64) * STRIDES[0] + t % BLOCK_SIZE * STRIDES[1]
    d = tl.arange(0, DIM_PADDED)[None, :]
    # Masked rows are zeros, not what lies there: 0 * NaN would be NaN.
    return tl.load(heads + slots[:, None] + d * STRIDES[3], mask=(t < high)[:, None] & (d < DIM), other=0.0)


@triton.jit
def tile_scales(
    heads: tl.tensor,
    blocks: tl.tensor,
    t: tl.tensor,
    high: tl.tensor,
    STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CACHE: tl.constexpr,
) -> tl.tensor:
    """Scales of the keys or values of a tile [T], zeros from `high` on; of a cache that has none, something unused."""
    if CACHE == "":
        return t
    else:
        slots = blocks.to(tl.int64) * STRIDES[0] + t % BLOCK_SIZE * STRIDES[1]
        return tl.load(heads + slots, mask=t < high, other=0.0)


@triton.jit
def attend(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    seen: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
    PDL: tl.constexpr,
) -> tl.tensor:
    """The online softmax, its maximum [G], sum [G] and values [G, V], continued over one tile.

    CACHE: "", or the format of keys and values, whose scales [T] are then applied to scores and weights.
    """
    if CACHE != "":
        keys = narrowed(keys, CACHE, 0, False, queries.dtype, PDL)
        values = narrowed(values, CACHE, 0, False, queries.dtype, PDL)
    raw = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if CACHE != "":
        raw *= key_scales[None, :]
    scores = capped(raw, SCALE, SOFTCAP)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # A chunk of no tokens must not compute inf - inf.
    level = tl.where(higher == float("-inf"), 0.0, higher)
    kept = tl.exp2(top - level)
    weights = tl.exp2(scores - level[:, None])
    total = total * kept + tl.sum(weights, 1)
    if CACHE != "":
        weights *= value_scales[None, :]
    acc = tl.dot(weights.to(values.dtype), values, acc * kept[:, None], input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def attend_chunk(
    queries: tl.tensor,
    k_heads: tl.tensor,
    v_heads: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    table: tl.tensor,
    blocks: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_STRIDES: tl.constexpr,
    CACHE: tl.constexpr,
    PDL: tl.constexpr,
) -> tl.tensor:
    """`attend` over the tokens [low, high) in a pipelined loop; `blocks` are those of the first tile."""
    for first in tl.range(low, high, BLOCK):
        # The table is read one tile ahead of its use: were it read in the loop that uses it, Triton would pipeline it
        # as well, and half of `num_stages` would go to it instead of keys and values.
        now = blocks
        t = first + tl.arange(0, BLOCK)
        ahead = t + BLOCK
        blocks = tl.load(table + ahead // BLOCK_SIZE * TABLE_STRIDE, mask=ahead < high, other=0)
        keys = tile_rows(k_heads, now, t, high, K_STRIDES, DIM, DIM_PADDED, BLOCK_SIZE)
        values = tile_rows(v_heads, now, t, high, V_STRIDES, V_DIM, V_DIM_PADDED, BLOCK_SIZE)
        key_scales = tile_scales(k_scales, now, t, high, SCALE_STRIDES, BLOCK_SIZE, CACHE)
        value_scales = tile_scales(v_scales, now, t, high, SCALE_STRIDES, BLOCK_SIZE, CACHE)
        top, total, acc = attend(
            queries, keys, values, key_scales, value_scales, t < high, top, total, acc, SCALE, SOFTCAP, PRECISION,
            CACHE, PDL,
        )  # fmt: skip
    return top, total, acc
