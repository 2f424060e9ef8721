"""What the kernels of `fused_linear` share: which weight rows a tile takes, gated activations, hints, splits of k.

A gated activation needs row j of the gate and row j of the up projection in one program. A tile takes both, `RUN`
rows of one, then `RUN` of the other, so that in registers a gate lies beside its up: one product, one accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_rows(
    first: tl.tensor,
    place: tl.tensor,
    N: tl.constexpr,
    GLU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """Weight rows at places of the tile whose first output column is `first`; past the end, the last row again."""
    if GLU:
        column = first + place // (2 * RUN) * RUN + place % RUN
        is_up = place // RUN % 2
        upper = is_up if GATE_FIRST else 1 - is_up
        return tl.minimum(column, N // 2 - 1) + upper * (N // 2)
    return tl.minimum(first + place, N - 1)


@triton.jit
def ask_rows(
    weight: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GLU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    RUN: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Ask for columns [start, start + COUNT) of the rows of the tile at column `first` into the L2 cache; a hint.

    They must lie within the row and start and end at multiples of 16 bytes; a tile past the end is not asked for.
    LANES >= ROWS: threads of the program, of which each row takes one.
    """
    place = tl.arange(0, LANES)
    rows = weight_rows(first, place, N, GLU, GATE_FIRST, RUN)
    index = rows.to(tl.int64) if WIDE_OFFSETS else rows
    nbytes = COUNT * (weight.dtype.element_ty.primitive_bitwidth // 8)
    wanted = (place < ROWS) & (first < (N // 2 if GLU else N))
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.u32 wanted, $2, 0; "
        "@wanted cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [(weight + index * K + start).to(tl.int64), tl.where(wanted, nbytes, 0)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load(pointers: tl.tensor, inside: tl.tensor, MASKED: tl.constexpr, EVICTION: tl.constexpr) -> tl.tensor:
    """A load, zero where not `inside`, which does not matter unless MASKED."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    return tl.load(pointers, eviction_policy=EVICTION)


@triton.jit
def rounded(y: tl.tensor, like: tl.tensor) -> tl.tensor:
    """float32 values as they are after having been stored in `like`, a pointer."""
    return y.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def with_offset(loaded: tl.tensor, gain: tl.tensor, OFFSET: tl.constexpr, ROUND_GAIN: tl.constexpr) -> tl.tensor:
    """The norm's weight, as `loaded` from `gain` or in float32 already, plus its offset, in float32."""
    g = loaded.to(tl.float32)
    if OFFSET != 0.0:
        g += OFFSET
        if ROUND_GAIN:
            g = rounded(g, gain)
    return g


@triton.jit
def leave_part(
    partial: tl.tensor,
    arrivals: tl.tensor,
    part: tl.tensor,
    place: tl.tensor,
    program: tl.tensor,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Store a split's `part` of the sums [SIZE] of its tile; whether all others of the tile are there already.

    `program` counts splits of a tile, then tiles. The one told so finds the counter zero again and all parts in place.
    """
    tl.store(partial + program * SIZE + place, part)
    # All threads have stored before one of them releases; the last program's acquire sees every split's stores.
    tl.debug_barrier()
    tile = program // SPLITS
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(arrivals + tile, 0)
    return last


@triton.jit
def added_parts(
    partial: tl.tensor, place: tl.tensor, program: tl.tensor, SIZE: tl.constexpr, SPLITS: tl.constexpr
) -> tl.tensor:
    """The parts of all splits of the program's tile, added up in their order, so that timing changes nothing."""
    source = partial + program // SPLITS * (SPLITS * SIZE) + place
    total = tl.load(source, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(source + split * SIZE, cache_modifier=".cg")
    return total


@triton.jit
def activate(gate: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """silu, relu, gelu or gelu_tanh of float32 values."""
    if KIND == "silu":
        return gate / (1.0 + tl.exp(-gate))
    elif KIND == "relu":
        # Not `maximum`, which turns NaN into 0.
        return tl.where(gate < 0.0, 0.0, gate)
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh(z)) / 2 is the logistic function of 2 z.
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, out: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """act(gate) * up, rounded where the plain ops would round: after the product, the activation and the gating."""
    return rounded(activate(rounded(gate, out), KIND), out) * rounded(up, out)
