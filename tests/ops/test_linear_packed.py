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
def test_products(products: Kernels, n: int, k: int, format: str, group: int, zero: bool, activations: str) -> None:
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
                found = call(products, x, parts, added, n, format, group, activations)
                assert found.dtype == dtype
                allowed = 2e-6 * most + 0.51 * torch.finfo(dtype).eps * total.abs() + 1e-7
                assert ((found.double() - total).abs() <= allowed).all()


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,k", [(50, 70), (301, 2100)])
def test_a_row_is_the_same_in_every_batch(
    products: Kernels, n: int, k: int, dtype: torch.dtype, format: str, group: int, zero: bool, activations: str
) -> None:
    """Bit for bit: alone, among few rows, among many; and a row of NaN or infinities touches no other."""
    parts, _ = operands(format, n, k, group, zero)
    x = torch.randn(70, k).to(dtype)
    alone = torch.cat([call(products, x[i : i + 1], parts, None, n, format, group, activations) for i in range(70)])
    for m in (2, 3, 5, 11, 17, 70):
        assert torch.equal(call(products, x[:m], parts, None, n, format, group, activations), alone[:m])
        assert torch.equal(call(products, x[70 - m :], parts, None, n, format, group, activations), alone[70 - m :])
    x[3, 1], x[5, 0] = float("nan"), float("inf")
    together = call(products, x, parts, None, n, format, group, activations)
    apart = [call(products, x[i : i + 1], parts, None, n, format, group, activations) for i in range(70)]
    for spoilt in (together, torch.cat(apart)):
        others = [i for i in range(70) if i not in (3, 5)]
        assert torch.equal(spoilt[others], alone[others])
        assert spoilt[3].isnan().all() and not spoilt[5].isfinite().any()
        assert not activations or spoilt[5].isnan().all()


def test_strided_input_leading_dimensions_and_nothing(products: Kernels) -> None:
    wide = torch.randn(3, 4, 80).bfloat16()
    for format in ("bfloat16", "int4"):
        parts, _ = operands(format, 20, 40, 0, False)
        for x in (wide[..., :40], wide[..., 40:], wide[:, 1:2, ::2], wide.transpose(0, 1)[..., 3:43], wide[0, 0, :40]):
            result = call(products, x, parts, None, 20, format, 0, "")
            rows = call(products, x.reshape(-1, 40).contiguous(), parts, None, 20, format, 0, "")
            assert result.shape == (*x.shape[:-1], 20) and torch.equal(result.reshape(-1, 20), rows)
        assert call(products, wide[:0, 0, :40], parts, None, 20, format, 0, "").shape == (0, 20)


def test_the_sums_do_not_depend_on_the_number_of_threads(products: Kernels) -> None:
    threads = products.library.omp_set_num_threads
    for format, activations in (("bfloat16", ""), ("int4", ""), ("int8", "int8")):
        parts, _ = operands(format, 700, 520, 0, False)
        for m in (1, 70):
            x = torch.randn(m, 520).bfloat16()
            found = []
            for count in (1, 2, 3):
                threads(count)
                found.append(call(products, x, parts, None, 700, format, 0, activations))
            threads(1)
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_every_int8_is_exact(products: Kernels) -> None:
    """The lowest one, -128, among them: the identity as x shows each."""
    weight = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(16, 16)
    parts = [packed.pack_weight(weight, "int8"), packed.pack_groups(torch.ones(16, 1)), None]
    for dtype in FLOATS:
        x = torch.eye(16).to(dtype)
        assert torch.equal(call(products, x, parts, None, 16, "int8", 0, "").float(), weight.float().t())
        assert torch.equal(call(products, x[:1], parts, None, 16, "int8", 0, "").float(), weight.float().t()[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int3"}, "the format must be"),
        ({"format": "int8"}, "dtype is not the format's"),
        ({"rows": 65}, "not the packed one of these rows"),
        ({"group": 12}, "multiple of 8"),
        ({"group": 16}, "scale is not the packed one"),
        ({"scale": None}, "scales and zero points are not the format's"),
        ({"zero": (torch.zeros(1, 2, 64, dtype=torch.uint8),)}, "zero points are not the packed ones"),
        ({"activations": "int8"}, "int8 activations take int8 weights"),
        ({"activations": "fp8"}, 'activations must be "" or int8'),
        ({"bias": (torch.zeros(9),)}, "bias"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(kernels: Kernels, change: dict[str, Any], message: str) -> None:
    weight = torch.zeros(packed.weight_shape("int4", 10, 32), dtype=torch.uint8)
    given = {"weight": weight, "scale": (torch.ones(1, 1, 64),), "zero": None, "bias": None, "rows": 10,
             "format": "int4", "group": 0, "activations": ""}  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        kernels.call("linear_packed", torch.zeros(2, 32), *{**given, **change}.values())
