"""Chooses, per target, which ops are served by Ingot's own kernels and which are left to the back end's code generator."""

from __future__ import annotations

import torch

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, emit, is_call
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
            weight = node.args[1]
            if weight.op != "get_attr" or weight.meta["val"].dtype not in _KERNEL_DTYPES:
                outcome.miss(node.name, "its weight is computed" if weight.op != "get_attr" else "no kernel for its dtype")
                continue
            bias = node.args[2] if len(node.args) > 2 else None
            with traced.graph.inserting_before(node):
                new = emit(
                    traced.graph, overload("linear_dense"), node.args[0], weight, bias, source=node.meta.get("source", "")
                )
            node.replace_all_uses_with(new)
            traced.graph.erase_node(node)
            outcome.changed += 1
        return outcome
