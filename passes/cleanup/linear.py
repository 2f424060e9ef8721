"""Writes every product with a weight as `aten.linear`, so that later passes know one form."""

from __future__ import annotations

from ..base import Context, Outcome
from ..graph import (
    TracedGraph,
    add_weight,
    aten,
    dtype_of,
    emit,
    is_call,
    is_weight,
    operands,
    replace,
    shape_of,
    source_of,
)
from ..stages import Stage
from ..weights import Transposed


class UnifyLinear:
    """addmm and mm with a stored weight become linear; weights stored [in, out] (GPT-2) are transposed at build."""

    name = "unify-linear"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Rewrite addmm(bias, x, w) and mm(x, w), then drop the reshapes around them."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if is_call(node, aten.addmm.default):
                bias, x, weight = operands(node)
                if node.kwargs:
                    outcome.miss(node.name, "addmm with alpha or beta")
                    continue
                if len(shape_of(bias)) != 1:
                    outcome.miss(node.name, "what it adds is not one bias per column")
                    continue
            elif is_call(node, aten.mm.default):
                (x, weight), bias = operands(node), None
            else:
                continue
            if not is_weight(weight):
                outcome.miss(node.name, "the second matrix is computed, not stored")
                continue
            k, n = shape_of(weight)
            part = Transposed(traced.weights.entries[weight.target])
            with traced.graph.inserting_before(node):
                turned = add_weight(traced, f"{weight.target}__t", part, (n, k), dtype_of(weight))
                new = emit(traced.graph, aten.linear.default, x, turned, bias, source=source_of(node))
            replace(node, new)
            outcome.changed += 1
        _absorb_reshapes(traced, outcome)
        return outcome


def _absorb_reshapes(traced: TracedGraph, outcome: Outcome) -> None:
    """reshape -> linear -> reshape that only fold and unfold leading dimensions become linear alone."""
    for node in list(traced.graph.nodes):
        if not is_call(node, aten.reshape.default) or not is_call(node.args[0], aten.linear.default):
            continue
        linear = operands(node)[0]
        x = operands(linear)[0]
        if len(linear.users) != 1 or not is_call(x, aten.reshape.default):
            continue
        origin = operands(x)[0]
        if shape_of(origin)[-1] != shape_of(x)[-1] or (*shape_of(origin)[:-1], shape_of(linear)[-1]) != shape_of(node):
            continue
        with traced.graph.inserting_before(node):
            new = emit(traced.graph, aten.linear.default, origin, *operands(linear)[1:], source=source_of(linear))
        replace(node, new)
        traced.graph.erase_node(linear)
        outcome.changed += 1
