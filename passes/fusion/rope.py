"""Finds rotary embeddings that rotate by halves."""

from __future__ import annotations

from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, dtype_of, emit, is_call, replace, shape_of, source_of
from ..patterns import Bindings, match, number, op, tensor, var
from ..stages import Stage


def _rotation(x_low: object, x_high: object) -> object:
    """x * cos + cat(-high, low) * sin."""
    halves = [op(aten.neg.default, x_high), x_low]
    last = var("dim", lambda dim: dim in (-1, 3))
    return op(
        aten.add.Tensor,
        op(aten.mul.Tensor, tensor("x"), tensor("cos"), commutes=True),
        op(aten.mul.Tensor, op(aten.cat.default, halves, last), tensor("sin"), commutes=True),
        commutes=True,
    )


_ROPE = _rotation(
    op(aten.slice.Tensor, var("x"), 3, 0, number("half")),
    op(aten.slice.Tensor, var("x"), 3, number("half"), number("width")),
)
_NEAR = _rotation(tensor("low"), tensor("high"))


class FuseRoPE:
    """x * cos + rotate_half(x) * sin becomes one op."""

    name = "fuse-rope"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Match from the sum; other rotations are near misses."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if not is_call(node, aten.add.Tensor) or len(shape_of(node)) != 4:
                continue
            found = match(_ROPE, node)
            if found is None:
                if match(_NEAR, node):
                    outcome.miss(node.name, "what it turns are not the two halves of the value")
                continue
            if reason := _unfit(node, found):
                outcome.miss(node.name, reason)
                continue
            x, cos, sin = found["x"], found["cos"], found["sin"]
            with traced.graph.inserting_before(node):
                new = emit(traced.graph, overload("rotate_half"), x, cos, sin, source=source_of(node))
            replace(node, new)
            outcome.changed += 1
        return outcome


def _unfit(node: fx.Node, found: Bindings) -> str:
    """Why a rotation is not the op's, or ""."""
    x, cos, sin = found["x"], found["cos"], found["sin"]
    width = shape_of(x)[3]
    if (found["half"] * 2, found["width"]) != (width, width):
        return "only a part of the head is rotated, or not by halves"
    if shape_of(node) != shape_of(x):
        return "the tables change its shape"
    if dtype_of(cos) != dtype_of(x) or dtype_of(sin) != dtype_of(x):
        return "the tables have another dtype"
    return ""
