"""Linear weights that the checkpoint holds quantized stay so: values, scales and zero points are read as they are.

The trace knows them as dense ones. What a checkpoint holds comes in the context, in the ops' own layout, so that this
pass knows no checkpoint's format; without it the same weights are made dense when they are read.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import (
    TracedGraph,
    add_weight,
    aten,
    emit,
    is_call,
    is_weight,
    operands,
    replace,
    shape_of,
    source_of,
)
from ..stages import Stage
from ..weights import Concat, Expression, Stored
from .held import QuantizedPart, QuantizedWeight, stackable


class KeepQuantized:
    """Linear weights that the checkpoint holds quantized are not made dense."""

    name = "keep-quantized"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = False  # activations may be quantized too

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Runs where the checkpoint holds quantized weights.

        Facts: `held`, elements by format; `activations`, what activations are quantized to.
        """
        outcome, elements, activations = Outcome(), Counter[str](), set[str]()
        for node in [n for n in traced.graph.nodes if is_call(n, aten.linear.default)] if ctx.held else []:
            weight = operands(node)[1]
            parts = _parts(traced, weight)
            held = [ctx.held[part.name] for part in parts if part.name in ctx.held]
            if not held:
                continue
            if reason := _unfit(parts, held):
                outcome.miss(node.name, f"{reason}: made dense")
                continue
            _rewrite(traced, node, held)
            for note in dict.fromkeys(part.note for part in held if part.note):
                outcome.miss(node.name, note)
            outcome.changed += 1
            activations.add(held[0].activations)
            elements[held[0].format] += sum(part.rows for part in held) * shape_of(weight)[1]
        if elements:
            outcome.facts |= {"held": dict(elements), "activations": sorted(activations - {""})}
        _tell_of_dense(traced, ctx, outcome)
        return outcome


def _tell_of_dense(traced: TracedGraph, ctx: Context, outcome: Outcome) -> None:
    """What the checkpoint holds quantized and no op here does: experts."""
    for attribute, entry in traced.weights.entries.items():
        if isinstance(entry, Stored) and entry.name in ctx.made_dense:
            outcome.miss(attribute, f"{ctx.made_dense[entry.name]}: made dense, exactly")


def _parts(traced: TracedGraph, weight: fx.Node) -> list[Stored]:
    """The checkpoint's weights that a linear's weight is the rows of; none if it is anything else."""
    if not is_weight(weight):
        return []
    entry = traced.weights.entries[str(weight.target)]
    parts = entry.parts if isinstance(entry, Concat) else (entry,)
    return [part for part in parts if isinstance(part, Stored)] if all(isinstance(p, Stored) for p in parts) else []


def _unfit(parts: list[Stored], held: list[QuantizedWeight]) -> str:
    """Why what was merged cannot be read quantized, or "": merge-projections sees to it that there is no reason."""
    if len(held) < len(parts):
        return "merged with a weight that is dense"
    if any(other.form != held[0].form for other in held):
        return "merged, and the checkpoint holds them in different forms"
    return "" if stackable(held) else "merged, and their blocks of rows do not meet"


def _rewrite(traced: TracedGraph, node: fx.Node, held: list[QuantizedWeight]) -> None:
    x, weight, bias = (*operands(node), None)[:3]
    first, graph = held[0], traced.graph
    with graph.inserting_before(node):
        if first.columns is not None:
            order = add_weight(traced, f"{weight.target}__columns", first.columns, (shape_of(x)[-1],), torch.int64)
            x = emit(graph, aten.index_select.default, x, len(shape_of(x)) - 1, order, source=source_of(node))
        values = _stacked(traced, f"{weight.target}__{first.format}", [part.values for part in held])
        scale = _stacked(traced, f"{weight.target}__scale", [part.scale for part in held])
        zeros = [part.zero for part in held if part.zero is not None]
        zero = _stacked(traced, f"{weight.target}__zero", zeros) if zeros else None
        new = emit(
            graph, overload("linear_quantized"), x, values, scale, zero, bias, first.format, list(first.group),
            first.activations, source=source_of(node),
        )  # fmt: skip
    replace(node, new)


def _stacked(traced: TracedGraph, name: str, parts: list[QuantizedPart]) -> fx.Node:
    expressions = tuple(part.expression for part in parts)
    made: Expression = expressions[0] if len(parts) == 1 else Concat(expressions)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return add_weight(traced, name, made, shape, parts[0].dtype)
