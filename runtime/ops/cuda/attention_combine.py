"""The last steps of split attention: sinks join the softmax, and the splits of a row are added up."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_parts import LOG2E
from .quantize import codes_of, row_scale_of


@triton.jit
def with_sink(
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    sinks: tl.tensor,
    g: tl.tensor,
    known: tl.tensor,
    STRIDE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> tl.tensor:
    """Sum [R] and values [R, V] of a softmax after the sinks of the heads `g` [R] have joined its denominator."""
    if HAS_SINKS:
        sink = tl.load(sinks + g * STRIDE, mask=known, other=0.0).to(tl.float32) * LOG2E
        level = tl.maximum(top, sink)
        kept = tl.exp2(top - level)
        return total * kept + tl.exp2(sink - level), acc * kept[:, None]
    else:
        return total, acc


@triton.jit
def combine_splits(
    out: tl.tensor,
    partial: tl.tensor,
    levels: tl.tensor,
    value: tl.tensor,
    sinks: tl.tensor,
    position: tl.tensor,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PADDED: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SINK_STRIDE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CACHE: tl.constexpr,
    CODE: tl.constexpr,
) -> None:
    """Adds the new token and all splits of one (row, kv head) up and writes the group's heads.

    The whole program waits for its loads, so they come in one go, STEP splits at a time. Each thread adds up VECTOR
    columns of its own and the level of their head: threads exchange nothing. A padding row becomes zeros.
    """
    r = tl.arange(0, GROUP_PADDED * V_DIM_PADDED // VECTOR)
    g = r * VECTOR // V_DIM_PADDED
    e = (r * VECTOR % V_DIM_PADDED)[:, None] + tl.arange(0, VECTOR)[None, :]
    known = g < GROUP
    inside = known[:, None] & (e < V_DIM)
    places = g[:, None] * V_DIM + e
    # Other multiprocessors wrote these: L1 must not answer.
    top = tl.load(levels + SPLITS * GROUP + g, mask=known, other=0.0, cache_modifier=".cg")
    total = tl.zeros_like(top) + 1.0
    acc = tl.load(value + e * VALUE_STRIDE, mask=e < V_DIM, other=0.0).to(tl.float32)
    if CACHE != "":
        # As the cache has it.
        whole = tl.arange(0, V_DIM_PADDED)
        row = tl.load(value + whole * VALUE_STRIDE, mask=whole < V_DIM, other=0.0).to(tl.float32)
        MOST: tl.constexpr = 127.0 if CACHE == "int8" else 448.0
        scale = row_scale_of(row, MOST)[None, :]
        acc = codes_of(acc, scale, MOST, CODE).to(tl.float32) * scale
    for first in tl.range(0, SPLITS, STEP, num_stages=1):
        tops: tl.tuple = ()
        parts: tl.tuple = ()
        for i in tl.static_range(STEP):
            at = (first + i) * GROUP
            there = known
            if SPLITS % STEP != 0:
                there = known & (first + i < SPLITS)
            level = tl.load(levels + at + g, mask=there, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(partial + at * V_DIM + places, mask=there[:, None] & inside, other=0.0, cache_modifier=".cg")
            tops, parts = tops + (level,), parts + (part,)  # noqa: RUF005 - Triton has no unpacking here
        higher = top
        for i in tl.static_range(STEP):
            higher = tl.maximum(higher, tops[i])
        kept = tl.exp2(top - higher)
        total, acc, top = total * kept, acc * kept[:, None], higher
        for i in tl.static_range(STEP):
            weight = tl.exp2(tops[i] - higher)
            total += weight
            acc += parts[i] * weight[:, None]
    total, acc = with_sink(top, total, acc, sinks, g, known, SINK_STRIDE, HAS_SINKS)
    result = tl.where(position >= 0, acc * (1.0 / total)[:, None], 0.0)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)
