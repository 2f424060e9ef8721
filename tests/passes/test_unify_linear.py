"""unify-linear: products with stored weights become aten.linear. The same sums in another order: ≤ 1e-6 relative."""

from __future__ import annotations

import torch
from ingot.passes.cleanup.linear import UnifyLinear
from ingot.passes.weights import Stored, Transposed

from .graphs import F32, Builder, apply, aten, lines, nearly_same, text, untouched


def test_gpt2s_conv1d_becomes_linear() -> None:
    b = Builder()
    x = b.input("x", 2, 3, 8)
    flat = b.call(aten.reshape.default, x, [6, 8])
    product = b.call(aten.addmm.default, b.weight("bias", 5), flat, b.weight("w", 8, 5))
    before = b.done(b.call(aten.reshape.default, product, [2, 3, 5]))
    assert text(before) == lines("""
        %0 = aten.reshape(x, [6, 8])
        %1 = aten.addmm(bias, %0, w)
        %2 = aten.reshape(%1, [2, 3, 5])
        return %2
    """)
    after, outcome = apply(UnifyLinear(), before)
    assert text(after) == lines("""
        %0 = aten.linear(x, w__t, bias)
        return %0
    """)
    assert outcome.changed == 2
    assert after.weights.entries["w__t"] == Transposed(Stored("w", (8, 5), F32))
    assert "w" not in after.weights.entries
    nearly_same(before, after)


def test_mm_without_a_bias() -> None:
    b = Builder()
    before = b.done(b.call(aten.mm.default, b.input("x", 4, 8), b.weight("w", 8, 5)))
    after, outcome = apply(UnifyLinear(), before)
    assert text(after) == "%0 = aten.linear(x, w__t, None)\nreturn %0"
    assert outcome.changed == 1
    nearly_same(before, after)


def test_a_weight_used_twice_is_turned_once() -> None:
    b = Builder()
    x, w = b.input("x", 4, 8), b.weight("w", 8, 8)
    before = b.done(b.call(aten.mm.default, b.call(aten.mm.default, x, w), w))
    after, _ = apply(UnifyLinear(), before)
    assert set(after.weights.entries) == {"w__t"}
    nearly_same(before, after, 2e-6)


def test_near_misses() -> None:
    b = Builder()
    x, w, bias = b.input("x", 4, 8), b.weight("w", 8, 5), b.weight("bias", 5)
    computed = b.call(aten.mm.default, x, b.call(aten.mul.Tensor, w, 2.0))
    scaled = b.call(aten.addmm.default, bias, x, w, alpha=2)
    matrix = b.call(aten.addmm.default, b.weight("m", 4, 5), x, w)
    assert untouched(UnifyLinear(), b.done(computed, scaled, matrix)) == [
        "the second matrix is computed, not stored",
        "addmm with alpha or beta",
        "what it adds is not one bias per column",
    ]


def test_reshapes_that_do_more_than_fold_stay() -> None:
    """The reshape behind splits the heads: it is no inverse of the one before."""
    b = Builder()
    flat = b.call(aten.reshape.default, b.input("x", 2, 3, 8), [6, 8])
    product = b.call(aten.linear.default, flat, b.weight("w", 4, 8))
    heads = b.call(aten.reshape.default, product, [2, 3, 2, 2])
    assert untouched(UnifyLinear(), b.done(heads)) == []
    b = Builder()
    regrouped = b.call(aten.reshape.default, b.input("x", 2, 12), [6, 4])
    product = b.call(aten.linear.default, regrouped, b.weight("w", 4, 4))
    assert untouched(UnifyLinear(), b.done(b.call(aten.reshape.default, product, [2, 12]))) == []


def test_a_product_read_elsewhere_keeps_its_reshape() -> None:
    b = Builder()
    flat = b.call(aten.reshape.default, b.input("x", 2, 3, 8), [6, 8])
    product = b.call(aten.linear.default, flat, b.weight("w", 4, 8))
    out = b.call(aten.reshape.default, product, [2, 3, 4])
    assert untouched(UnifyLinear(), b.done(out, b.call(torch.ops.aten.relu.default, product))) == []
