"""common-subexpressions: equal calls become one. Exact: every bit stays."""

from __future__ import annotations

import torch
from ingot.passes.cleanup.common_subexpressions import CommonSubexpressions

from .graphs import BF16, Builder, apply, aten, lines, same_bits, text, untouched


def test_before_and_after() -> None:
    b = Builder()
    x = b.input("x", 2, 4)
    one = b.call(aten.mul.Tensor, x, b.weight("w", 4))
    two = b.call(aten.mul.Tensor, x, b.weight("w", 4))
    before = b.done(b.call(aten.add.Tensor, b.call(aten.neg.default, one), b.call(aten.neg.default, two)))
    assert text(before) == lines("""
        %0 = aten.mul(x, w)
        %1 = aten.mul(x, w)
        %2 = aten.neg(%0)
        %3 = aten.neg(%1)
        %4 = aten.add(%2, %3)
        return %4
    """)
    after, outcome = apply(CommonSubexpressions(), before)
    assert text(after) == lines("""
        %0 = aten.mul(x, w)
        %1 = aten.neg(%0)
        %2 = aten.add(%1, %1)
        return %2
    """)
    assert outcome.changed == 3  # one read of the weight, two calls
    same_bits(before, after)


def test_what_differs_a_little_stays() -> None:
    """Numbers of another type or sign of zero, another dtype, another order of arguments."""
    b = Builder()
    x, y = b.input("x", 4), b.input("y", 4)
    calls = [
        b.call(aten.mul.Tensor, x, 1),
        b.call(aten.mul.Tensor, x, 1.0),
        b.call(aten.mul.Tensor, x, True),
        b.call(aten.mul.Tensor, x, 0.0),
        b.call(aten.mul.Tensor, x, -0.0),
        b.call(aten.sub.Tensor, x, y),
        b.call(aten.sub.Tensor, y, x),
        b.call(aten._to_copy.default, x, dtype=BF16),
        b.call(aten._to_copy.default, x, dtype=torch.float16),
        b.call(aten.reshape.default, x, [2, 2]),
        b.call(aten.reshape.default, x, [4, 1]),
    ]
    assert untouched(CommonSubexpressions(), b.done(*calls)) == []
