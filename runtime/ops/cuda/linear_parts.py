"""What the kernels of `fused_linear` share: which weight rows a tile takes, the pair of a gated activation, the end.

A gated activation needs row j of the gate and row j of the up projection in one program. A tile takes both, `RUN`
rows of one, then `RUN` of the other, so that in registers a gate lies beside its up: one product, one accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_rows(
    first: tl.tensor,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    GLU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """Weight rows [ROWS] of the tile whose first output column is `first`; past the end, the last row again."""
    tile = tl.arange(0, ROWS)
    if GLU:
        column = first + tile // (2 * RUN) * RUN + tile % RUN
        is_up = tile // RUN % 2
        upper = is_up if GATE_FIRST else 1 - is_up
        return tl.minimum(column, N // 2 - 1) + upper * (N // 2)
    return tl.minimum(first + tile, N - 1)


@triton.jit
def load(pointers: tl.tensor, inside: tl.tensor, MASKED: tl.constexpr, EVICTION: tl.constexpr) -> tl.tensor:
    """A load, zero where not `inside`, which does not matter unless MASKED."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    return tl.load(pointers, eviction_policy=EVICTION)


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
def rounded(y: tl.tensor, like: tl.tensor) -> tl.tensor:
    """float32 values as they are after having been stored in `like`, a pointer."""
    return y.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, out: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """act(gate) * up, rounded where the plain ops would round: after the product, the activation and the gating."""
    return rounded(activate(rounded(gate, out), KIND), out) * rounded(up, out)
