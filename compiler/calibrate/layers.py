"""One decoder layer quantized by what its linear layers were given: statistics first, then every weight.

Nothing but weights changes in memory: a scale that a norm will take out is taken out of the rounded weight instead, so
that the rest of the layer runs as it is and the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...passes.quantize.int4_grid import Int4Grid
from .activations import GramMatrix, InputSample, watch
from .awq import search_clipping, search_scale
from .gptq import gptq, inverse_factor
from .sites import Fold, Linear, Site


@dataclass(frozen=True)
class Method:
    """How a weight's int4 values are chosen."""

    algorithm: Literal["gptq", "awq"]
    grid: Int4Grid
    dampening: float = 0.01
    activation_order: bool = False


@dataclass
class Quantized:
    """What became of one layer.

    Attributes:
        parts: "values", "scale" and perhaps "zero" of each weight, by its name.
        columns, rows: what AWQ has multiplied columns by, and divided rows by, by the weight's name.
        others: norms' weights and biases that took a scale, by their names.
        facts: for the report, by weight.
    """

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def quantize_layer(
    sites: Sequence[Site],
    methods: Mapping[str, Method],
    modules: Mapping[str, nn.Module],
    load: Callable[[str], Tensor],
    run: Callable[[], None],
    tokens: int,
    device: torch.device,
) -> Quantized:
    """Quantize the weights of `methods` among the sites of one layer.

    Args:
        modules: the linear layer that reads each weight; load: a parameter by its name.
        run: the layer's forward over all calibration text, of `tokens` tokens.
    """
    chosen = [(site, [linear for linear in site.linears if linear.name in methods]) for site in sites]
    chosen = [(site, linears) for site, linears in chosen if linears]
    statistics, ends = [], []
    for _, linears in chosen:
        first = linears[0]
        seen = (
            GramMatrix(first.k, device)
            if methods[first.name].algorithm == "gptq"
            else InputSample(first.k, tokens, device)
        )
        statistics.append(seen)
        ends.append(watch(modules[first.name], seen))
    try:
        run()
    finally:
        for end in ends:
            end()
    found = Quantized()

    def weight(linear: Linear) -> Tensor:
        stored = load(linear.name).to(device).float()
        return stored.t().contiguous() if linear.transposed else stored

    scales = _scales(chosen, statistics, methods, weight, load, found)
    for site, linears in chosen:
        seen = statistics.pop(0)
        factor = None
        column = scales.columns.get(site)
        if isinstance(seen, GramMatrix):
            method = methods[linears[0].name]
            factor = inverse_factor(seen.matrix.div_(max(1, seen.tokens)), method.dampening, method.activation_order)
        for linear in linears:
            row = scales.rows.get(linear.name)
            wide = weight(linear).clone()
            if row is not None:
                wide /= row[:, None]
                found.rows[linear.name] = row
            grid = methods[linear.name].grid
            if factor is not None:
                coded = gptq(wide, factor, grid)
                found.facts.setdefault(linear.name, {})["dampening"] = factor.dampening
            elif isinstance(seen, InputSample):
                inputs = seen.inputs.float()
                if column is not None:
                    wide *= column
                    inputs = inputs / column
                    found.columns[linear.name] = column.clone()  # shared memory cannot be stored
                coded = grid.quantize(wide, search_clipping(wide, inputs, grid))
            found.parts[linear.name] = grid.parts(*coded)
    return found


@dataclass
class _Scales:
    """AWQ's scales: of a site's columns, and of the rows of the layers that take them out."""

    columns: dict[Site, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def _scales(
    chosen: Sequence[tuple[Site, list[Linear]]],
    statistics: Sequence[object],
    methods: Mapping[str, Method],
    weight: Callable[[Linear], Tensor],
    load: Callable[[str], Tensor],
    found: Quantized,
) -> _Scales:
    scales = _Scales()
    for (site, linears), seen in zip(chosen, statistics):
        if not isinstance(seen, InputSample):
            continue
        reason = foldable(site, methods)
        fold = site.fold
        if reason or fold is None:
            continue
        norm = load(fold.weight).float() if fold.linear is None else None
        stored = load(fold.weight).dtype
        result = search_scale(
            [weight(linear) for linear in linears], seen.inputs, seen.magnitude, methods[linears[0].name].grid,
            lambda scale, fold=fold, norm=norm, stored=stored: _realize(scale, fold, norm, stored)[0],  # type: ignore[misc]
        )  # fmt: skip
        scales.columns[site] = result.scale
        for linear in linears:
            found.facts.setdefault(linear.name, {})["awq_error"] = result.error / (result.plain_error or 1.0)
        per_row, folded = _realize(result.scale, fold, norm, stored)[1:]
        if fold.linear is not None:
            scales.rows[fold.weight] = per_row
        elif folded is not None:
            found.others[fold.weight] = folded
        if fold.bias:
            bias = load(fold.bias)
            found.others[fold.bias] = (bias.float() / per_row.to(bias.device)).to(bias.dtype)
    return scales


def foldable(site: Site, methods: Mapping[str, Method]) -> str:
    """Why AWQ cannot scale a site's inputs, or ""."""
    if site.fold is None:
        return site.reason
    asked = [methods.get(linear.name) for linear in site.linears]
    odd = [linear.name for linear, method in zip(site.linears, asked) if method != asked[0]]
    if odd:
        return f"its input is read by {odd[0]} too, which is not quantized alike"
    if site.fold.linear is not None:
        source = methods.get(site.fold.linear.name)
        if source is None or source.algorithm != "awq":
            return f"{site.fold.weight}, which would take it, is not quantized by AWQ"
    return ""


def _realize(
    scale: Tensor, fold: Fold, norm: Tensor | None, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A wanted scale [k] as it can be taken out: the columns' scale, the source's by element or row, the norm's weight.

    Channels that come from one row share a scale, the mean of their logarithms. A norm's weight is rounded to its
    dtype, and the scale is what that leaves of it, so that nothing is lost.
    """
    rows = fold.rows.to(scale.device)
    size = fold.linear.n if fold.linear is not None else len(norm) if norm is not None else 0
    logs = torch.zeros(size, device=scale.device).index_add_(0, rows, scale.log())
    counts = torch.zeros(size, device=scale.device).index_add_(0, rows, torch.ones_like(scale))
    source = (logs / counts.clamp(min=1)).exp()
    if norm is None:
        return source[rows], source, None
    whole = norm.to(scale.device) + fold.offset
    folded = (whole / source - fold.offset).to(stored)
    left = folded.float() + fold.offset
    usable = (left != 0) & (whole != 0) & torch.isfinite(whole / left)
    source = torch.where(usable, whole / left, 1.0)
    folded = torch.where(usable, folded, norm.to(scale.device).to(stored))
    return source[rows], source, folded
