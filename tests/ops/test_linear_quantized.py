"""The CPU kernels of linear_quantized against their semantics: every format, shapes around every tile's edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.passes.quantize.schemes import SCHEMES
from ingot.runtime.ops import quantized
from torch import Tensor

from .conftest import Kernels
from .test_linear import FLOATS, ROWS, SHAPES
from .test_quantized import weight_of

# Format, group, whether there are zero points, activations. -1: all columns.
FORMS = [
    ("int8", (1, -1), False, ""), ("int8", (1, -1), False, "int8"), ("int8", (1, 32), False, ""),
    ("int4", (1, 32), False, ""), ("int4", (1, 32), True, ""), ("int4", (1, -1), True, "int8"),
    ("fp8", (1, -1), False, ""), ("fp8", (1, -1), False, "fp8"), ("fp8", (16, 128), False, "fp8"),
    ("mxfp4", (1, 32), False, ""),
]  # fmt: skip
forms = pytest.mark.parametrize(
    ("format", "group", "zero", "activations"), FORMS, ids=[f"{f}-{g}-{z}-{a}" for f, g, z, a in FORMS]
)


def operands(format: str, n: int, k: int, group: tuple[int, int], zero: bool) -> tuple[list[Any], Tensor]:
    """The kernel's operands behind x, but for bias, format and activations; and the matrix they stand for."""
    rows, columns = group[0], k if group[1] < 0 else group[1]
    weight, scale, zeros = weight_of(format, n, k, (rows, columns), zero)
    matrix = quantized.dequantize(weight, scale, zeros, format, [rows, columns])
    return [weight, scale, None if zeros is None else (zeros,), [rows, columns]], matrix.double()


def call(kernels: Kernels, x: Tensor, given: list[Any], bias: Any, format: str, activations: str) -> Tensor:
    weight, scale, zero, group = given
    return kernels.call("linear_quantized", x, weight, scale, zero, bias, format, group, activations)


def test_every_scheme_is_tried() -> None:
    assert {(s.format, s.activations) for s in SCHEMES.values()} <= {(f, a) for f, _, _, a in FORMS}


@forms
@pytest.mark.parametrize("n,k", [(n, k + k % 2) for n, k in SHAPES])
def test_products(
    kernels: Kernels, n: int, k: int, format: str, group: tuple[int, int], zero: bool, activations: str
) -> None:
    given, matrix = operands(format, n, k, group, zero)
    generator = torch.Generator().manual_seed(n * 4096 + k)
    for i, m in enumerate(ROWS):
        dtype = FLOATS[i % 3]
        x = torch.randn(m, k, generator=generator).to(dtype)
        bias = torch.randn(n, generator=generator).to(dtype)
        values, factor = quantized.quantize_rows(x, activations) if activations else (x, torch.ones(m, 1))
        exact = values.double() @ matrix.t() * factor.double()
        size = values.double().abs() @ matrix.abs().t() * factor.double()
        for added in (None, bias):
            total, most = (exact, size) if added is None else (exact + added.double(), size + added.double().abs())
            found = call(kernels, x, given, None if added is None else (added,), format, activations)
            assert found.dtype == dtype
            allowed = 2e-6 * most + 0.51 * torch.finfo(dtype).eps * total.abs() + 1e-7
            assert ((found.double() - total).abs() <= allowed).all()


@forms
@pytest.mark.parametrize("n,k", [(50, 70), (301, 2100)])
def test_a_row_is_the_same_in_every_batch(
    kernels: Kernels, n: int, k: int, format: str, group: tuple[int, int], zero: bool, activations: str
) -> None:
    """Bit for bit: alone, among few rows, among many; and a row of NaN or infinities touches no other."""
    given, _ = operands(format, n, k, group, zero)
    x = torch.randn(70, k)
    alone = torch.cat([call(kernels, x[i : i + 1], given, None, format, activations) for i in range(70)])
    for m in (2, 3, 5, 11, 17, 70):
        assert torch.equal(call(kernels, x[:m], given, None, format, activations), alone[:m])
        assert torch.equal(call(kernels, x[70 - m :], given, None, format, activations), alone[70 - m :])
    x[3, 1], x[5, 0] = float("nan"), float("inf")
    spoilt = call(kernels, x, given, None, format, activations)
    others = [i for i in range(70) if i not in (3, 5)]
    assert torch.equal(spoilt[others], alone[others])
    assert spoilt[3].isnan().all() and not spoilt[5].isfinite().any()
    assert not activations or spoilt[5].isnan().all()


def test_all_256_bytes_of_fp8_and_all_scale_types(kernels: Kernels) -> None:
    weight = torch.arange(256, dtype=torch.uint8).reshape(256, 1).view(torch.float8_e4m3fn)
    found = kernels.call(
        "linear_quantized", torch.ones(1, 1), weight, torch.ones(256, 1), None, None, "fp8", [1, 1], ""
    )
    torch.testing.assert_close(found[0], weight.float()[:, 0], rtol=0, atol=0, equal_nan=True)
    nibbles, scale = torch.full((4, 2), 0x9A, dtype=torch.uint8), torch.tensor([[0.1], [0.2], [0.3], [60000.0]])
    for dtype in FLOATS:
        narrow = scale.to(dtype)
        found = kernels.call("linear_quantized", torch.ones(1, 4), nibbles, narrow, None, None, "int4", [1, 4], "")
        torch.testing.assert_close(found[0], 6 * narrow.float()[:, 0])
    bits = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    ones = torch.full((256, 1), 0x02, dtype=torch.uint8)
    found = kernels.call("linear_quantized", torch.ones(1, 2), ones, bits, None, None, "mxfp4", [1, 2], "")
    torch.testing.assert_close(found[0], quantized.e8m0_values(bits)[:, 0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fp8", [False, True])
def test_quantized_activations_are_the_references_to_the_bit(kernels: Kernels, fp8: bool) -> None:
    """The identity as weight shows each value times its row's scale."""
    x = torch.cat([torch.randn(40, 64) * 10.0 ** torch.arange(-20, 20)[:, None], torch.zeros(1, 64)])
    values, scale = quantized.quantize_rows(x, "fp8" if fp8 else "int8")
    weight = torch.eye(64).to(torch.int8)
    given = (x, weight, torch.ones(64, 1), None, None, "int8", [1, 64], "fp8" if fp8 else "int8")
    assert torch.equal(kernels.call("linear_quantized", *given), values * scale)


INT4 = (torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 2), "int4", [1, 4])


@pytest.mark.parametrize(
    ("weight", "scale", "format", "group", "zero", "activations", "message"),
    [
        (torch.zeros(4, 8), torch.ones(4, 1), "int8", [1, 8], None, "", "dtype is not the format's"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), "int8", [1, 8], None, "", "one number per group"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), "int3", [1, 8], None, "", "int8, int4, fp8 or mxfp4"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), "int8", [1, 8], None, "int4", "activations must be"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), "int8", [1], None, "", "rows and columns per scale"),
        (torch.zeros(4, 9, dtype=torch.int8), torch.ones(4, 1), "int8", [1, 9], None, "", "last dimension"),
        (*INT4, (torch.ones(4, 2),), "", "zero points"),
        (*INT4, (torch.ones(4, 1, dtype=torch.uint8),), "", "zero points"),
        (INT4[0], torch.ones(4, 2), "mxfp4", [1, 4], None, "", "the scale's dtype"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(
    kernels: Kernels, weight: Tensor, scale: Tensor, format: str, group: list[int], zero: Any, activations: str,
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        kernels.call("linear_quantized", torch.zeros(2, 8), weight, scale, zero, None, format, group, activations)
