"""linear_packed and embedding_packed: the layout against the plain ones, the kernel against their semantics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.runtime.ops import packed, quantized
from torch import Tensor

from .conftest import Kernels
from .test_linear import FLOATS, ROWS, SHAPES
from .test_quantized import weight_of

# Format, columns per scale (0: a whole row), zero points, activations.
FORMS = [
    ("bfloat16", 0, False, ""), ("int8", 0, False, ""), ("int8", 0, False, "int8"), ("int8", 32, False, ""),
    ("int4", 32, False, ""), ("int4", 32, True, ""), ("int4", 128, False, ""), ("int4", 0, True, ""),
]  # fmt: skip
forms = pytest.mark.parametrize(
    ("format", "group", "zero", "activations"), FORMS, ids=[f"{f}-{g}-{z}-{a}" for f, g, z, a in FORMS]
)


def operands(format: str, n: int, k: int, group: int, zero: bool) -> tuple[list[Any], Tensor]:
    """The op's weight, scale and zero points, and the float64 matrix they stand for."""
    if format == "bfloat16":
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).bfloat16()
        return [packed.pack_weight(weight, format), None, None], weight.double()
    columns = group or k
    weight, scale, zeros = weight_of(format, n, k, (1, columns), zero)
    matrix = quantized.dequantize(weight, scale, zeros, format, [1, columns]).double()
    parts = [packed.pack_weight(weight, format), packed.pack_groups(scale)]
    return [*parts, None if zeros is None else packed.pack_groups(zeros)], matrix


def call(kernels: Kernels, x: Tensor, parts: list[Any], bias: Any, n: int, format: str, group: int, how: str) -> Tensor:
    weight, scale, zero = parts
    optional = [None if t is None else (t,) for t in (scale, zero, bias)]
    return kernels.call("linear_packed", x, weight, *optional, n, format, group, how)


@forms
@pytest.mark.parametrize("n,k", [(n, k + k % 2) for n, k in SHAPES])
def test_the_layout_holds_the_same_matrix(
    n: int, k: int, format: str, group: int, zero: bool, activations: str
) -> None:
    parts, matrix = operands(format, n, k, group, zero)
    weight, scale, zeros = parts
    assert weight.shape == packed.weight_shape(format, n, k) and weight.is_contiguous()
    ids = torch.tensor([[0, n - 1], [n // 2, 0]])
    rows = packed.embedding_packed(ids, weight, scale, zeros, torch.empty(0), k, format, group)
    assert torch.equal(rows, matrix.float()[ids])
    if not activations:
        found = packed.linear_packed(torch.eye(k), weight, scale, zeros, None, n, format, group, "")
        assert torch.equal(found, matrix.float().t())


@forms
@pytest.mark.parametrize("n,k", [(n, k + k % 2) for n, k in SHAPES])
def test_products(kernels: Kernels, n: int, k: int, format: str, group: int, zero: bool, activations: str) -> None:
    parts, matrix = operands(format, n, k, group, zero)
    generator = torch.Generator().manual_seed(n * 4096 + k)
    for i, m in enumerate(ROWS):
        for dtype in {FLOATS[i % 3], torch.bfloat16}:
            x = torch.randn(m, k, generator=generator).to(dtype)
            bias = torch.randn(n, generator=generator).to(dtype)
            values, factor = quantized.quantize_rows(x, activations) if activations else (x, torch.ones(m, 1))
            exact = values.double() @ matrix.t() * factor.double()
            size = values.double().abs() @ matrix.abs().t() * factor.double()
            for added in (None, bias):
                total, most = (exact, size) if added is None else (exact + added.double(), size + added.double().abs())
                found = call(kernels, x, parts, added, n, format, group, activations)
                assert found.dtype == dtype
                allowed = 2e-6 * most + 0.51 * torch.finfo(dtype).eps * total.abs() + 1e-7
                assert ((found.double() - total).abs() <= allowed).all()


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,k", [(50, 70), (301, 2100)])
def test_a_row_is_the_same_in_every_batch(
    kernels: Kernels, n: int, k: int, dtype: torch.dtype, format: str, group: int, zero: bool, activations: str
) -> None:
    """Bit for bit: alone, among few rows, among many; and a row of NaN or infinities touches no other."""
    parts, _ = operands(format, n, k, group, zero)
    x = torch.randn(70, k).to(dtype)
    alone = torch.cat([call(kernels, x[i : i + 1], parts, None, n, format, group, activations) for i in range(70)])
    for m in (2, 3, 5, 11, 17, 70):
        assert torch.equal(call(kernels, x[:m], parts, None, n, format, group, activations), alone[:m])
        assert torch.equal(call(kernels, x[70 - m :], parts, None, n, format, group, activations), alone[70 - m :])
    x[3, 1], x[5, 0] = float("nan"), float("inf")
    together = call(kernels, x, parts, None, n, format, group, activations)
    apart = [call(kernels, x[i : i + 1], parts, None, n, format, group, activations) for i in range(70)]
    for spoilt in (together, torch.cat(apart)):
        others = [i for i in range(70) if i not in (3, 5)]
        assert torch.equal(spoilt[others], alone[others])
        assert spoilt[3].isnan().all() and not spoilt[5].isfinite().any()
        assert not activations or spoilt[5].isnan().all()
