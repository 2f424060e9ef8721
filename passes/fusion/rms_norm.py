"""Finds root mean square norms, in the ways models write them.

    Llama   weight * (wide(x) * rsqrt(mean(wide(x)²) + eps)).to(x)         rounds before the weight: narrow_first
    gpt-oss (weight * (wide(x) * rsqrt(…))).to(x)                          rounds once, after the weight
    Gemma   (wide(x) * rsqrt(…) * (wide(weight) + 1)).to(x)                the same with an offset

In bfloat16 these give different bits, so a norm is taken only where the op rounds exactly where the model does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, dtype_of, emit, is_call, is_weight, replace, shape_of, sole_user, source_of
from ..patterns import Bindings, Cast, is_cast, match, number, op, tensor, var
from ..stages import Stage

_SQUARE = op(aten.pow.Tensor_Scalar, tensor("wide"), 2)
_MEAN = op(aten.mean.dim, _SQUARE, [-1], True)
_SCALE = op(aten.rsqrt.default, op(aten.add.Tensor, _MEAN, number("eps"), commutes=True))
_NORMED = op(aten.mul.Tensor, var("wide"), _SCALE, commutes=True, bind="normed")
_WEIGHT = Cast(var("weight", lambda value: is_weight(value) and len(shape_of(value)) == 1), bind="cast_weight")
_PLAIN = op(aten.mul.Tensor, _WEIGHT, Cast(_NORMED, bind="rounded"), commutes=True)
_OFFSET = op(
    aten.mul.Tensor,
    op(aten.add.Tensor, _WEIGHT, number("offset"), commutes=True, bind="shifted"),
    Cast(_NORMED, bind="rounded"),
    commutes=True,
)


@dataclass(frozen=True)
class _Norm:
    """A norm that the op computes to the bit: `root` is its result."""

    root: fx.Node
    x: fx.Node
    offset: float
    narrow_first: bool


class FuseRMSNorm:
    """x * rsqrt(mean(x²) + eps) * weight becomes one op that rounds where the model does."""

    name = "fuse-rms-norm"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Match from the product with the weight; a cast behind it belongs to the norm."""
        outcome = Outcome()
        weighted: set[fx.Node] = set()
        for node in list(traced.graph.nodes):
            if not is_call(node, aten.mul.Tensor):
                continue
            found = match(_OFFSET, node) or match(_PLAIN, node)
            if found is None:
                continue
            weighted.add(found["normed"])
            norm = _fit(node, found)
            if isinstance(norm, str):
                outcome.miss(node.name, norm)
                continue
            with traced.graph.inserting_before(norm.root):
                new = emit(
                    traced.graph, overload("rms_norm"), norm.x, found["weight"], float(found["eps"]), norm.offset,
                    norm.narrow_first, source=source_of(node),
                )  # fmt: skip
            replace(norm.root, new)
            outcome.changed += 1
        for node in traced.graph.nodes:
            if node not in weighted and match(_NORMED, node):
                outcome.miss(node.name, "no weight is applied to it")
        return outcome


def _fit(node: fx.Node, found: Bindings) -> _Norm | str:
    """The norm behind a match, or why the op would not give its bits."""
    weight, wide, normed, rounded = found["weight"], found["wide"], found["normed"], found["rounded"]
    x = wide.args[0] if is_cast(wide) and dtype_of(wide) == torch.float32 else wide
    narrow = dtype_of(x)
    if shape_of(weight)[0] != shape_of(x)[-1]:
        return "the weight is not as long as the last dimension"
    if dtype_of(normed) != torch.float32:
        return f"it is computed in {str(dtype_of(normed)).removeprefix('torch.')}, the op computes in float32"
    offset = float(found.get("offset", 0.0))
    cast_weight = found["cast_weight"]
    if cast_weight is not weight and (cast_weight.args[0] is not weight or dtype_of(cast_weight) != torch.float32):
        return "the weight is rounded first"
    scale = found["shifted"] if offset else cast_weight
    if rounded is not normed:
        if rounded.args[0] is not normed or dtype_of(rounded) != narrow:
            return "it is rounded to another dtype than its input's"
        if dtype_of(scale) != narrow or dtype_of(weight) != narrow:
            return "it is rounded before a weight of another dtype"
        return _Norm(node, x, offset, narrow_first=True)
    if offset and dtype_of(scale) != torch.float32:
        return "the offset is added to the weight before it is made wide"
    if narrow == torch.float32:
        return _Norm(node, x, offset, narrow_first=False)
    cast = sole_user(node)
    if cast is None or not is_cast(cast) or dtype_of(cast) != narrow:
        return "its result stays wider than its input"
    return _Norm(cast, x, offset, narrow_first=False)
