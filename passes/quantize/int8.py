"""W8A16: int8 weights with one float32 scale per output channel; activations stay as they are."""

from __future__ import annotations

import fnmatch
import re

import torch
from torch import Tensor, fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import (
    TracedGraph,
    add_weight,
    aten,
    dtype_of,
    emit,
    is_call,
    is_weight,
    operands,
    replace,
    shape_of,
    source_of,
)
from ..stages import Stage
from ..weights import Expression, Quantized

# Below this a row is all zeros: its scale would not be a normal float32.
_SMALLEST = 1e-30


def int8_per_channel(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric round-to-nearest of [n, k]: values int8 [n, k] and scale float32 [n] with weight ~ values * scale.

    No element is off by more than half its row's scale, which is the row's largest magnitude / 127.
    """
    wide = weight.float()
    scale = wide.abs().amax(1) / 127
    scale = torch.where(scale > _SMALLEST, scale, 1.0)
    values = torch.round(wide / scale[:, None]).clamp(-127, 127).to(torch.int8)
    return {"values": values, "scale": scale}


def selected(name: str, ctx: Context) -> bool:
    """Whether a stored weight is quantized: `targets` and `ignore` in llm-compressor's words.

    Args:
        name: its name in the checkpoint. A pattern is "Linear" (all of them), a module's name or its last part or
            several of its parts, a glob over the whole name, or "re:" and a regular expression.
    """

    def fits(pattern: str) -> bool:
        if pattern == "Linear":
            return True
        if pattern.startswith("re:"):
            return re.search(pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".") or f".{pattern}." in f".{name}."

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
            x, weight, bias = (*operands(node), None)[:3]
            if reason := _unfit(traced, weight, ctx):
                outcome.miss(node.name, reason)
                continue
            with graph.inserting_before(node):
                values, scale = _quantized(traced, weight)
                new = emit(graph, overload("linear_int8"), x, values, scale, bias, source=source_of(node))
            replace(node, new)
            outcome.changed += 1
        _share_with_embedding(traced, outcome)
        return outcome


def _unfit(traced: TracedGraph, weight: fx.Node, ctx: Context) -> str:
    """Why a linear keeps its weight, or ""."""
    if not is_weight(weight):
        return "its weight is computed"
    names = _expression(traced, weight).sources()
    kept = [name for name in names if not selected(name, ctx)]
    if not kept and names:
        return ""
    if len(kept) == len(names):
        return "not among the targets"
    return f"merged with {kept[0]}, which is not among the targets: skip merge-projections to quantize the rest"


def _expression(traced: TracedGraph, weight: fx.Node) -> Expression:
    return traced.weights.entries[str(weight.target)]


def _quantized(traced: TracedGraph, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
    part = _expression(traced, weight)
    n, k = shape_of(weight)
    values = Quantized(part, int8_per_channel, "values")
    scale = Quantized(part, int8_per_channel, "scale")
    return (
        add_weight(traced, f"{weight.target}__int8", values, (n, k), torch.int8),
        add_weight(traced, f"{weight.target}__scale", scale, (n,), torch.float32),
    )


def _share_with_embedding(traced: TracedGraph, outcome: Outcome) -> None:
    """A tied embedding reads the LM head's int8 rows, so that the matrix is not kept twice."""
    graph = traced.graph
    for node in [n for n in graph.nodes if is_call(n, aten.embedding.default)]:
        weight, ids = operands(node)[:2]
        if f"{weight.target}__int8" not in traced.weights.entries:
            continue
        with graph.inserting_before(node):
            values, scale = _quantized(traced, weight)
            like = emit(graph, aten.empty.memory_format, [0], dtype=dtype_of(node), device=torch.device("meta"))
            new = emit(graph, overload("embedding_int8"), ids, values, scale, like, source=source_of(node))
        replace(node, new)
        outcome.changed += 1
