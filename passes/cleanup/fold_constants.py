"""Evaluates at build what depends on small constants alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..base import Context, Outcome
from ..graph import TracedGraph, add_weight, replace
from ..stages import Stage
from ..weights import Constant

_LARGEST_ELEMENTS = 1 << 20


def is_constant(traced: TracedGraph, node: fx.Node) -> bool:
    """Whether the node reads a weight whose value is known at build."""
    return node.op == "get_attr" and isinstance(traced.weights.entries[str(node.target)], Constant)


def evaluator(traced: TracedGraph) -> Callable[[fx.Node, dict[fx.Node, torch.Tensor]], torch.Tensor]:
    """A function that computes a node on the CPU from constants and the given values of other nodes."""

    def evaluate(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        if node in known:
            return known[node]
        if node.op == "get_attr":
            entry = traced.weights.entries[str(node.target)]
            if not isinstance(entry, Constant):
                raise ValueError(f"{node.name} is not a constant")
            value = entry.value
        else:
            target: Any = node.target
            args: Any = fx.node.map_arg(node.args, lambda n: evaluate(n, known))
            kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: evaluate(n, known))
            if "device" in kwargs:
                kwargs = {**kwargs, "device": torch.device("cpu")}
            value = target(*args, **kwargs)
        known[node] = value
        return value

    return evaluate


class FoldConstants:
    """Subgraphs of constants are evaluated at build (scales, inverse frequencies, aranges)."""

    name = "fold-constants"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Fold every maximal constant node whose value is small."""
        outcome = Outcome()
        constant: set[fx.Node] = set()
        for node in traced.graph.nodes:
            follows = node.op == "call_function" and all(n in constant for n in node.all_input_nodes)
            if follows or is_constant(traced, node):
                constant.add(node)
        evaluate = evaluator(traced)
        for node in [n for n in traced.graph.nodes if n in constant and n.op == "call_function"]:
            if all(user in constant for user in node.users) or not isinstance(node.meta["val"], torch.Tensor):
                continue
            if node.meta["val"].numel() > _LARGEST_ELEMENTS:
                outcome.miss(node.name, f"its value has {node.meta['val'].numel()} elements")
                continue
            value = Constant(evaluate(node, {}).contiguous())
            with traced.graph.inserting_before(node):
                new = add_weight(traced, f"folded_{value.digest()[:16]}", value, value.value.shape, value.value.dtype)
            constant.add(new)
            replace(node, new)
            outcome.changed += 1
        return outcome
