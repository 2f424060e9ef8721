"""W8A16: int8 weights with one float32 scale per output channel; activations stay as they are."""

from __future__ import annotations

import fnmatch
import re

import torch
from torch import Tensor, fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, add_weight, aten, emit, is_call, shape_of
from ..stages import Stage
from ..weights import Quantized


def int8_per_channel(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric round-to-nearest of [n, k]: values int8 [n, k] and scale float32 [n] with weight ~ values * scale."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    values = torch.round(wide / scale[:, None]).clamp(-127, 127).to(torch.int8)
    return {"values": values, "scale": scale}


def selected(name: str, ctx: Context) -> bool:
    """Whether a weight is quantized: `targets` and `ignore` in llm-compressor's words ("Linear", globs, "re:…")."""

    def fits(pattern: str) -> bool:
        dotted = name.replace("__", ".")
        if pattern == "Linear":
            return True
        if pattern.startswith("re:"):
            return re.search(pattern[3:], dotted) is not None
        return (
            fnmatch.fnmatchcase(dotted, pattern) or dotted.startswith(pattern + ".") or f".{pattern}." in f".{dotted}."
        )

    return any(map(fits, ctx.targets)) and not any(map(fits, ctx.ignore))


class QuantizeInt8:
    """Linear weights, and an embedding that shares its weight with the LM head, become int8 with a scale per row."""

    name = "quantize-w8a16"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = False

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Runs when the recipe's scheme is W8A16."""
        outcome = Outcome()
        if ctx.scheme != "W8A16":
            return outcome
        graph = traced.graph
        for node in [n for n in graph.nodes if is_call(n, aten.linear.default)]:
            weight = node.args[1]
            if weight.op != "get_attr" or not selected(str(weight.target), ctx):
                outcome.miss(
                    node.name, "not among the targets" if weight.op == "get_attr" else "its weight is computed"
                )
                continue
            with graph.inserting_before(node):
                values, scale = _quantized(traced, weight)
                bias = node.args[2] if len(node.args) > 2 else None
                new = emit(
                    graph,
                    overload("linear_int8"),
                    node.args[0],
                    values,
                    scale,
                    bias,
                    source=node.meta.get("source", ""),
                )
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            outcome.changed += 1
        _share_with_embedding(traced, outcome)
        return outcome


def _quantized(traced: TracedGraph, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
    part = traced.weights.entries[str(weight.target)]
    n, k = shape_of(weight)
    values = add_weight(
        traced, f"{weight.target}__int8", Quantized(part, int8_per_channel, "values"), (n, k), torch.int8
    )
    scale = add_weight(
        traced, f"{weight.target}__scale", Quantized(part, int8_per_channel, "scale"), (n,), torch.float32
    )
    return values, scale


def _share_with_embedding(traced: TracedGraph, outcome: Outcome) -> None:
    """A tied embedding reads the LM head's int8 rows, so that the matrix is not kept twice."""
    graph = traced.graph
    for node in [n for n in graph.nodes if is_call(n, aten.embedding.default)]:
        weight = node.args[0]
        if f"{weight.target}__int8" not in traced.weights.entries:
            continue
        with graph.inserting_before(node):
            values, scale = _quantized(traced, weight)
            like = emit(graph, aten.empty.memory_format, [0], dtype=node.meta["val"].dtype, device=torch.device("meta"))
            new = emit(
                graph, overload("embedding_int8"), node.args[1], values, scale, like, source=node.meta.get("source", "")
            )
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        outcome.changed += 1
