"""keep-quantized: what the checkpoint holds quantized is read as it is, merged where it fits, and else made dense."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from ingot.passes.base import Context
from ingot.passes.fusion.merge_projections import MergeProjections
from ingot.passes.graph import TracedGraph
from ingot.passes.quantize.held import QuantizedPart, QuantizedWeight
from ingot.passes.quantize.keep import KeepQuantized
from ingot.passes.quantize.round_to_nearest import RoundToNearest
from ingot.passes.weights import Constant, Quantized, Stored
from ingot.runtime.ops.quantized import dequantize

from .graphs import DECODE, Builder, apply, aten, lines, random, text, untouched, values

X = random("x", 2, 1, 8)  # what `values` gives the input x
ORDER = Constant(torch.tensor([7, 0, 6, 1, 5, 2, 4, 3]))


def held(name: str, n: int, k: int, symmetric: bool = True, **more: Any) -> QuantizedWeight:
    """A weight in int4, as if the checkpoint held it so."""
    stored, make = Stored(name, (n, k), torch.float32), RoundToNearest("int4", 4, symmetric)
    zero = None if symmetric else QuantizedPart(Quantized(stored, make, "zero"), (n, k // 4), torch.uint8)
    return QuantizedWeight(
        "int4", (1, 4), "", QuantizedPart(Quantized(stored, make, "values"), (n, k // 2), torch.uint8),
        QuantizedPart(Quantized(stored, make, "scale"), (n, k // 4), torch.float16), zero, **more,
    )  # fmt: skip


def dense(name: str, symmetric: bool = True) -> torch.Tensor:
    """What `held` stands for, [4, 8]."""
    parts = RoundToNearest("int4", 4, symmetric)(random(name, 4, 8))
    return dequantize(parts["values"], parts["scale"], parts.get("zero"), "int4", [1, 4])


def options(**weights: QuantizedWeight) -> Context:
    return dataclasses.replace(DECODE, held=weights)


def subject(*names: str) -> TracedGraph:
    """Projections [4, 8] of one input."""
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.input("x", 2, 1, 8)
    return b.done(*(b.call(aten.linear.default, x, b.weight(name, 4, 8)) for name in names))


def test_before_and_after() -> None:
    before, ctx = subject("w", "v"), options(w=held("w", 4, 8, symmetric=False))
    after, outcome = apply(KeepQuantized(), before, ctx)
    assert text(after) == lines("""
        %0 = ingot.linear_quantized(x, w__int4, w__scale, w__zero, None, 'int4', [1, 4], '')
        %1 = aten.linear(x, v)
        return [%0, %1]
    """)
    assert (outcome.changed, outcome.missed, outcome.facts) == (1, [], {"held": {"int4": 32}, "activations": []})
    first, second = values(after)
    torch.testing.assert_close(first, torch.nn.functional.linear(X, dense("w", symmetric=False)))
    assert torch.equal(second, values(before)[1])


def test_without_such_weights_it_does_nothing() -> None:
    assert untouched(KeepQuantized(), subject("w"), DECODE) == []


def test_merged_ones_are_stacked() -> None:
    ctx = options(w=held("w", 4, 8), v=held("v", 4, 8))
    merged, outcome = apply(MergeProjections(), subject("w", "v"), ctx)
    assert (outcome.changed, outcome.missed) == (2, [])
    after, outcome = apply(KeepQuantized(), merged, ctx)
    assert text(after).count("linear_quantized") == outcome.changed == 1
    apart = apply(KeepQuantized(), subject("w", "v"), ctx)[0]
    for a, b in zip(values(after), values(apart)):
        torch.testing.assert_close(a, b)


def test_columns_in_another_order_meet_their_input() -> None:
    after, _ = apply(KeepQuantized(), subject("w"), options(w=held("w", 4, 8, columns=ORDER)))
    assert text(after) == lines("""
        %0 = aten.index_select(x, 2, w__columns)
        %1 = ingot.linear_quantized(%0, w__int4, w__scale, None, None, 'int4', [1, 4], '')
        return %1
    """)
    torch.testing.assert_close(values(after)[0], torch.nn.functional.linear(X[..., ORDER.value], dense("w")))


def test_different_ones_are_not_merged() -> None:
    """In format, in zero points, in the order of columns, quantized and not: each alone, and the report says why."""
    for other in (
        held("v", 4, 8, symmetric=False),
        held("v", 4, 8, columns=ORDER),
        dataclasses.replace(held("v", 4, 8), activations="int8"),
        None,
    ):
        ctx = options(w=held("w", 4, 8), **({"v": other} if other else {}))
        reasons = untouched(MergeProjections(), subject("w", "v"), ctx)
        assert reasons and all("quantized otherwise" in reason for reason in reasons)


def test_blocks_of_rows_that_do_not_meet() -> None:
    blocks = dataclasses.replace(held("w", 4, 8), group=(3, 4))
    assert untouched(MergeProjections(), subject("w", "v"), options(w=blocks, v=blocks)) == [
        "the checkpoint's blocks of 3 rows do not meet"
    ]


def test_what_another_pass_merged_wrongly_is_made_dense() -> None:
    merged, _ = apply(MergeProjections(), subject("w", "v"), DECODE)
    assert untouched(KeepQuantized(), merged, options(w=held("w", 4, 8))) == [
        "merged with a weight that is dense: made dense"
    ]


def test_what_is_not_done_is_reported() -> None:
    _, outcome = apply(KeepQuantized(), subject("w"), options(w=held("w", 4, 8, note="static scales are not used")))
    assert [miss.reason for miss in outcome.missed] == ["static scales are not used"]
    dense = dataclasses.replace(DECODE, made_dense={"w": "mxfp4 experts"})
    assert untouched(KeepQuantized(), subject("w"), dense) == ["mxfp4 experts: made dense, exactly"]
