"""AWQ: inputs that are large get finer weights, by a scale per input channel that is taken out again before the layer.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. Both searches, for scales and for clipping, measure the error of a
layer's output on a sample of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...passes.quantize.int4_grid import Int4Grid, decode

_STEPS = 20
# Above 1, too: a symmetric grid has no +8, and what is largest may lie half a step outside.
_SHRINKS = tuple(1.1 - 0.025 * i for i in range(21))
_FINALISTS = 3
_ROWS = 1024  # of a weight that are searched at once: a few copies of them are needed


@dataclass(frozen=True)
class ScaleSearch:
    """The best scale per input channel, float32 [k], and the summed squared error of outputs without and with it.

    Both errors are those after clipping.
    """

    scale: Tensor
    plain_error: float
    error: float


def search_scale(
    weights: Sequence[Tensor],
    inputs: Tensor,
    magnitude: Tensor,
    grid: Int4Grid,
    realize: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> ScaleSearch:
    """Search the scale that layers of one input are multiplied by, column by column, before they are quantized.

    Candidates are magnitude ** r / mean |weight| ** (1 - r) and magnitude ** r for r in a grid from 0 to 1, and none.

    Args:
        weights: [n, k] each; inputs: [tokens, k]; magnitude: mean |input| per channel [k].
        realize: the scale as it can be taken out before the layer, where rounding allows only some.
    """
    wide = [w.float() for w in weights]
    inputs = inputs.float()
    mean = torch.stack([w.abs().sum(0) for w in wide]).sum(0) / sum(len(w) for w in wide)
    magnitude, mean = magnitude.float().clamp(min=1e-6), mean.clamp(min=1e-6)
    found: list[tuple[float, Tensor]] = []
    for balanced in (True, False):
        for step in range(1 if not balanced else 0, _STEPS + 1):
            ratio = step / _STEPS
            scale = magnitude**ratio / (mean ** (1 - ratio) if balanced else 1.0)
            scale = realize((scale / (scale.max() * scale.min()).sqrt()).clamp(1e-3, 1e3))
            found.append((_error(wide, inputs, scale, grid), scale))
    found.sort(key=lambda pair: pair[0])
    # Clipping makes good some of what scales do, so that the last word is spoken with both.
    none = torch.ones_like(magnitude)
    plain = _clipped_error(wide, inputs, none, grid)
    lowest, best = plain, none
    for _, scale in found[:_FINALISTS]:
        error = _clipped_error(wide, inputs, scale, grid)
        if error < lowest:
            lowest, best = error, scale
    return ScaleSearch(best, plain, lowest)


def search_clipping(weight: Tensor, inputs: Tensor, grid: Int4Grid) -> Tensor:
    """The share of each group's span to keep, [n, k / group], by the error of the group's own part of the output.

    Args:
        weight: [n, k]; inputs: [tokens, k], both after scaling.
    """
    size = grid.columns(weight.shape[1])
    grouped = inputs.float().unflatten(1, (-1, size)).transpose(0, 1)
    gram = grouped.transpose(1, 2) @ grouped  # [groups, size, size]
    found = []
    for rows in weight.float().split(_ROWS):
        groups = rows.unflatten(1, (-1, size))
        lowest = torch.full(groups.shape[:2], torch.inf, device=weight.device)
        best = torch.ones_like(lowest)
        for shrink in _SHRINKS:
            off = (decode(*grid.quantize(rows, shrink)) - rows).unflatten(1, (-1, size)).transpose(0, 1)
            error = ((off @ gram) * off).sum(-1).t()
            better = error < lowest
            lowest, best = torch.where(better, error, lowest), torch.where(better, shrink, best)
        found.append(best)
    return torch.cat(found)


def _error(weights: Sequence[Tensor], inputs: Tensor, scale: Tensor, grid: Int4Grid) -> float:
    """Summed squared error of the outputs when columns are scaled, rounded and scaled back."""
    total = 0.0
    for weight in weights:
        for rows in weight.split(_ROWS):
            off = decode(*grid.quantize(rows * scale)) / scale - rows
            total += float((inputs @ off.t()).square().sum())
    return total


def _clipped_error(weights: Sequence[Tensor], inputs: Tensor, scale: Tensor, grid: Int4Grid) -> float:
    """`_error` with every group clipped as it is best."""
    total = 0.0
    for weight in weights:
        shrink = search_clipping(weight * scale, inputs / scale, grid)
        for rows, some in zip(weight.split(_ROWS), shrink.split(_ROWS)):
            off = decode(*grid.quantize(rows * scale, some)) / scale - rows
            total += float((inputs @ off.t()).square().sum())
    return total
