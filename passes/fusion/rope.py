"""Finds rotary embeddings that rotate by halves."""

from __future__ import annotations

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, emit, is_call, shape_of
from ..patterns import match, op, var
from ..stages import Stage

_LOW = op(aten.slice.Tensor, var("x"), 3, 0, var("half"))
_HIGH = op(aten.slice.Tensor, var("x"), 3, var("half"), var("width"))
_ROPE = op(
    aten.add.Tensor,
    op(aten.mul.Tensor, var("x"), var("cos"), commutes=True),
    op(aten.mul.Tensor, op(aten.cat.default, var("halves"), -1), var("sin"), commutes=True),
    commutes=True,
)


class FuseRoPE:
    """x * cos + rotate_half(x) * sin becomes one op."""

    name = "fuse-rope"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Match from the sum; partial and interleaved rotations are near misses."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if not is_call(node, aten.add.Tensor) or len(shape_of(node)) != 4:
                continue
            found = match(_ROPE, node)
            if not found or not isinstance(found["halves"], list | tuple) or len(found["halves"]) != 2:
                continue
            x, cos, sin, (turned, low) = found["x"], found["cos"], found["sin"], found["halves"]
            first = match(_LOW, low)
            second = match(op(aten.neg.default, _HIGH), turned)
            if not first or not second or first["x"] is not x or second["x"] is not x:
                outcome.miss(node.name, "its halves are not those of the rotated value")
                continue
            width = shape_of(x)[3]
            if (first["half"], second["half"], second["width"]) != (width // 2, width // 2, width):
                outcome.miss(node.name, "only a part of the head is rotated, or not by halves")
                continue
            if shape_of(node) != shape_of(x) or cos.meta["val"].dtype != x.meta["val"].dtype:
                outcome.miss(node.name, "the tables change the shape or the dtype")
                continue
            with traced.graph.inserting_before(node):
                new = emit(traced.graph, overload("rotate_half"), x, cos, sin, source=node.meta.get("source", ""))
            node.replace_all_uses_with(new)
            outcome.changed += 1
        return outcome
