"""The order of int4's nibbles that the GPU's kernels read: a row's first half in the low ones, the second in the high.

A thread that loads a row's bytes then has columns that lie in order, and so are the activations they are multiplied
with. The weights are put into this order when they are written, not when they are loaded.
"""

from __future__ import annotations

import torch
from torch import fx

from ...runtime.ops.quantized import in_halves
from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, add_weight, emit, is_call, is_weight, operands, replace, shape_of, source_of
from ..stages import Stage
from ..weights import Applied

# Where each op has its weight and its format.
_PLACES = {overload("fused_linear"): (1, 13), overload("embedding_quantized"): (1, 5)}


class OrderNibbles:
    """For CUDA: int4 weights are stored as halves of rows, in the order in which kernels read them."""

    name = "order-nibbles"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Every op that reads a weight of the format int4 reads one of int4_halves."""
        outcome = Outcome()
        if ctx.device != "cuda":
            return outcome
        for node in [n for n in traced.graph.nodes if is_call(n, *_PLACES)]:
            place, form = _PLACES[node.target]
            weight, arguments = operands(node)[place], list(operands(node))
            if arguments[form] != "int4":
                continue
            if not is_weight(weight):
                outcome.miss(node.name, "its weight is computed")
                continue
            with traced.graph.inserting_before(node):
                arguments[place], arguments[form] = _ordered(traced, weight), "int4_halves"
                new = emit(traced.graph, node.target, *arguments, source=source_of(node))
            replace(node, new)
            outcome.changed += 1
        return outcome


def _ordered(traced: TracedGraph, weight: fx.Node) -> fx.Node:
    expression = Applied(traced.weights.entries[str(weight.target)], in_halves)
    return add_weight(traced, f"{weight.target}__halves", expression, shape_of(weight), torch.uint8)
