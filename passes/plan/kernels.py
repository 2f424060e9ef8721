"""Chooses, per target, which ops Ingot's own kernels serve and which are left to the back end's code generator."""

from __future__ import annotations

import torch

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, dtype_of, emit, is_call, is_weight, operands, replace, source_of
from ..stages import Stage

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SelectKernels:
    """On the CPU, products with stored weights go to Ingot's kernel, which streams each weight once at memory speed."""

    name = "select-kernels"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """linear with a stored weight becomes ingot.linear_dense; other products are near misses."""
        outcome = Outcome()
        if ctx.device != "cpu":
            return outcome
        for node in [n for n in traced.graph.nodes if is_call(n, aten.linear.default)]:
            x, weight, bias = (*operands(node), None)[:3]
            if not is_weight(weight):
                outcome.miss(node.name, "its weight is computed")
                continue
            if dtype_of(weight) not in _KERNEL_DTYPES:
                outcome.miss(node.name, "no kernel for its dtype")
                continue
            with traced.graph.inserting_before(node):
                new = emit(traced.graph, overload("linear_dense"), x, weight, bias, source=source_of(node))
            replace(node, new)
            outcome.changed += 1
        return outcome
