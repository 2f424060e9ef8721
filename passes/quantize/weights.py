"""Linear weights and embeddings become quantized ones, by the recipe's groups; a tied pair shares its rows."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from ...runtime.ops.cuda.linear_problem import DECODE_ROWS
from ...runtime.ops.quantized import PACKED
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
    op_name,
    operands,
    replace,
    shape_of,
    source_of,
)
from ..stages import Stage
from ..weights import Concat, Expression, Quantized, Scales
from .round_to_nearest import RoundToNearest
from .schemes import SCHEMES
from .select import Role, Roles, group_of, is_router, read_by, roles_of

_QUANTIZED = (overload("linear_quantized"), overload("embedding_quantized"))
_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class _Form:
    """How one weight is to be stored: its format, the rows and columns of a scale, and what makes the values."""

    format: str
    group: tuple[int, int]
    activations: str
    make: RoundToNearest


class QuantizeWeights:
    """Weights of linear layers and embeddings become int8, int4 or fp8; a tied pair is one weight for both."""

    name = "quantize-weights"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = False

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Runs where the recipe has a scheme.

        Facts: `quantized`, elements by format; `indivisible`, what a group size does not divide.
        """
        outcome = Outcome()
        if not ctx.quantization:
            return outcome
        roles = roles_of(traced)
        forms: dict[str, _Form | str] = {}
        for node in list(traced.graph.nodes):
            if not is_call(node, aten.linear.default, aten.embedding.default):
                continue
            weight, kind = read_by(node)
            if weight is None:
                if is_call(node, aten.linear.default):
                    outcome.miss(node.name, "its weight is computed")
                continue
            attribute = str(weight.target)
            if attribute not in forms:
                forms[attribute] = _form(traced, weight, roles, ctx, outcome)
            form = forms[attribute]
            if isinstance(form, str):
                if roles[attribute]:
                    outcome.miss(node.name, form)
                continue
            if kind == "Linear":
                rows = math.prod(shape_of(node)[:-1])
                # A step of few rows waits for weights on the GPU, not for products: activations stay as they are.
                few = ctx.device == "cuda" and rows <= DECODE_ROWS
                _replace_linear(traced, node, weight, dataclasses.replace(form, activations="") if few else form)
            else:
                _replace_embedding(traced, node, weight, form)
            outcome.changed += 1
        _report_others(traced, roles, ctx, outcome)
        elements = Counter[str]()
        for attribute, form in forms.items():
            if isinstance(form, _Form):
                elements[form.format] += getattr(traced.gm, attribute).numel()
        if elements:
            outcome.facts["quantized"] = dict(elements)
        return outcome


def _form(traced: TracedGraph, weight: fx.Node, roles: Roles, ctx: Context, outcome: Outcome) -> _Form | str:
    """How a weight is stored, or why it stays as it is."""
    attribute = str(weight.target)
    groups = [group_of(part, ctx.quantization) for part in roles[attribute]]
    group = next((g for g in groups if g is not None), None)
    if group is None:
        return "not among the targets"
    readers = [n for n in traced.graph.nodes if (read := read_by(n)[0]) is not None and read.target == attribute]
    if any(is_router(n) for n in readers):
        return "a router: it chooses experts"
    if all(is_call(n, aten.embedding.default) and not _reads_tokens(n) for n in readers):
        return "a table over positions"
    odd = [part[0].name for part, other in zip(roles[attribute], groups) if other != group]
    if odd:
        return f"merged with {odd[0]}, which is quantized otherwise"
    columns, scheme = shape_of(weight)[1], SCHEMES[group.scheme]
    size = group.group_size if scheme.grouped else 0
    if (size and columns % size) or (scheme.format in PACKED and columns % 2):
        found = {"weight": roles[attribute][0][0].name, "columns": columns, "group_size": size}
        outcome.facts.setdefault("indivisible", []).append(found)  # type: ignore[attr-defined]
        return f"its {columns} columns are no multiple of a group of {size or 2}"
    make = RoundToNearest(scheme.format, size, group.symmetric or not scheme.grouped)
    return _Form(scheme.format, (1, size or columns), scheme.activations, make)


def _reads_tokens(embedding: fx.Node) -> bool:
    """Whether the rows an embedding looks up are those of the graph's tokens, perhaps reshaped."""
    ids = operands(embedding)[1]
    while isinstance(ids, fx.Node) and is_call(ids, aten.reshape.default, aten.view.default):
        ids = operands(ids)[0]
    return isinstance(ids, fx.Node) and ids.op == "placeholder" and ids.target == "tokens"


def _replace_linear(traced: TracedGraph, node: fx.Node, weight: fx.Node, form: _Form) -> None:
    x, _, bias = (*operands(node), None)[:3]
    with traced.graph.inserting_before(node):
        parts = _quantized(traced, weight, form)
        new = emit(
            traced.graph, overload("linear_quantized"), x, *parts, bias, form.format, list(form.group),
            form.activations, source=source_of(node),
        )  # fmt: skip
    replace(node, new)


def _replace_embedding(traced: TracedGraph, node: fx.Node, weight: fx.Node, form: _Form) -> None:
    graph, ids = traced.graph, operands(node)[1]
    with graph.inserting_before(node):
        parts = _quantized(traced, weight, form)
        like = emit(graph, aten.empty.memory_format, [0], dtype=dtype_of(node), device=torch.device("meta"))
        new = emit(
            graph, overload("embedding_quantized"), ids, *parts, like, form.format, list(form.group),
            source=source_of(node),
        )  # fmt: skip
    replace(node, new)


def _quantized(traced: TracedGraph, weight: fx.Node, form: _Form) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Values, scale and zero point of a weight as weights of the graph; a merged one's are those of its parts."""
    entry = traced.weights.entries[str(weight.target)]
    n, k = shape_of(weight)
    blocks = (n, k // form.group[1])

    def part(output: str, suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        made = _part(entry, form.make, output)
        made = Scales(made) if output == "scale" else made
        return add_weight(traced, f"{weight.target}__{suffix}", made, shape, dtype)

    values = part("values", form.format, (n, k // 2 if form.format in PACKED else k), _DTYPES[form.format])
    scale = part("scale", "scale", blocks, torch.float16 if form.format == "int4" else torch.float32)
    zero = None if form.make.symmetric else part("zero", "zero", blocks, torch.uint8)
    return values, scale, zero


def _part(entry: Expression, make: RoundToNearest, output: str) -> Expression:
    if isinstance(entry, Concat):
        return Concat(tuple(_part(part, make, output) for part in entry.parts))
    return Quantized(entry, make, output)


def _report_others(traced: TracedGraph, roles: Roles, ctx: Context, outcome: Outcome) -> None:
    """Matrices that the recipe means, but that other ops read, are near misses: experts picked by index, say."""
    for node in traced.graph.nodes:
        if not is_weight(node) or str(node.target) in roles or len(shape_of(node)) < 2:
            continue
        reader = next(iter(node.users), None)
        if reader is None or is_call(reader, *_QUANTIZED):
            continue
        names = traced.weights.entries[str(node.target)].sources()
        if names and group_of([Role(names[0], "Linear")], ctx.quantization):
            outcome.miss(str(node.target), f"read by {op_name(reader)}, which has no quantized form")
