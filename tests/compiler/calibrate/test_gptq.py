"""GPTQ against optimal brain surgery written out step by step, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.calibrate.gptq import gptq, inverse_factor
from ingot.passes.quantize.int4_grid import Int4Grid, decode
from torch import Tensor


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Inputs whose channels depend on each other and differ in size, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return mixed * torch.rand(k, generator=generator).mul(3).exp()


def surgery(weight: Tensor, hessian: Tensor, grid: Int4Grid, order: list[int] | None) -> Tensor:
    """Dequantized weights: after each column the inverse Hessian loses it, all of it in float64."""
    left, k = weight.double().clone(), weight.shape[1]
    inverse = torch.linalg.inv(hessian.double())
    size = grid.columns(k)
    found = torch.empty_like(left)
    scale, zero = grid.fit(weight.unflatten(1, (-1, size)))
    open_columns = list(order) if order is not None else list(range(k))
    while open_columns:
        i = open_columns.pop(0)
        group = i // size
        if order is None and i % size == 0:
            scale[:, group], zero[:, group] = grid.fit(left[:, i : i + size].float())
        s, z = scale[:, group].double(), zero[:, group].double()
        found[:, i] = ((torch.round(left[:, i] / s) + z).clamp(0, 15) - z) * s
        error = (left[:, i] - found[:, i]) / inverse[i, i]
        for j in open_columns:
            left[:, j] -= error * inverse[i, j]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return found


@pytest.mark.parametrize("ordered", [False, True], ids=["as-they-are", "activation-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("size", [32, 0], ids=["groups", "rows"])
def test_it_is_optimal_brain_surgery(size: int, symmetric: bool, ordered: bool) -> None:
    k, grid = 160, Int4Grid(size, symmetric)  # more than one block of columns
    inputs, weight = correlated(600, k), torch.randn(12, k, generator=torch.Generator().manual_seed(1))
    hessian = inputs.t() @ inputs / len(inputs)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k)
    factor = inverse_factor(hessian.clone(), 0.01, ordered)
    assert factor.dampening == 0.01
    order = None if factor.order is None else factor.order.tolist()
    if ordered:
        assert order == hessian.diagonal().argsort(descending=True, stable=True).tolist()
    found = decode(*gptq(weight, factor, grid))
    want = surgery(weight, damped, grid, order)
    # A value that lies half-way may fall to either side, and takes its row with it from there on.
    same = torch.isclose(found.double(), want, atol=1e-5).all(1).float().mean()
    assert same >= 0.75, float(same)
    assert torch.allclose(off(found, weight, inputs), off(want.float(), weight, inputs), rtol=0.05)


def off(found: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
    return ((found - weight) @ inputs.t()).square().sum()


@pytest.mark.parametrize("ordered", [False, True], ids=["as-they-are", "activation-order"])
@pytest.mark.parametrize("size", [32, 0])
def test_outputs_are_nearer_than_by_rounding_to_nearest(size: int, ordered: bool) -> None:
    grid = Int4Grid(size)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    inputs, unseen = correlated(1536, 128, 3).split(1024)
    nearest = decode(*grid.quantize(weight))
    hessian = inputs.t() @ inputs
    found = decode(*gptq(weight, inverse_factor(hessian, 0.01, ordered), grid))
    assert off(found, weight, unseen) < 0.7 * off(nearest, weight, unseen)


def test_uncorrelated_inputs_leave_rounding_to_nearest() -> None:
    weight, grid = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)), Int4Grid(32, False)
    found, nearest = gptq(weight, inverse_factor(torch.eye(64)), grid), grid.quantize(weight)
    assert all(torch.equal(a, b) for a, b in zip(found, nearest))


def test_inputs_that_are_always_zero_or_too_few() -> None:
    weight, grid = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)), Int4Grid(32)
    nearest = grid.quantize(weight)
    assert torch.equal(gptq(weight, inverse_factor(torch.zeros(64, 64)), grid)[0], nearest[0])
    inputs = torch.zeros(3, 64)
    inputs[:, :5] = torch.randn(3, 5, generator=torch.Generator().manual_seed(6))
    found = gptq(weight, inverse_factor(inputs.t() @ inputs), grid)
    assert torch.equal(found[0][:, 5:], nearest[0][:, 5:])
    assert torch.isfinite(decode(*found)).all()


def test_dampening_grows_until_the_matrix_can_be_inverted() -> None:
    hessian = torch.full((64, 64), 1e6) - 10 * torch.eye(64)  # negative eigenvalues, as rounding can make them
    factor = inverse_factor(hessian, 1e-9)
    assert factor.dampening > 1e-9
    assert torch.isfinite(factor.upper).all()


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan))
