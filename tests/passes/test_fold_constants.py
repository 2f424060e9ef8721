"""fold-constants: what follows from constants alone is computed at build. Exact: every bit stays."""

from __future__ import annotations

import torch
from ingot.passes.cleanup.fold_constants import FoldConstants
from ingot.passes.weights import Constant

from .graphs import Builder, apply, aten, lines, same_bits, text, untouched, values


def test_before_and_after() -> None:
    b = Builder()
    x = b.input("x", 2, 4)
    frequencies = b.call(aten.mul.Tensor, b.constant("inverse", torch.tensor([1.0, 0.5, 0.25, 0.125])), 3.0)
    index = b.call(aten.arange.default, 4, dtype=torch.float32, device=torch.device("meta"))
    table = b.call(aten.cos.default, b.call(aten.mul.Tensor, frequencies, index))
    before = b.done(b.call(aten.mul.Tensor, x, table))
    assert text(before) == lines("""
        %0 = aten.mul(inverse, 3.0)
        %1 = aten.arange(4, dtype=float32, device=device(type='meta'))
        %2 = aten.mul(%0, %1)
        %3 = aten.cos(%2)
        %4 = aten.mul(x, %3)
        return %4
    """)
    after, outcome = apply(FoldConstants(), before)
    (name,) = after.weights.entries
    assert text(after) == f"%0 = aten.mul(x, {name})\nreturn %0"
    assert outcome.changed == 1
    assert name.startswith("folded_")
    assert isinstance(after.weights.entries[name], Constant)
    same_bits(before, after)


def test_equal_values_share_one_weight_whatever_made_them() -> None:
    """The name is the value's digest, so that engines of one artifact share it too."""
    b = Builder()
    x = b.input("x", 3)
    a = b.call(aten.mul.Tensor, b.constant("ones", torch.ones(3)), 2.0)
    c = b.call(aten.full.default, [3], 2.0, device=torch.device("meta"))
    before = b.done(b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, a), c))
    after, outcome = apply(FoldConstants(), before)
    assert outcome.changed == 2
    assert len(after.weights.entries) == 1
    same_bits(before, after)


def test_a_scalar_tensor_stays_one() -> None:
    """Its dtype does not promote what it is multiplied with; a number or a vector in its place would."""
    b = Builder()
    x = b.input("x", 3, dtype=torch.bfloat16)
    scale = b.call(aten.mul.Tensor, b.constant("scale", torch.tensor(1.7)), 1.3)
    before = b.done(b.call(aten.mul.Tensor, x, scale))
    after, outcome = apply(FoldConstants(), before)
    assert outcome.changed == 1
    assert values(after)[0].dtype == torch.bfloat16
    same_bits(before, after)


def test_constants_in_between_are_folded_where_they_are_read() -> None:
    b = Builder()
    x = b.input("x", 4)
    inner = b.call(aten.mul.Tensor, b.constant("c", torch.arange(4.0)), 2.0)
    outer = b.call(aten.sin.default, inner)
    before = b.done(b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, inner), outer))
    after, outcome = apply(FoldConstants(), before)
    assert outcome.changed == 2
    assert len(after.weights.entries) == 2
    same_bits(before, after)


def test_stored_weights_and_inputs_are_no_constants() -> None:
    b = Builder()
    stored = b.call(aten.mul.Tensor, b.weight("w", 4), 2.0)
    given = b.call(aten.mul.Tensor, b.input("x", 4), b.constant("c", torch.ones(4)))
    assert untouched(FoldConstants(), b.done(b.call(aten.add.Tensor, stored, given))) == []


def test_near_miss_a_large_value() -> None:
    b = Builder()
    table = b.call(aten.full.default, [1 << 20, 2], 1.0, device=torch.device("meta"))
    x = b.input("x", 1, 2)
    assert untouched(FoldConstants(), b.done(b.call(aten.mul.Tensor, x, table))) == [
        f"its value has {2 << 20} elements"
    ]
