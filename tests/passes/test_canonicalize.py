"""canonicalize: ops that compute nothing go, the rest is spelled one way. Exact: every bit stays."""

from __future__ import annotations

import pytest
import torch
from ingot.passes.cleanup.canonicalize import Canonicalize

from .graphs import BF16, Builder, apply, aten, lines, same_bits, text, untouched, values

LARGEST = 2**63 - 1


def test_before_and_after() -> None:
    b = Builder()
    x = b.input("x", 2, 4, 6)
    b.call(aten._assert_tensor_metadata.default, x, None, None, torch.float32)
    x = b.call(aten.clone.default, x)
    x = b.call(aten.dropout.default, x, 0.1, False)
    x = b.call(aten._to_copy.default, x, dtype=torch.float32)
    x = b.call(aten.mul.Tensor, x, 1.0)
    x = b.call(aten.add.Tensor, x, 0)
    x = b.call(aten.slice.Tensor, x, 0, 0, LARGEST)
    x = b.call(aten.expand.default, x, [2, -1, 6])
    x = b.call(aten.view.default, x, [2, 2, -1])
    x = b.call(aten.slice.Tensor, x, -1, -4, LARGEST)
    x = b.call(aten.square.default, x)
    x = b.call(aten.pow.Tensor_Scalar, x, -0.5)
    y = b.call(aten._to_copy.default, b.weight("w", 4), dtype=BF16)
    y = b.call(aten.type_as.default, y, b.weight("w", 4))
    before = b.done(b.call(aten.mul.Tensor, x, y))
    assert text(before).splitlines()[0] == "%0 = aten._assert_tensor_metadata(x, None, None, float32)"
    after, outcome = apply(Canonicalize(), before)
    assert text(after) == lines("""
        %0 = aten.reshape(x, [2, 2, 12])
        %1 = aten.slice(%0, 2, 8, 12)
        %2 = aten.pow(%1, 2)
        %3 = aten.rsqrt(%2)
        %4 = aten._to_copy(w, dtype=bfloat16)
        %5 = aten._to_copy(%4, dtype=float32)
        %6 = aten.mul(%3, %5)
        return %6
    """)
    assert outcome.changed == 13
    same_bits(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_other_spellings_give_the_same_bits(dtype: torch.dtype, size: int) -> None:
    """PyTorch's kernels for the two spellings of a square and of a reciprocal root agree, vectorized or not."""
    b = Builder()
    x = b.input("x", size, dtype=dtype)
    before = b.done(b.call(aten.pow.Tensor_Scalar, b.call(aten.square.default, x), -0.5))
    after, outcome = apply(Canonicalize(), before)
    assert outcome.changed == (2 if dtype == torch.float32 else 1)
    same_bits(before, after)


def test_slices_with_a_step_keep_it() -> None:
    b = Builder()
    x = b.input("x", 2, 9)
    every_other = b.call(aten.slice.Tensor, x, 1, 1, LARGEST, 2)
    beyond = b.call(aten.slice.Tensor, x, -1, 2, 100)
    before = b.done(every_other, beyond)
    after, _ = apply(Canonicalize(), before)
    assert text(after) == lines("""
        %0 = aten.slice(x, 1, 1, 9, 2)
        %1 = aten.slice(x, 1, 2, 9)
        return [%0, %1]
    """)
    same_bits(before, after)


def test_what_looks_idle_but_is_not() -> None:
    """Broadcasts, promotions and scaled sums compute something."""
    b = Builder()
    x = b.input("x", 4)
    ids = b.input("ids", 4, dtype=torch.int64)
    grown = b.call(aten.mul.Tensor, b.call(aten.expand.default, x, [3, 4]), 2.0)
    promoted = b.call(aten.mul.Tensor, ids, 1.0)
    reversed_scale = b.call(aten.add.Tensor, x, 0.0, alpha=2)
    dropped = b.call(aten.dropout.default, x, 0.5, False)
    before = b.done(grown, promoted, reversed_scale)
    assert dropped is not None  # not read by the output: dead, and left to the manager
    after, outcome = apply(Canonicalize(), before)
    assert text(after) == lines("""
        %0 = aten.expand(x, [3, 4])
        %1 = aten.mul(%0, 2.0)
        %2 = aten.mul(ids, 1.0)
        %3 = aten.add(x, 0.0, alpha=2)
        return [%1, %2, %3]
    """)
    assert outcome.changed == 1
    assert values(after)[1].dtype == torch.float32


def test_a_canonical_graph_is_left() -> None:
    b = Builder()
    x = b.call(aten.reshape.default, b.input("x", 2, 6), [2, 3, 2])
    assert untouched(Canonicalize(), b.done(b.call(aten.slice.Tensor, x, 2, 0, 1))) == []
