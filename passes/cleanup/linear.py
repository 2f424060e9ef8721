"""Writes every product with a weight as `aten.linear`, so that later passes know one form."""

from __future__ import annotations

from ..base import Context, Outcome
from ..graph import TracedGraph, add_weight, aten, emit, is_call, shape_of
from ..stages import Stage
from ..weights import Transposed


class UnifyLinear:
    """addmm and mm with a stored weight become linear; weights stored [in, out] (GPT-2) are transposed once, at build."""

    name = "unify-linear"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Rewrite addmm(bias, x, w) and mm(x, w)."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if is_call(node, aten.addmm.default):
                bias, x, weight = node.args
                if node.kwargs:
                    outcome.miss(node.name, "addmm with alpha or beta")
                    continue
            elif is_call(node, aten.mm.default):
                (x, weight), bias = node.args, None
            else:
                continue
            if weight.op != "get_attr":
                outcome.miss(node.name, "the second matrix is computed, not stored")
                continue
            k, n = shape_of(weight)
            with traced.graph.inserting_before(node):
                turned = add_weight(
                    traced,
                    f"{weight.target}__t",
                    Transposed(traced.weights.entries[weight.target]),
                    (n, k),
                    weight.meta["val"].dtype,
                )
                new = emit(traced.graph, aten.linear.default, x, turned, bias, source=node.meta.get("source", ""))
            node.replace_all_uses_with(new)
            traced.graph.erase_node(node)
            outcome.changed += 1
        _absorb_reshapes(traced, outcome)
        return outcome


def _absorb_reshapes(traced: TracedGraph, outcome: Outcome) -> None:
    """reshape -> linear -> reshape that only fold and unfold leading dimensions become linear alone."""
    for node in list(traced.graph.nodes):
        if not is_call(node, aten.reshape.default) or not is_call(node.args[0], aten.linear.default):
            continue
        linear = node.args[0]
        x = linear.args[0]
        if len(linear.users) != 1 or not is_call(x, aten.reshape.default):
            continue
        origin = x.args[0]
        if shape_of(origin)[-1] != shape_of(x)[-1] or (*shape_of(origin)[:-1], shape_of(linear)[-1]) != shape_of(node):
            continue
        with traced.graph.inserting_before(node):
            new = emit(
                traced.graph, aten.linear.default, origin, *linear.args[1:], source=linear.meta.get("source", "")
            )
        node.replace_all_uses_with(new)
        traced.graph.erase_node(node)
        traced.graph.erase_node(linear)
        outcome.changed += 1
