"""fuse-add-norm: the residual add joins the norm that reads it. Exact: bit for bit, in bfloat16 too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.passes.fusion.add_norm import FuseAddNorm
from ingot.runtime.ops.schema import overload
from torch import fx

from .graphs import BF16, F32, Builder, apply, aten, lines, same_bits, text, untouched

DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])


def rms_norm(b: Builder, x: fx.Node, name: str = "w", offset: float = 0.0, narrow_first: bool = True) -> Any:
    weight = b.weight(name, 8, dtype=x.meta["val"].dtype)
    return b.call(overload("rms_norm"), x, weight, 1e-5, offset, narrow_first)


def layer_norm(b: Builder, x: fx.Node, *names: str) -> Any:
    weights = [b.weight(name, 8, dtype=x.meta["val"].dtype) for name in names]
    return b.call(aten.layer_norm.default, x, [8], *weights, *([None] * (2 - len(names))), 1e-5, False)


@DTYPES
@pytest.mark.parametrize(("offset", "narrow_first"), [(0.0, True), (0.0, False), (1.0, False)])
def test_rms_norm(dtype: torch.dtype, offset: float, narrow_first: bool) -> None:
    b = Builder()
    x, y = b.input("x", 2, 3, 8, dtype=dtype), b.input("y", 2, 3, 8, dtype=dtype)
    total = b.call(aten.add.Tensor, x, y)
    normed = rms_norm(b, total, offset=offset, narrow_first=narrow_first)
    before = b.done(b.call(aten.add.Tensor, total, b.call(aten.silu.default, normed)))
    assert text(before) == lines(f"""
        %0 = aten.add(x, y)
        %1 = ingot.rms_norm(%0, w, 1e-05, {offset}, {narrow_first})
        %2 = aten.silu(%1)
        %3 = aten.add(%0, %2)
        return %3
    """)
    after, outcome = apply(FuseAddNorm(), before)
    assert text(after) == lines(f"""
        %0 = ingot.add_rms_norm(x, y, w, 1e-05, {offset}, {narrow_first})
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        %3 = aten.silu(%2)
        %4 = aten.add(%1, %3)
        return %4
    """)
    assert (outcome.changed, outcome.missed) == (1, [])
    same_bits(before, after)


@DTYPES
@pytest.mark.parametrize("names", [("w", "bias"), ("w",), ()], ids=["bias", "no bias", "no weight"])
def test_layer_norm(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 3, 8, dtype=dtype), b.input("y", 2, 3, 8, dtype=dtype))
    before = b.done(layer_norm(b, total, *names), total)
    after, outcome = apply(FuseAddNorm(), before)
    weight, bias = (*names, None, None)[:2]
    assert text(after) == lines(f"""
        %0 = ingot.add_layer_norm(x, y, {weight}, {bias}, 1e-05)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        return [%2, %1]
    """)
    assert outcome.changed == 1
    same_bits(before, after)


def test_the_sum_is_rounded_before_it_is_normed() -> None:
    """A kernel that norms the unrounded sum would not be what the model computes."""
    x, y = (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)).to(BF16) for i in (0, 1))
    weight = torch.ones(64, dtype=BF16)
    total, normed = torch.ops.ingot.add_rms_norm(x, y, weight, 1e-5, 0.0, True)
    assert torch.equal(total, x + y)
    unrounded = torch.ops.ingot.rms_norm(x.float() + y.float(), weight.float(), 1e-5, 0.0, True).to(BF16)
    assert not torch.equal(normed, unrounded)


def test_a_weight_that_stands_behind_the_sum_moves_before_it() -> None:
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 8), b.input("y", 2, 8))
    early = b.call(aten.neg.default, total)
    before = b.done(rms_norm(b, total), early)
    after, outcome = apply(FuseAddNorm(), before)
    after.graph.lint()
    assert outcome.changed == 1
    same_bits(before, after)


def test_a_weight_read_earlier_stays_before_its_readers() -> None:
    b = Builder()
    x = b.input("x", 2, 8)
    w = b.weight("w", 8)
    first = b.call(overload("rms_norm"), x, w, 1e-5, 0.0, True)
    total = b.call(aten.add.Tensor, x, first)
    before = b.done(b.call(overload("rms_norm"), total, w, 1e-5, 0.0, True), total)
    after, outcome = apply(FuseAddNorm(), before)
    assert outcome.changed == 1
    same_bits(before, after)


def test_two_norms_of_one_sum() -> None:
    """Parallel attention and MLP (GPT-NeoX): the first norm takes the sum, the second reads it."""
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 8), b.input("y", 2, 8))
    before = b.done(rms_norm(b, total, "w"), rms_norm(b, total, "v"), total)
    after, outcome = apply(FuseAddNorm(), before)
    assert text(after) == lines("""
        %0 = ingot.add_rms_norm(x, y, w, 1e-05, 0.0, True)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        %3 = ingot.rms_norm(%1, v, 1e-05, 0.0, True)
        return [%2, %3, %1]
    """)
    assert [(m.site, m.reason) for m in outcome.missed] == [
        ("rms_norm_default_1", "rms_norm_default of the same sum was taken")
    ]
    same_bits(before, after)


def test_sums_in_a_row() -> None:
    """The residual stream of a model: every sum is the next one's residual."""
    b = Builder()
    x = b.input("x", 2, 8)
    for layer in range(3):
        x = b.call(aten.add.Tensor, x, b.call(aten.tanh.default, rms_norm(b, x, f"w{layer}")))
    before = b.done(rms_norm(b, x, "last"))
    after, outcome = apply(FuseAddNorm(), before)
    assert outcome.changed == 2
    assert [m.reason for m in outcome.missed] == ["the sum is used nowhere else: it is no residual stream"]
    same_bits(before, after)


def near_miss(total: Any, b: Builder, norm: Any = rms_norm) -> list[str]:
    return untouched(FuseAddNorm(), b.done(norm(b, total), b.call(aten.neg.default, total)))


def test_near_miss_shapes() -> None:
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 3, 8), b.input("y", 8))
    assert near_miss(total, b) == ["what is added differs in shape"]


def test_near_miss_dtypes() -> None:
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 8), b.input("y", 2, 8, dtype=BF16))
    assert near_miss(total, b) == ["what is added differs in dtype"]


def test_near_miss_a_scaled_sum() -> None:
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 8), b.input("y", 2, 8), alpha=0.5)
    assert near_miss(total, b) == ["the sum is scaled"]


def test_near_miss_a_number() -> None:
    b = Builder()
    assert near_miss(b.call(aten.add.Tensor, b.input("x", 2, 8), 1.0), b) == ["a number is added, not a residual"]


def test_near_miss_no_residual_stream() -> None:
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 8), b.input("y", 2, 8))
    assert untouched(FuseAddNorm(), b.done(rms_norm(b, total))) == [
        "the sum is used nowhere else: it is no residual stream"
    ]


def test_near_miss_a_computed_weight() -> None:
    def norm(b: Builder, x: fx.Node) -> Any:
        weight = b.call(aten.mul.Tensor, b.weight("w", 8), 2.0)
        return b.call(aten.layer_norm.default, x, [8], weight, None, 1e-5, False)

    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 8), b.input("y", 2, 8))
    assert near_miss(total, b, norm) == ["the norm's weight is computed, not stored"]


def test_near_miss_a_norm_over_two_dimensions() -> None:
    b = Builder()
    total = b.call(aten.add.Tensor, b.input("x", 2, 8), b.input("y", 2, 8))
    norm = b.call(aten.layer_norm.default, total, [2, 8], None, None, 1e-5, False)
    assert untouched(FuseAddNorm(), b.done(norm, total)) == ["it norms over more than the last dimension"]


def test_a_norm_without_a_sum_is_no_near_miss() -> None:
    b = Builder()
    assert untouched(FuseAddNorm(), b.done(rms_norm(b, b.input("x", 2, 8)))) == []
