"""The meaning of quantized weights, computed by hand: bytes, scales, zero points, products, look-ups."""

from __future__ import annotations

import math

import pytest
import torch
from ingot.runtime.ops import quantized
from ingot.runtime.ops.quantized import dequantize, e2m1_values, e8m0_values, pack_nibbles, unpack_nibbles
from torch import Tensor

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(
    format: str, n: int, k: int, group: tuple[int, int], zero: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random bytes of a format with random scales."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    blocks = (math.ceil(n / group[0]), math.ceil(k / group[1]))
    scale = torch.rand(blocks, generator=generator) + 0.1
    if format == "int8":
        return torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8), scale, None
    if format == "fp8":
        return normal(n, k, seed=n).to(FP8), scale, None
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    if format == "mxfp4":
        return packed, torch.randint(120, 130, blocks, generator=generator, dtype=torch.uint8), None
    zeros = torch.randint(0, 16, blocks, generator=generator, dtype=torch.uint8) if zero else None
    return packed, scale.half(), zeros


def by_hand(format: str, weight: Tensor, scale: Tensor, zero: Tensor | None, group: tuple[int, int]) -> Tensor:
    """Element by element, in Python's own numbers."""
    n, k = weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    out = torch.empty(n, k, dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            block = (i // group[0], j // group[1])
            if format in ("int4", "mxfp4"):
                nibble = int(weight[i, j // 2]) // (16 if j % 2 else 1) % 16
            if format == "int4":
                value: float = nibble - (8 if zero is None else int(zero[block]))
            elif format == "mxfp4":
                value = E2M1[nibble % 8] * (-1 if nibble > 7 else 1)
            else:
                value = float(weight[i, j])
            factor = 2.0 ** (int(scale[block]) - 127) if format == "mxfp4" else float(scale[block])
            out[i, j] = value * factor
    return out


CASES = [
    ("int8", (1, 10), False), ("int4", (1, 4), False), ("int4", (1, 4), True), ("int4", (1, 10), False),
    ("fp8", (1, 10), False), ("fp8", (2, 4), False), ("mxfp4", (1, 4), False),
]  # fmt: skip


@pytest.mark.parametrize(("format", "group", "zero"), CASES)
def test_dequantized_is_what_a_hand_computes(format: str, group: tuple[int, int], zero: bool) -> None:
    weight, scale, zeros = weight_of(format, 5, 10, group, zero)
    found = dequantize(weight, scale, zeros, format, list(group))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand(format, weight, scale, zeros, group), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("format", "group", "zero"), CASES)
def test_a_look_up_gives_rows_of_the_matrix(format: str, group: tuple[int, int], zero: bool) -> None:
    weight, scale, zeros = weight_of(format, 5, 10, group, zero)
    ids = torch.tensor([[3, 4], [0, 3]])
    for dtype in (torch.float32, BF16):
        like = torch.empty(0, dtype=dtype)
        found = quantized.embedding_quantized(ids, weight, scale, zeros, like, format, list(group))
        wanted = dequantize(weight, scale, zeros, format, list(group))[ids].to(dtype)
        assert found.dtype == dtype and torch.equal(found, wanted)


@pytest.mark.parametrize(("format", "group", "zero"), CASES)
def test_a_product_is_summed_wide_and_rounded_once(format: str, group: tuple[int, int], zero: bool) -> None:
    weight, scale, zeros = weight_of(format, 5, 10, group, zero)
    matrix = by_hand(format, weight, scale, zeros, group)
    x, bias = normal(2, 3, 10, dtype=BF16), normal(5, dtype=BF16)
    found = quantized.linear_quantized(x, weight, scale, zeros, bias, format, list(group), "")
    wanted = x.double() @ matrix.T + bias.double()
    size = x.double().abs() @ matrix.abs().T
    assert found.dtype == BF16
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_activations_are_quantized_by_row(activations: str) -> None:
    weight, scale, _ = weight_of("int8", 6, 16, (1, 16))
    x = normal(4, 16)
    x[2] = 0
    factor = x.abs().amax(1, keepdim=True) / (127 if activations == "int8" else 448)
    factor[2] = 1
    values = x / factor
    values = values.round() if activations == "int8" else values.clamp(-448, 448).to(FP8).float()
    found = quantized.linear_quantized(x, weight, scale, None, None, "int8", [1, 16], activations)
    wanted = (values.double() @ weight.double().T) * factor.double() * scale.double().T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    exact = x @ dequantize(weight, scale, None, "int8", [1, 16]).T
    assert 0 < (found - exact).abs().max() <= 0.05 * exact.abs().max()
    assert (found[2] == 0).all()


@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_rows_that_are_not_finite_become_nan_alone(activations: str) -> None:
    x = normal(3, 8)
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    weight, scale, _ = weight_of("int8", 4, 8, (1, 8))
    found = quantized.linear_quantized(x, weight, scale, None, None, "int8", [1, 8], activations)
    assert found[1:].isnan().all() and found[0].isfinite().all()


def test_ties_round_to_even_and_nothing_leaves_the_range() -> None:
    values, scale = quantized.quantize_rows(torch.tensor([[127.0, 2.5, 3.5, -2.5, -127.0]]), "int8")
    assert values.tolist() == [[127, 2, 4, -2, -127]] and scale.tolist() == [[1]]
    values, _ = quantized.quantize_rows(torch.tensor([[3e38, -3e38, 1e30]]), "fp8")
    assert values[0, :2].tolist() == [448, -448]


def test_nibbles_go_in_and_out() -> None:
    values = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = pack_nibbles(values)
    assert packed[0].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert torch.equal(unpack_nibbles(packed), values)


def test_e2m1_and_e8m0_are_the_standards_numbers() -> None:
    assert e2m1_values(torch.arange(16, dtype=torch.uint8)).tolist() == [*E2M1, *(-v for v in E2M1)]
    bits = torch.arange(256, dtype=torch.uint8)
    found = e8m0_values(bits)
    assert found[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert found[255].isnan()


def test_what_there_is_not_is_refused() -> None:
    weight, scale, _ = weight_of("int8", 2, 4, (1, 4))
    with pytest.raises(ValueError, match="int3"):
        quantized.linear_quantized(normal(1, 4), weight, scale, None, None, "int3", [1, 4], "")
    with pytest.raises(ValueError, match="int4"):
        quantized.linear_quantized(normal(1, 4), weight, scale, None, None, "int8", [1, 4], "int4")
