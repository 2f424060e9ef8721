"""Computes logits only where a token is sampled."""

from __future__ import annotations

import torch
from torch import fx

from ..base import Context, Outcome
from ..graph import TracedGraph, aten, emit, is_call, meta_like, shape_of, value_of
from ..stages import Stage


class GatherLastToken:
    """The row at `last_index` (in decode: the only one) is taken before the LM head; the output becomes [batch, vocabulary]."""

    name = "gather-last-token"
    needs = Stage.CLEAN
    leaves = Stage.FUSED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Walk back from the logits over ops that treat each token alone, to the LM head."""
        outcome = Outcome()
        graph = traced.graph
        output = next(n for n in graph.nodes if n.op == "output")
        logits = output.args[0]
        if not isinstance(logits, fx.Node) or len(shape_of(logits)) != 3:
            return outcome
        if ctx.length > 1:
            chain, head = _chain_to_head(logits)
            if head is None:
                chain, x = [], logits
                outcome.miss(logits.name, "no LM head found behind the logits: all of them are computed")
            else:
                x = head.args[0]
            last = next((n for n in graph.nodes if n.op == "placeholder" and n.target == "last_index"), None)
            if last is None:
                placeholders = [n for n in graph.nodes if n.op == "placeholder"]
                with graph.inserting_after(placeholders[-1]):
                    last = graph.placeholder("last_index")
                last.meta = {"val": torch.empty(ctx.batch, dtype=torch.int64, device="meta"), "source": ""}
            with graph.inserting_after(x):
                index = emit(graph, aten.reshape.default, last, [ctx.batch, 1, 1])
            with graph.inserting_after(index):
                wide = emit(graph, aten.expand.default, index, [ctx.batch, 1, shape_of(x)[2]])
            with graph.inserting_after(wide):
                row = emit(graph, aten.gather.default, x, 1, wide)
            if head is None:
                logits = row
            else:
                for node in [head, *chain]:
                    node.args = tuple(row if a is x else a for a in node.args)
                    node.meta["val"] = meta_like(node.target(*fx.node.map_arg(node.args, value_of), **node.kwargs))
        with graph.inserting_before(output):
            logits = emit(graph, aten.reshape.default, logits, [ctx.batch, shape_of(logits)[2]])
            if logits.meta["val"].dtype != torch.float32:
                logits = emit(graph, aten._to_copy.default, logits, dtype=torch.float32)
        output.args = (logits,)
        outcome.changed = 1
        return outcome


_PER_TOKEN = (
    aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.add.Tensor, aten.sub.Tensor, aten._to_copy.default, aten.neg.default,
)  # fmt: skip


def _chain_to_head(logits: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The per-token ops between LM head and logits, first one first, and the head."""
    chain: list[fx.Node] = []
    node = logits
    while not is_call(node, aten.linear.default):
        tensors = [n for n in node.all_input_nodes if len(shape_of(n)) == 3]
        if not is_call(node, *_PER_TOKEN) or len(tensors) != 1:
            return [], None
        chain.append(node)
        node = tensors[0]
    return chain[::-1], node
