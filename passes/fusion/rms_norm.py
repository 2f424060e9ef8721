"""Finds root mean square norms, in the three ways models write them."""

from __future__ import annotations

from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, emit, is_call, shape_of, value_of
from ..patterns import Cast, Op, is_cast, match, op, var
from ..stages import Stage


def _is_weight(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and len(shape_of(value)) == 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


_WIDE = Cast(var("x"), bind="wide")
_SQUARE = op(aten.pow.Tensor_Scalar, var("w32"), 2)
_SCALE = op(aten.rsqrt.default, op(aten.add.Tensor, op(aten.mean.dim, _SQUARE, [-1], True), var("eps", _is_number)))
_NORMED = op(aten.mul.Tensor, var("w32"), _SCALE, commutes=True)
_WEIGHT = Cast(var("weight", _is_weight))
_LLAMA: Op = op(aten.mul.Tensor, _WEIGHT, Cast(_NORMED), commutes=True)
_GEMMA: Op = op(
    aten.mul.Tensor, _NORMED, op(aten.add.Tensor, _WEIGHT, var("offset", _is_number), commutes=True), commutes=True
)


class FuseRMSNorm:
    """x * rsqrt(mean(x²) + eps) * weight becomes one op, residual adds in front of it are left for the back end to fuse."""

    name = "fuse-rms-norm"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Match from the product with the weight; a cast behind it belongs to the norm."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if not is_call(node, aten.mul.Tensor):
                continue
            found, offset = match(_GEMMA, node), 0.0
            if found:
                offset = float(found["offset"])
            else:
                found = match(_LLAMA, node)
            if not found:
                continue
            weight = found["weight"]
            wide = found["w32"]
            x = wide.args[0] if is_cast(wide) else wide
            root = node
            narrow = value_of(x).dtype
            cast = next(iter(node.users)) if len(node.users) == 1 else None
            if (
                node.meta["val"].dtype != narrow
                and cast is not None
                and is_cast(cast)
                and cast.meta["val"].dtype == narrow
            ):
                root = cast
            if root.meta["val"].dtype != narrow:
                outcome.miss(node.name, "its result stays wider than its input")
                continue
            if shape_of(weight)[0] != shape_of(x)[-1]:
                outcome.miss(node.name, "the weight is not as long as the last dimension")
                continue
            # A cast between norm and weight rounds first; without one the weight is applied in the wide dtype.
            narrow_first = root is node and not offset
            with traced.graph.inserting_before(root):
                new = emit(
                    traced.graph, overload("rms_norm"), x, weight, float(found["eps"]), offset, narrow_first,
                    source=node.meta.get("source", ""),
                )  # fmt: skip
            root.replace_all_uses_with(new)
            outcome.changed += 1
        return outcome
