"""Samples inside the graph, so that decode steps can follow each other without the host in between."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, add_input, aten, emit, operands
from ..stages import Stage

SAMPLING_INPUTS = (
    ("temperature", torch.float32),
    ("top_k", torch.int32),
    ("top_p", torch.float32),
    ("min_p", torch.float32),
    ("seeds", torch.int64),
)


class SampleTokens:
    """Adds the sampling parameters of each row as inputs and returns (next_tokens, logits).

    On the GPU also the logit of each sampled token: logits stay on the device, and the host looks for NaN in these.
    """

    name = "sample-tokens"
    needs = Stage.CACHED
    leaves = Stage.CACHED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """The random counter of a row is the position whose logits it samples from."""
        graph = traced.graph
        output = next(n for n in graph.nodes if n.op == "output")
        logits = operands(output)[0]
        if not isinstance(logits, fx.Node):
            return Outcome()
        named = {n.target: n for n in graph.nodes if n.op == "placeholder"}
        inputs = [add_input(traced, name, (ctx.batch,), dtype) for name, dtype in SAMPLING_INPUTS]
        with graph.inserting_before(output):
            counter = named["positions"]
            if ctx.length > 1:
                index = emit(graph, aten.reshape.default, named["last_index"], [ctx.batch, 1])
                counter = emit(graph, aten.gather.default, counter, 1, index)
            counter = emit(graph, aten.reshape.default, counter, [ctx.batch])
            if ctx.device == "cuda":
                both = emit(graph, overload("sample_with_logit"), logits, *inputs, counter)
                tokens, logit = (emit(graph, operator.getitem, both, i) for i in range(2))
                output.args = ((tokens, logits, logit),)
            else:
                output.args = ((emit(graph, overload("sample"), logits, *inputs, counter), logits),)
        return Outcome(changed=1)
