"""linear_dense against float64 products, over shapes around every tile's edge."""

from __future__ import annotations

import pytest
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Around the vector widths, the tiles of 2 to 4, panels of 12 and 48, blocks of 1024 and the threshold for threads.
SHAPES = (
    (1, 1),
    (3, 5),
    (12, 8),
    (13, 17),
    (48, 64),
    (49, 63),
    (64, 512),
    (130, 100),
    (70, 1024),
    (37, 1029),
    (9, 2500),
)
ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 70)


def close(result: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    """Within float32 accumulation and one rounding to the result's dtype; `size` bounds the sum of absolute terms."""
    tolerance = 2e-6 * size + 0.51 * torch.finfo(result.dtype).eps * exact.abs() + 1e-7
    assert ((result.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dense(kernels, n, k, dtype):
    generator = torch.Generator().manual_seed(n * 4096 + k)
    w = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    for m in ROWS:
        x = torch.randn(m, k, generator=generator).to(dtype)
        exact, size = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
        close(kernels.call("linear_dense", x, w, None), exact, size)
        close(kernels.call("linear_dense", x, w, (bias,)), exact + bias.double(), size + bias.double().abs())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("n,k", [(50, 70), (301, 2100)])
def test_a_row_is_the_same_in_every_batch(kernels, n, k, kind):
    """Bit for bit: alone, among few rows, among many, and after other rows were changed."""
    x = torch.randn(70, k)
    if kind == "int8":
        w, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n, 1)
        run = lambda rows: kernels.call("linear_quantized", rows, w, scale, None, None, "int8", [1, k], "")  # noqa: E731
    else:
        w = torch.randn(n, k).to(getattr(torch, kind))
        x = x.to(w.dtype)
        run = lambda rows: kernels.call("linear_dense", rows, w, None)  # noqa: E731
    alone = torch.cat([run(x[i : i + 1]) for i in range(70)])
    for m in (2, 3, 4, 5, 6, 11, 16, 17, 70):
        assert torch.equal(run(x[:m]), alone[:m])
        assert torch.equal(run(x[70 - m :]), alone[70 - m :])


def test_leading_dimensions_and_strided_input(kernels):
    wide = torch.randn(3, 4, 80)
    w = torch.randn(20, 40)
    for x in (wide[..., :40], wide[..., 40:], wide[:, 1:2, ::2], wide.transpose(0, 1)[..., 3:43], wide[0, 0, :40]):
        result = kernels.call("linear_dense", x, w, None)
        assert result.shape == (*x.shape[:-1], 20)
        assert torch.equal(
            result.reshape(-1, 20), kernels.call("linear_dense", x.reshape(-1, 40).contiguous(), w, None)
        )


def test_an_empty_batch_gives_an_empty_result(kernels):
    assert kernels.call("linear_dense", torch.empty(0, 16), torch.randn(8, 16), None).shape == (0, 8)


def test_nan_and_infinity_stay_visible_and_in_their_row(kernels):
    x, w = torch.randn(6, 33), torch.randn(10, 33)
    x[2, 32], x[4, 0] = float("nan"), float("inf")
    result = kernels.call("linear_dense", x, w, None)
    assert result[2].isnan().all() and result[4].isinf().all()
    assert torch.equal(result[[0, 1, 3, 5]], kernels.call("linear_dense", x[[0, 1, 3, 5]], w, None))
    assert kernels.call("linear_dense", x.bfloat16(), w.bfloat16(), None)[2].isnan().all()


@pytest.mark.parametrize(
    "x,w,bias,message",
    [
        (torch.zeros(2, 8), torch.zeros(4, 9), None, "last dimension"),
        (torch.zeros(2, 8), torch.zeros(8, 4).t(), None, "contiguous"),
        (torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.int8), None, "float32, bfloat16 or float16"),
        (torch.zeros(2, 8), torch.zeros(4, 8), (torch.zeros(5),), "bias"),
        (torch.zeros(2, 8, dtype=torch.int32), torch.zeros(4, 8), None, "x must be"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(kernels, x, w, bias, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.call("linear_dense", x, w, bias)
