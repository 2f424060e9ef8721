"""AWQ's searches against trying everything in plain loops, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.calibrate.awq import search_clipping, search_scale
from ingot.passes.quantize.int4_grid import Int4Grid, decode
from torch import Tensor

SHRINKS = [1.1 - 0.025 * i for i in range(21)]


def salient(k: int = 64, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which a few channels are far larger than the rest."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, k, generator=generator)
    inputs[:, ::13] *= 30
    return torch.randn(24, k, generator=generator), inputs


def off(weight: Tensor, found: Tensor, inputs: Tensor) -> float:
    return float(((found - weight) @ inputs.t()).square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_lower_the_error_of_outputs(symmetric: bool) -> None:
    grid = Int4Grid(32, symmetric)
    weight, inputs = salient()
    found = search_scale([weight[:8], weight[8:]], inputs, inputs.abs().mean(0), grid)
    shrink = search_clipping(weight * found.scale, inputs / found.scale, grid)
    scaled = decode(*grid.quantize(weight * found.scale, shrink)) / found.scale
    clipped = decode(*grid.quantize(weight, search_clipping(weight, inputs, grid)))
    assert found.error == pytest.approx(off(weight, scaled, inputs), rel=1e-3)
    assert found.plain_error == pytest.approx(off(weight, clipped, inputs), rel=1e-3)
    assert found.error < 0.6 * found.plain_error
    assert found.plain_error < off(weight, decode(*grid.quantize(weight)), inputs)


def test_no_scale_where_none_helps() -> None:
    """What can be realized is always worse than nothing: a scale that ruins one channel."""
    weight, inputs = salient()

    def ruin(scale: Tensor) -> Tensor:
        return torch.where(torch.arange(64) == 5, 1e-3, 1.0)

    found = search_scale([weight], inputs, inputs.abs().mean(0), Int4Grid(32), ruin)
    assert torch.equal(found.scale, torch.ones(64))
    assert found.error == found.plain_error


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_the_best_of_all_shares_for_each_group(symmetric: bool) -> None:
    grid = Int4Grid(32, symmetric)
    weight, inputs = salient()
    found = search_clipping(weight, inputs, grid)
    assert found.shape == (24, 2)
    for row in (0, 7, 23):
        for group in range(2):
            part, seen = weight[row : row + 1, 32 * group : 32 * group + 32], inputs[:, 32 * group : 32 * group + 32]
            errors = [off(part, decode(*grid.quantize(part, shrink)), seen) for shrink in SHRINKS]
            chosen = min(range(len(SHRINKS)), key=lambda i: abs(SHRINKS[i] - float(found[row, group])))
            assert errors[chosen] == pytest.approx(min(errors), rel=1e-3)
    assert (found < 1).any()


def test_rows_are_searched_alone() -> None:
    """A weight of more rows than are searched at once."""
    weight, inputs = salient(32)
    tall = weight.repeat(100, 1)
    assert torch.equal(
        search_clipping(tall, inputs, Int4Grid(32)), search_clipping(weight, inputs, Int4Grid(32)).repeat(100, 1)
    )
