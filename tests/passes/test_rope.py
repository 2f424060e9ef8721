"""fuse-rope: rotation by halves becomes one op. Exact: bit for bit, in bfloat16 too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.passes.fusion.rope import FuseRoPE
from torch import fx

from .graphs import BF16, F32, Builder, apply, aten, lines, same_bits, text, untouched

WIDTH = 8


def halves(b: Builder, x: fx.Node, half: int = WIDTH // 2, width: int = WIDTH, dim: int = -1) -> Any:
    """cat(-high, low)."""
    low = b.call(aten.slice.Tensor, x, 3, 0, half)
    high = b.call(aten.slice.Tensor, x, 3, half, width)
    return b.call(aten.cat.default, [b.call(aten.neg.default, high), low], dim)


def tables(b: Builder, dtype: torch.dtype = F32) -> tuple[fx.Node, fx.Node]:
    return b.input("cos", 2, 1, 3, WIDTH, dtype=dtype), b.input("sin", 2, 1, 3, WIDTH, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_before_and_after(dtype: torch.dtype) -> None:
    b = Builder()
    x = b.input("x", 2, 4, 3, WIDTH, dtype=dtype)
    cos, sin = tables(b, dtype)
    straight = b.call(aten.mul.Tensor, x, cos)
    before = b.done(b.call(aten.add.Tensor, straight, b.call(aten.mul.Tensor, halves(b, x), sin)))
    assert text(before) == lines("""
        %0 = aten.mul(x, cos)
        %1 = aten.slice(x, 3, 0, 4)
        %2 = aten.slice(x, 3, 4, 8)
        %3 = aten.neg(%2)
        %4 = aten.cat([%3, %1], -1)
        %5 = aten.mul(%4, sin)
        %6 = aten.add(%0, %5)
        return %6
    """)
    after, outcome = apply(FuseRoPE(), before)
    assert text(after) == "%0 = ingot.rotate_half(x, cos, sin)\nreturn %0"
    assert (outcome.changed, outcome.missed) == (1, [])
    same_bits(before, after)


@pytest.mark.parametrize("swapped", range(8))
def test_any_order_of_sums_and_products(swapped: int) -> None:
    """cos * x + sin * turned and all the rest mean the same; the matcher must not settle on x for cos."""

    def two(op: Any, first: fx.Node, second: fx.Node, bit: int) -> Any:
        return b.call(op, *((second, first) if swapped >> bit & 1 else (first, second)))

    b = Builder()
    x = b.input("x", 2, 4, 3, WIDTH)
    cos, sin = tables(b)
    straight = two(aten.mul.Tensor, x, cos, 0)
    turned = two(aten.mul.Tensor, halves(b, x, dim=3), sin, 1)
    before = b.done(two(aten.add.Tensor, straight, turned, 2))
    after, _ = apply(FuseRoPE(), before)
    assert text(after) == "%0 = ingot.rotate_half(x, cos, sin)\nreturn %0"
    same_bits(before, after)


def rotated(b: Builder, x: fx.Node, turned: fx.Node, cos: fx.Node, sin: fx.Node) -> Any:
    return b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, cos), b.call(aten.mul.Tensor, turned, sin))


def test_near_miss_another_value_is_turned() -> None:
    b = Builder()
    x, y = b.input("x", 2, 4, 3, WIDTH), b.input("y", 2, 4, 3, WIDTH)
    out = rotated(b, x, halves(b, y), *tables(b))
    assert untouched(FuseRoPE(), b.done(out)) == ["what it turns are not the two halves of the value"]


def test_near_miss_interleaved_pairs() -> None:
    """GPT-J turns neighbours, not halves: slices with a step are another rotation."""
    b = Builder()
    x = b.input("x", 2, 4, 3, WIDTH)
    even, odd = b.call(aten.slice.Tensor, x, 3, 0, WIDTH, 2), b.call(aten.slice.Tensor, x, 3, 1, WIDTH, 2)
    turned = b.call(aten.cat.default, [b.call(aten.neg.default, odd), even], -1)
    assert untouched(FuseRoPE(), b.done(rotated(b, x, turned, *tables(b)))) == [
        "what it turns are not the two halves of the value"
    ]


def test_near_miss_uneven_halves() -> None:
    b = Builder()
    x = b.input("x", 2, 4, 3, WIDTH)
    assert untouched(FuseRoPE(), b.done(rotated(b, x, halves(b, x, 2), *tables(b)))) == [
        "only a part of the head is rotated, or not by halves"
    ]


def test_near_miss_wide_tables() -> None:
    """OLMo 2 rotates in float32: the op would round in between."""
    b = Builder()
    x = b.input("x", 2, 4, 3, WIDTH, dtype=BF16)
    assert untouched(FuseRoPE(), b.done(rotated(b, x, halves(b, x), *tables(b)))) == ["the tables have another dtype"]


def test_near_miss_one_wide_table() -> None:
    b = Builder()
    x = b.input("x", 2, 4, 3, WIDTH, dtype=BF16)
    cos, sin = b.input("cos", 2, 1, 3, WIDTH, dtype=BF16), b.input("sin", 2, 1, 3, WIDTH)
    assert untouched(FuseRoPE(), b.done(rotated(b, x, halves(b, x), cos, sin))) == ["the tables have another dtype"]


def test_near_miss_tables_that_broadcast_the_value() -> None:
    b = Builder()
    x = b.input("x", 2, 1, 3, WIDTH)
    cos, sin = b.input("cos", 2, 4, 3, WIDTH), b.input("sin", 2, 4, 3, WIDTH)
    assert untouched(FuseRoPE(), b.done(rotated(b, x, halves(b, x), cos, sin))) == ["the tables change its shape"]


def test_numbers_in_the_place_of_tables() -> None:
    """x * 2 + turned * 3 has the shape of a rotation; it must neither match nor crash."""
    b = Builder()
    x = b.input("x", 2, 4, 3, WIDTH)
    straight, turned = b.call(aten.mul.Tensor, x, 2.0), b.call(aten.mul.Tensor, halves(b, x), 3.0)
    assert untouched(FuseRoPE(), b.done(b.call(aten.add.Tensor, straight, turned))) == []
