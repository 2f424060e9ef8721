"""Samples inside the graph, so that decode steps can follow each other without the host in between."""

from __future__ import annotations

import torch
from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, emit, is_call
from ..stages import Stage

SAMPLING_INPUTS = (
    ("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32), ("min_p", torch.float32), ("seeds", torch.int64),
)  # fmt: skip


class SampleTokens:
    """Adds the sampling parameters of each row as inputs and returns (next_tokens, logits)."""

    name = "sample-tokens"
    needs = Stage.CACHED
    leaves = Stage.CACHED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """The random counter of a row is the position whose logits it samples from."""
        graph = traced.graph
        output = next(n for n in graph.nodes if n.op == "output")
        logits = output.args[0]
        if not isinstance(logits, fx.Node):
            return Outcome()
        named = {n.target: n for n in graph.nodes if n.op == "placeholder"}
        inputs = []
        for name, dtype in SAMPLING_INPUTS:
            last = [n for n in graph.nodes if n.op == "placeholder"][-1]
            with graph.inserting_after(last):
                node = graph.placeholder(name)
            node.meta = {"val": torch.empty(ctx.batch, dtype=dtype, device="meta"), "source": ""}
            inputs.append(node)
        with graph.inserting_before(output):
            counter = named["positions"]
            if ctx.length > 1:
                index = emit(graph, aten.reshape.default, named["last_index"], [ctx.batch, 1])
                counter = emit(graph, aten.gather.default, counter, 1, index)
            counter = emit(graph, aten.reshape.default, counter, [ctx.batch])
            tokens = emit(graph, overload("sample"), logits, *inputs, counter)
        output.args = ((tokens, logits),)
        return Outcome(changed=1)


def has_sampler(traced: TracedGraph) -> bool:
    """Whether the graph samples."""
    return any(is_call(n, overload("sample")) for n in traced.graph.nodes)
