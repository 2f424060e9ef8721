"""GPTQ: columns are rounded one after another, and the columns still open make up for each one's error.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. With activation order (the columns with the largest inputs first)
scales are fixed before the first column is rounded, so that groups stay those of neighbouring columns and nothing is
permuted at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...passes.quantize.int4_grid import Int4Grid, encode

_BLOCK = 128  # columns whose errors are spread to the rest at once; a multiple of every group size but whole rows


@dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor of a Hessian's inverse, float32 [k, k], for columns in `order` (None: as they are).

    Attributes:
        dampening: the share of the diagonal's mean that was added in the end.
    """

    upper: Tensor
    order: Tensor | None
    dampening: float


def inverse_factor(hessian: Tensor, dampening: float = 0.01, activation_order: bool = False) -> InverseFactor:
    """What GPTQ needs of a Hessian, the Gram matrix of a layer's inputs.

    Args:
        hessian: float32 [k, k], sum or mean of x xᵀ; used as working memory. One more matrix of its size is needed.
        dampening: share of the diagonal's mean to add to it; raised tenfold until the matrix can be inverted.

    Raises:
        ValueError: the Hessian is not finite.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not torch.isfinite(hessian.sum()):
        raise ValueError("the Hessian is not finite")
    # An input that was always zero has taught nothing: its column is rounded alone.
    diagonal[diagonal == 0] = mean or 1.0
    # As LAPACK wants it, column after column, so that it makes no copy of its own.
    factor = torch.empty_like(hessian).mT
    order = None
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        for part in torch.arange(len(order), device=order.device).split(_BLOCK):
            factor[part] = hessian[order[part]][:, order]
        hessian.copy_(factor)
    undamped = diagonal.clone()
    failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
    while True:
        diagonal.copy_(undamped + dampening * (mean or 1.0))
        torch.linalg.cholesky_ex(hessian, out=(factor, failed))
        if not failed:
            break
        dampening *= 10
    torch.cholesky_inverse(factor, out=hessian.mT)
    torch.linalg.cholesky(hessian, upper=True, out=factor)
    return InverseFactor(factor, order, dampening)


def gptq(weight: Tensor, factor: InverseFactor, grid: Int4Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k], scale and zero point [n, k / group] of a weight [n, k], all float32.

    Args:
        factor: of the Hessian of the layer's inputs; layers that read the same input share it.
    """
    n, k = weight.shape
    size, order, upper = grid.columns(k), factor.order, factor.upper
    # Column after column: they are rows here, so that each is contiguous.
    columns = weight.float().t().contiguous()
    scale, zero = grid.fit(columns.t().unflatten(1, (-1, size)))
    scale, zero = scale.t().contiguous(), zero.t().contiguous()
    if order is not None:
        columns = columns[order]
    codes = torch.empty_like(columns)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        errors = torch.empty(stop - start, n, dtype=torch.float32, device=weight.device)
        for i in range(start, stop):
            group = i // size if order is None else int(order[i]) // size
            if order is None and i % size == 0 and size <= _BLOCK:
                # The group's columns as the errors before it have left them.
                scale[group], zero[group] = grid.fit(columns[i : i + size].t())
            codes[i] = encode(columns[i], scale[group], zero[group])
            rounded = (codes[i] - zero[group]) * scale[group]
            errors[i - start] = (columns[i] - rounded) / upper[i, i]
            columns[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i - start], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    if order is not None:
        restored = torch.empty_like(codes)
        restored[order] = codes
        codes = restored
    return codes.t().contiguous(), scale.t().contiguous(), zero.t().contiguous()
