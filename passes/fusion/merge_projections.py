"""Reads an input once: linear layers of the same input become one with their weights stacked."""

from __future__ import annotations

from collections import Counter, defaultdict

from torch import fx

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
from ..quantize.held import QuantizedWeight, stackable
from ..quantize.select import Roles, group_of, is_router, roles_of
from ..stages import Stage
from ..weights import Concat


class MergeProjections:
    """Query, key and value (and gate and up) projections of one input become one matrix, stacked at build."""

    name = "merge-projections"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Group linear calls by input; every output of the stacked product is a slice of it."""
        outcome = Outcome()
        groups: dict[tuple[fx.Node, object], list[fx.Node]] = defaultdict(list)
        roles = roles_of(traced)
        for node in traced.graph.nodes:
            if is_call(node, aten.linear.default) and is_weight(node.args[1]):
                groups[operands(node)[0], _form(node, roles, ctx)].append(node)
        apart = Counter(x for x, _ in groups)
        for (x, _), linears in groups.items():
            if apart[x] > 1:
                outcome.miss(linears[0].name, "others of its input are quantized otherwise")
            if len(linears) < 2:
                continue
            if reason := _unfit(linears) or _held_apart(linears, roles, ctx):
                outcome.miss(linears[0].name, reason)
                continue
            _merge(traced, x, linears)
            outcome.changed += len(linears)
        return outcome


def _form(linear: fx.Node, roles: Roles, ctx: Context) -> object:
    """What quantization will make of a layer's weight: only layers that agree in this can be stacked."""
    if held := _held(linear, roles, ctx):
        return held.form
    if not ctx.quantization or is_router(linear):
        return None
    return group_of(roles[str(_weight(linear).target)][0], ctx.quantization)


def _held(linear: fx.Node, roles: Roles, ctx: Context) -> QuantizedWeight | None:
    """The layer's weight where the checkpoint holds it quantized already."""
    parts = roles[str(_weight(linear).target)]
    return ctx.held.get(parts[0][0].name) if parts else None


def _held_apart(linears: list[fx.Node], roles: Roles, ctx: Context) -> str:
    held = [weight for linear in linears if (weight := _held(linear, roles, ctx))]
    return "" if stackable(held) else f"the checkpoint's blocks of {held[0].group[0]} rows do not meet"


def _weight(linear: fx.Node) -> fx.Node:
    weight: fx.Node = operands(linear)[1]
    return weight


def _bias(linear: fx.Node) -> fx.Node | None:
    return operands(linear)[2] if len(linear.args) > 2 else None


def _unfit(linears: list[fx.Node]) -> str:
    """Why layers of the same input cannot be stacked, or ""."""
    weights, biases = [_weight(n) for n in linears], [_bias(n) for n in linears]
    if any(b is None for b in biases) and not all(b is None for b in biases):
        return "some of the layers have a bias and some have none"
    if not all(b is None or is_weight(b) for b in biases):
        return "a bias is computed, not stored"
    if len(set(weights)) < len(weights) or any(len(w.users) > 1 for w in weights):
        return "a weight is used elsewhere too"
    if len({dtype_of(w) for w in weights}) > 1:
        return "the weights differ in dtype"
    return ""


def _merge(traced: TracedGraph, x: fx.Node, linears: list[fx.Node]) -> None:
    first = linears[0]
    sizes = [shape_of(_weight(n))[0] for n in linears]
    with traced.graph.inserting_before(first):
        merged = _stacked(traced, [_weight(n) for n in linears])
        biases = [b for n in linears if (b := _bias(n)) is not None]
        bias = _stacked(traced, biases) if biases else None
        product = emit(traced.graph, aten.linear.default, x, merged, bias, source=source_of(first))
        start, last = 0, len(shape_of(product)) - 1
        parts = []
        for linear, size in zip(linears, sizes):
            stop = start + size
            part = emit(traced.graph, aten.slice.Tensor, product, last, start, stop, source=source_of(linear))
            parts.append(part)
            start = stop
    for linear, part in zip(linears, parts):
        replace(linear, part)


def _stacked(traced: TracedGraph, weights: list[fx.Node]) -> fx.Node:
    """One weight with the rows of all, named after all: `…q_proj__weight__and__k_proj__and__v_proj`."""
    name = "__and__".join([str(weights[0].target), *(_leaf(w) for w in weights[1:])])
    parts = Concat(tuple(traced.weights.entries[str(w.target)] for w in weights))
    shape = (sum(shape_of(w)[0] for w in weights), *shape_of(weights[0])[1:])
    return add_weight(traced, name, parts, shape, dtype_of(weights[0]))


def _leaf(weight: fx.Node) -> str:
    """The part of a weight's name that tells it from its neighbours: `k_proj`."""
    parts = str(weight.target).split("__")
    return parts[-2] if len(parts) > 1 else parts[-1]
