"""merge-projections: linear layers of one input become one. The same sums in another order: ≤ 1e-6 relative."""

from __future__ import annotations

import dataclasses

import torch
from ingot.passes.base import QuantizationGroup
from ingot.passes.fusion.merge_projections import MergeProjections
from ingot.passes.weights import Concat, Stored

from .graphs import BF16, DECODE, F32, Builder, apply, aten, lines, nearly_same, reasons, text, untouched


def test_query_key_value() -> None:
    b = Builder()
    x = b.input("x", 2, 3, 8)
    weights = [b.weight(f"layer__{n}_proj__weight", size, 8) for n, size in (("q", 8), ("k", 4), ("v", 4))]
    q, k, v = (b.call(aten.linear.default, x, w) for w in weights)
    before = b.done(q, b.call(aten.neg.default, k), v)
    after, outcome = apply(MergeProjections(), before)
    merged = "layer__q_proj__weight__and__k_proj__and__v_proj"
    assert text(after) == lines(f"""
        %0 = aten.linear(x, {merged}, None)
        %1 = aten.slice(%0, 2, 0, 8)
        %2 = aten.slice(%0, 2, 8, 12)
        %3 = aten.slice(%0, 2, 12, 16)
        %4 = aten.neg(%2)
        return [%1, %4, %3]
    """)
    assert outcome.changed == 3
    parts = tuple(Stored(w.target, tuple(w.meta["val"].shape), F32) for w in weights)  # type: ignore[arg-type]
    assert after.weights.entries == {merged: Concat(parts)}
    nearly_same(before, after)


def test_biases_are_stacked_too() -> None:
    b = Builder()
    x = b.input("x", 2, 8)
    pairs = [(b.weight(f"{n}__weight", 4, 8), b.weight(f"{n}__bias", 4)) for n in ("gate", "up")]
    before = b.done(*(b.call(aten.linear.default, x, w, bias) for w, bias in pairs))
    after, _ = apply(MergeProjections(), before)
    assert text(after).splitlines()[0] == "%0 = aten.linear(x, gate__weight__and__up, gate__bias__and__up)"
    nearly_same(before, after)


def test_each_input_has_its_own_group() -> None:
    b = Builder()
    x, y = b.input("x", 2, 8), b.input("y", 2, 8)
    calls = [b.call(aten.linear.default, i, b.weight(f"w{n}__weight", 4, 8)) for n, i in enumerate((x, y, x, y))]
    before = b.done(*calls)
    after, outcome = apply(MergeProjections(), before)
    assert outcome.changed == 4
    assert len(after.weights.entries) == 2
    nearly_same(before, after)


def test_a_layer_alone_stays() -> None:
    b = Builder()
    assert (
        untouched(MergeProjections(), b.done(b.call(aten.linear.default, b.input("x", 2, 8), b.weight("w", 4, 8))))
        == []
    )


def test_near_miss_one_bias() -> None:
    b = Builder()
    x = b.input("x", 2, 8)
    one = b.call(aten.linear.default, x, b.weight("a", 4, 8), b.weight("bias", 4))
    two = b.call(aten.linear.default, x, b.weight("b", 4, 8))
    assert untouched(MergeProjections(), b.done(one, two)) == ["some of the layers have a bias and some have none"]


def test_near_miss_a_computed_bias() -> None:
    b = Builder()
    x = b.input("x", 2, 8)
    bias = b.call(aten.mul.Tensor, b.weight("bias", 4), 2.0)
    calls = [b.call(aten.linear.default, x, b.weight(n, 4, 8), bias) for n in ("a", "b")]
    assert untouched(MergeProjections(), b.done(*calls)) == ["a bias is computed, not stored"]


def test_near_miss_a_shared_weight() -> None:
    """A tied head would be kept twice: once alone for the embedding, once stacked."""
    b = Builder()
    tied = b.weight("embed", 4, 8)
    x = b.call(aten.embedding.default, tied, b.tokens)
    calls = [b.call(aten.linear.default, x, tied), b.call(aten.linear.default, x, b.weight("other", 4, 8))]
    assert untouched(MergeProjections(), b.done(*calls)) == ["a weight is used elsewhere too"]


def test_near_miss_the_same_layer_twice() -> None:
    b = Builder()
    x, w = b.input("x", 2, 8), b.weight("w", 4, 8)
    calls = [b.call(aten.linear.default, x, w) for _ in range(2)]
    assert untouched(MergeProjections(), b.done(*calls)) == ["a weight is used elsewhere too"]


def test_near_miss_two_dtypes() -> None:
    b = Builder()
    x, w = b.input("x", 2, 8, dtype=BF16), b.weight("w", 4, 8, dtype=BF16)
    one = b.call(aten.linear.default, x, w)
    two = b.call(aten.linear.default, x, b.weight("v", 4, 8, dtype=BF16))
    traced = b.done(one, two)
    wide = torch.empty(4, 8, device="meta")
    w.meta["val"], traced.gm.w, traced.weights.entries["w"] = wide, wide, Stored("w", (4, 8), F32)
    assert untouched(MergeProjections(), traced) == ["the weights differ in dtype"]


def test_only_layers_that_are_quantized_alike_are_stacked() -> None:
    b = Builder()
    x = b.input("x", 2, 8)
    calls = [b.call(aten.linear.default, x, b.weight(n, 4, 8)) for n in ("q_proj", "k_proj", "v_proj", "router")]
    before = b.done(*calls[:3], b.call(aten.topk.default, calls[3], 2))
    eight, four = QuantizationGroup("W8A16", ("v_proj",)), QuantizationGroup("W4A16", ("Linear",), group_size=4)
    after, outcome = apply(MergeProjections(), before, dataclasses.replace(DECODE, quantization=(eight, four)))
    assert set(after.weights.entries) == {"q_proj__and__k_proj", "v_proj", "router"}
    assert outcome.changed == 2
    assert reasons(outcome) == ["others of its input are quantized otherwise"] * 3
    after, outcome = apply(MergeProjections(), before)
    assert (set(after.weights.entries), outcome.changed) == ({"q_proj__and__k_proj__and__v_proj__and__router"}, 4)
