"""Turns what depends on positions alone into a table with one row per position."""

from __future__ import annotations

import torch
from torch import fx

from ..base import Context, Outcome
from ..cleanup.fold_constants import evaluator, is_constant
from ..graph import TracedGraph, add_weight, aten, emit, is_call, replace, shape_of, source_of
from ..stages import Stage
from ..weights import Constant

_LARGEST_BYTES = 256 << 20


class PositionTables:
    """Cosines and sines of RoPE (and whatever else follows from positions alone) are looked up, not computed."""

    name = "position-tables"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Replace each outermost position-only node by `table[positions]`.

        The table is made by running the model's own subgraph on every position up to max_length, in pieces of the
        traced shape, so it holds the very bits the model would compute.
        """
        outcome = Outcome()
        positions = next(n for n in traced.graph.nodes if n.op == "placeholder" and n.target == "positions")
        dependent: set[fx.Node] = {positions}
        for node in traced.graph.nodes:
            inputs = node.all_input_nodes
            follows = node.op == "call_function" and bool(inputs) and all(n in dependent for n in inputs)
            if follows or is_constant(traced, node):
                dependent.add(node)
        for node in [n for n in traced.graph.nodes if n in dependent and n.op == "call_function"]:
            if all(user in dependent for user in node.users) or _is_lookup(node):
                continue
            if reason := _unfit(node, positions, ctx):
                outcome.miss(node.name, reason)
                continue
            table = _table(traced, node, positions, ctx)
            if table is None:
                outcome.miss(node.name, "its value depends on more than each token's own position")
                continue
            constant = Constant(table)
            with traced.graph.inserting_before(node):
                weight = add_weight(traced, f"positions_{constant.digest()[:16]}", constant, table.shape, table.dtype)
                new = emit(traced.graph, aten.embedding.default, weight, positions, source=source_of(node))
                if shape_of(node) != shape_of(new):
                    new = emit(traced.graph, aten.reshape.default, new, list(shape_of(node)))
            replace(node, new)
            outcome.changed += 1
        return outcome


def _is_lookup(node: fx.Node) -> bool:
    """Whether the node is a table's row already, as this pass writes it."""
    if is_call(node, aten.reshape.default):
        return is_call(node.args[0], aten.embedding.default)
    return is_call(node, aten.embedding.default)


def _unfit(node: fx.Node, positions: fx.Node, ctx: Context) -> str:
    """Why the node cannot be a table, or ""."""
    value = node.meta["val"]
    if positions not in _inputs(node):
        return "it does not depend on positions"
    if not isinstance(value, torch.Tensor) or value.numel() % (ctx.batch * ctx.length):
        return "its shape does not hold one row per token"
    width = value.numel() // (ctx.batch * ctx.length)
    if width * ctx.max_length * value.element_size() > _LARGEST_BYTES:
        return "its table would be too large"
    # One row per token in order: leading dimensions multiply to batch * length, ones in between allowed.
    leading = 1
    for size in value.shape:
        leading *= size
        if leading == ctx.batch * ctx.length:
            return ""
    return "tokens are not its leading dimensions"


def _inputs(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in found:
            found.add(top)
            stack += top.all_input_nodes
    return found


def _table(traced: TracedGraph, node: fx.Node, positions: fx.Node, ctx: Context) -> torch.Tensor | None:
    """[max_length, width], or None when a token's row depends on its neighbours."""
    step, last = ctx.batch * ctx.length, ctx.max_length - 1
    evaluate = evaluator(traced)

    def rows(where: torch.Tensor) -> torch.Tensor:
        return evaluate(node, {positions: where.reshape(ctx.batch, ctx.length)}).reshape(step, -1)

    pieces = [rows(torch.arange(start, start + step).clamp(max=last)) for start in range(0, ctx.max_length, step)]
    table = torch.cat(pieces)[: ctx.max_length].contiguous()
    # The same tokens among other neighbours: spread over all positions, backwards, and among none but their equals.
    spread = torch.linspace(last, 0, step, dtype=torch.float64).long()
    for where in (spread, torch.full((step,), ctx.max_length // 2)):
        if not torch.equal(rows(where), table[where]):
            return None
    return table
