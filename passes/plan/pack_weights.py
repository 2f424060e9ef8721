"""Lays weights out for the CPU's kernels when an artifact is built, so that nothing is rearranged when it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...runtime.ops import packed
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
from ..weights import Packed

_DENSE, _QUANTIZED = overload("linear_dense"), overload("linear_quantized")
_LONGEST_INT8 = 65536  # columns whose int8 products an int32 holds


class PackWeights:
    """On the CPU, weights of bfloat16, int8 and int4 become panels; an embedding that shares one reads it there."""

    name = "pack-weights"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """linear_dense and linear_quantized become linear_packed where it has the format."""
        outcome = Outcome()
        if ctx.device != "cpu":
            return outcome
        graph, done = traced.graph, set()
        for node in [n for n in graph.nodes if is_call(n, _DENSE, _QUANTIZED)]:
            if is_call(node, _DENSE):
                (x, weight, bias), scale, zero, format, group, activations = operands(node), None, None, "", [1, 0], ""
            else:
                x, weight, scale, zero, bias, format, group, activations = operands(node)
            rows, columns = shape_of(node)[-1], shape_of(x)[-1]
            if reason := _unfit(weight, columns, format, group, activations):
                outcome.miss(node.name, reason)
                continue
            with graph.inserting_before(node):
                parts = _pack(traced, weight, scale, zero, rows, columns, format)
                new = emit(
                    graph, overload("linear_packed"), x, *parts, bias, rows, format or "bfloat16",
                    _columns(group, columns), activations, source=source_of(node),
                )  # fmt: skip
            replace(node, new)
            done.add(weight.target)
            outcome.changed += 1
        for node in [n for n in graph.nodes if is_call(n, aten.embedding.default, overload("embedding_quantized"))]:
            outcome.changed += _share(traced, node, done)
        return outcome


def _unfit(weight: Any, columns: int, format: str, group: list[int], activations: str) -> str:
    """Why a weight keeps its layout, or ""."""
    if not is_weight(weight):
        return "its weight is computed"
    if not format:
        return "" if dtype_of(weight) == torch.bfloat16 else "no panels for its dtype"
    if format not in packed.PER_WORD:
        return f"no panels for {format}"
    size = _columns(group, columns)
    if group[0] != 1 or size % packed.UNIT:
        return f"a scale for {group[0]} x {group[1]} is read row by row"
    if activations and (activations, format, size) != ("int8", "int8", 0):
        return f"no panels for {format} in groups with {activations} activations"
    if activations and columns > _LONGEST_INT8:
        return f"{columns} columns are more than an int32 sum holds"
    return ""


def _columns(group: list[int], columns: int) -> int:
    """Columns per scale, 0 for a whole row."""
    return 0 if group[1] >= columns else group[1]


def _pack(
    traced: TracedGraph, weight: fx.Node, scale: fx.Node | None, zero: fx.Node | None, rows: int, columns: int,
    format: str,
) -> list[fx.Node | None]:  # fmt: skip
    format = format or "bfloat16"
    shape = packed.weight_shape(format, rows, columns)

    def part(node: fx.Node | None, how: str, shape: tuple[int, ...]) -> fx.Node | None:
        if node is None:
            return None
        expression = Packed(traced.weights.entries[str(node.target)], how)
        return add_weight(traced, f"{node.target}__packed", expression, shape, dtype_of(node))

    def groups(node: fx.Node | None) -> fx.Node | None:
        return node and part(node, "", (shape[0], shape_of(node)[1], packed.PANEL))

    return [part(weight, format, shape), groups(scale), groups(zero)]


def _share(traced: TracedGraph, node: fx.Node, packed_weights: set[str]) -> bool:
    """An embedding whose weight is packed for the LM head looks its rows up there, so that it is not kept twice."""
    graph = traced.graph
    if is_call(node, aten.embedding.default):
        (weight, ids), scale, zero, like, format, group = operands(node)[:2], None, None, None, "", [1, 0]
    else:
        ids, weight, scale, zero, like, format, group = operands(node)
    if weight.target not in packed_weights:
        return False
    columns = shape_of(node)[-1]
    with graph.inserting_before(node):
        parts = _pack(traced, weight, scale, zero, shape_of(weight)[0], columns, format)
        if like is None:
            like = emit(graph, aten.empty.memory_format, [0], dtype=dtype_of(node), device=torch.device("meta"))
        new = emit(
            graph, overload("embedding_packed"), ids, *parts, like, columns, format or "bfloat16",
            _columns(group, columns), source=source_of(node),
        )  # fmt: skip
    replace(node, new)
    return True
