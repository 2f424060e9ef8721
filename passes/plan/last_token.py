"""Computes logits only where a token is sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..base import Context, Outcome
from ..graph import TracedGraph, add_input, aten, dtype_of, emit, is_call, meta_like, operands, shape_of, value_of
from ..stages import Stage

_PER_TOKEN = (
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.tanh.default,
    aten._to_copy.default,
)  # fmt: skip


class GatherLastToken:
    """The row at `last_index` (in decode: the only one) is taken before the LM head; logits are [batch, vocabulary]."""

    name = "gather-last-token"
    needs = Stage.CLEAN
    leaves = Stage.FUSED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Walk back from the logits over ops that treat each token alone, to the LM head."""
        outcome = Outcome()
        graph = traced.graph
        output = next(n for n in graph.nodes if n.op == "output")
        logits = operands(output)[0]
        if not isinstance(logits, fx.Node) or len(shape_of(logits)) != 3:
            return outcome
        if ctx.length > 1:
            chain = _chain_to_head(logits)
            if not chain:
                outcome.miss(logits.name, "no LM head found behind the logits: all of them are computed")
            x = operands(chain[0])[0] if chain else logits
            row = _gather(traced, x, ctx.batch, chain[0] if chain else output)
            for node in chain:
                _apply_to(node, x, row)
            logits = chain[-1] if chain else row
        with graph.inserting_before(output):
            logits = emit(graph, aten.reshape.default, logits, [ctx.batch, shape_of(logits)[2]])
            if dtype_of(logits) != torch.float32:
                logits = emit(graph, aten._to_copy.default, logits, dtype=torch.float32)
        output.args = (logits,)
        outcome.changed = 1
        return outcome


def _gather(traced: TracedGraph, x: fx.Node, batch: int, reader: fx.Node) -> fx.Node:
    """x [batch, length, width] at the new input last_index [batch] int64, as [batch, 1, width], before `reader`."""
    graph = traced.graph
    last = add_input(traced, "last_index", (batch,), torch.int64)
    with graph.inserting_before(reader):
        index = emit(graph, aten.reshape.default, last, [batch, 1, 1])
        wide = emit(graph, aten.expand.default, index, [batch, 1, shape_of(x)[2]])
        return emit(graph, aten.gather.default, x, 1, wide)


def _apply_to(node: fx.Node, x: fx.Node, row: fx.Node) -> None:
    """Let a per-token op read `row` instead of `x`, if it reads it, and compute its value again."""
    node.args = tuple(row if a is x else a for a in node.args)
    target: Any = node.target
    with torch.no_grad():
        args: Any = fx.node.map_arg(node.args, value_of)
        kwargs: Any = fx.node.map_arg(node.kwargs, value_of)
        node.meta["val"] = meta_like(target(*args, **kwargs))


def _chain_to_head(logits: fx.Node) -> list[fx.Node]:
    """The LM head and the per-token ops from there to the logits, in order; empty if there is none."""
    chain: list[fx.Node] = [logits]
    while not is_call(chain[-1], aten.linear.default):
        if not is_call(chain[-1], *_PER_TOKEN):
            return []
        tensors = [n for n in chain[-1].all_input_nodes if len(shape_of(n)) == 3]
        if len(tensors) != 1:
            return []
        chain.append(tensors[0])
    return chain[::-1]
