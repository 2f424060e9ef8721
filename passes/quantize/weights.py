"""Linear weights become quantized ones, by the recipe's groups; a tied embedding reads the LM head's rows."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

import torch
from torch import fx

from ...runtime.ops.quantized import PACKED
from ...runtime.ops.schema import overload
from ..base import Context, Outcome, QuantizationGroup
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
from ..weights import Concat, Expression, Quantized
from .round_to_nearest import RoundToNearest
from .schemes import SCHEMES


def selected(name: str, group: QuantizationGroup) -> bool:
    """Whether a stored weight belongs to a group: `targets` and `ignore` in llm-compressor's words.

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

    return any(map(fits, group.targets)) and not any(map(fits, group.ignore))


@dataclass(frozen=True)
class _Form:
    """How one weight is to be stored: its format, the rows and columns of a scale, and what makes the values."""

    format: str
    group: tuple[int, int]
    activations: str
    make: RoundToNearest


class QuantizeWeights:
    """Linear weights, and an embedding that shares its weight with the LM head, become int8, int4 or fp8."""

    name = "quantize-weights"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = False

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Runs where the recipe has a scheme."""
        outcome = Outcome()
        if not ctx.quantization:
            return outcome
        graph = traced.graph
        tied: dict[str, _Form] = {}
        for node in [n for n in graph.nodes if is_call(n, aten.linear.default)]:
            x, weight, bias = (*operands(node), None)[:3]
            form = _form(traced, weight, ctx)
            if isinstance(form, str):
                outcome.miss(node.name, form)
                continue
            with graph.inserting_before(node):
                parts = _quantized(traced, weight, form)
                new = emit(
                    graph, overload("linear_quantized"), x, *parts, bias, form.format, list(form.group),
                    form.activations, source=source_of(node),
                )  # fmt: skip
            replace(node, new)
            tied[str(weight.target)] = form
            outcome.changed += 1
        for node in [n for n in graph.nodes if is_call(n, aten.embedding.default)]:
            weight, ids = operands(node)[:2]
            if str(weight.target) in tied:
                _share(traced, node, weight, ids, tied[str(weight.target)])
                outcome.changed += 1
        return outcome


def _form(traced: TracedGraph, weight: fx.Node, ctx: Context) -> _Form | str:
    """How a linear's weight is stored, or why it stays as it is."""
    if not is_weight(weight):
        return "its weight is computed"
    names = traced.weights.entries[str(weight.target)].sources()
    groups = [next((g for g in ctx.quantization if selected(name, g)), None) for name in names]
    group = next((g for g in groups if g is not None), None)
    if group is None:
        return "not among the targets"
    odd = [name for name, other in zip(names, groups) if other != group]
    if odd:
        return f"merged with {odd[0]}, which is quantized otherwise: skip merge-projections to quantize the rest"
    columns = shape_of(weight)[1]
    scheme = SCHEMES[group.scheme]
    size = group.group_size if scheme.grouped else 0
    if (size and columns % size) or (scheme.format in PACKED and columns % 2):
        return f"its {columns} columns are no multiple of a group of {size}"
    make = RoundToNearest(scheme.format, size, group.symmetric or not scheme.grouped)
    return _Form(scheme.format, (1, size or columns), scheme.activations, make)


def _quantized(traced: TracedGraph, weight: fx.Node, form: _Form) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Values, scale and zero point of a weight as weights of the graph; a merged one's are those of its parts."""
    entry = traced.weights.entries[str(weight.target)]
    n, k = shape_of(weight)
    blocks = (n, k // form.group[1])
    packed = form.format in PACKED
    dtypes = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}

    def part(output: str, suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        return add_weight(traced, f"{weight.target}__{suffix}", _part(entry, form.make, output), shape, dtype)

    values = part("values", form.format, (n, k // 2 if packed else k), dtypes[form.format])
    scale = part("scale", "scale", blocks, torch.float16 if form.format == "int4" else torch.float32)
    zero = None if form.make.symmetric else part("zero", "zero", blocks, torch.uint8)
    return values, scale, zero


def _part(entry: Expression, make: RoundToNearest, output: str) -> Expression:
    if isinstance(entry, Concat):
        return Concat(tuple(_part(part, make, output) for part in entry.parts))
    return Quantized(entry, make, output)


def _share(traced: TracedGraph, node: fx.Node, weight: fx.Node, ids: fx.Node, form: _Form) -> None:
    """A tied embedding reads the LM head's quantized rows, so that the matrix is not kept twice."""
    graph = traced.graph
    with graph.inserting_before(node):
        parts = _quantized(traced, weight, form)
        like = emit(graph, aten.empty.memory_format, [0], dtype=dtype_of(node), device=torch.device("meta"))
        new = emit(
            graph, overload("embedding_quantized"), ids, *parts, like, form.format, list(form.group),
            source=source_of(node),
        )  # fmt: skip
    replace(node, new)
