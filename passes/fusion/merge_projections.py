"""Reads an input once: linear layers of the same input become one with their weights stacked."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from ..base import Context, Outcome
from ..graph import TracedGraph, add_weight, aten, emit, is_call, shape_of
from ..stages import Stage
from ..weights import Concat


class MergeProjections:
    """Query, key and value (and gate and up) projections of one input become one matrix, stacked when weights are written."""

    name = "merge-projections"
    needs = Stage.CLEAN
    leaves = Stage.FUSED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Group linear calls by input; every output of the stacked product is a slice of it."""
        outcome = Outcome()
        groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in traced.graph.nodes:
            if is_call(node, aten.linear.default) and node.args[1].op == "get_attr":
                groups[node.args[0]].append(node)
        for x, linears in groups.items():
            if len(linears) < 2:
                continue
            first = linears[0]
            if len({_bias(n) is None for n in linears}) > 1:
                outcome.miss(first.name, "some of the layers have a bias and some have none")
                continue
            if len({n.args[1] for n in linears}) < len(linears) or any(len(n.args[1].users) > 1 for n in linears):
                outcome.miss(first.name, "a weight is used elsewhere too")
                continue
            if len({n.args[1].meta["val"].dtype for n in linears}) > 1:
                outcome.miss(first.name, "the weights differ in dtype")
                continue
            _merge(traced, x, linears)
            outcome.changed += len(linears)
        return outcome


def _bias(linear: fx.Node) -> fx.Node | None:
    return linear.args[2] if len(linear.args) > 2 else None  # type: ignore[return-value]


def _merge(traced: TracedGraph, x: fx.Node, linears: list[fx.Node]) -> None:
    weights = [n.args[1] for n in linears]
    biases = [b for n in linears if (b := _bias(n)) is not None]
    sizes = [shape_of(w)[0] for w in weights]
    entries = traced.weights.entries
    first = linears[0]
    with traced.graph.inserting_before(first):
        merged = add_weight(
            traced, "__and__".join([str(weights[0].target), *(_leaf(w) for w in weights[1:])]),
            Concat(tuple(entries[w.target] for w in weights)), (sum(sizes), shape_of(weights[0])[1]), weights[0].meta["val"].dtype,
        )  # fmt: skip
        bias = None
        if biases:
            bias = add_weight(
                traced, "__and__".join([str(biases[0].target), *(_leaf(b) for b in biases[1:])]),
                Concat(tuple(entries[b.target] for b in biases)), (sum(sizes),), biases[0].meta["val"].dtype,
            )  # fmt: skip
        product = emit(traced.graph, aten.linear.default, x, merged, bias, source=first.meta.get("source", ""))
        start, rank = 0, len(shape_of(product))
        for linear, size in zip(linears, sizes):
            part = emit(
                traced.graph,
                aten.slice.Tensor,
                product,
                rank - 1,
                start,
                start + size,
                source=linear.meta.get("source", ""),
            )
            linear.replace_all_uses_with(part)
            start += size


def _leaf(weight: fx.Node) -> str:
    """The part of a weight's name that tells it from its neighbours: `k_proj`."""
    parts = str(weight.target).split("__")
    return parts[-2] if len(parts) > 1 else parts[-1]
