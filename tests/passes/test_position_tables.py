"""position-tables: what follows from a token's position alone is looked up. Exact: every bit stays."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ingot.passes.base import Context
from ingot.passes.fusion.position_tables import PositionTables

from .graphs import DECODE, PREFILL, Builder, apply, aten, lines, same_bits, text, untouched

FREQUENCIES = torch.tensor([1.0, 0.1, 0.01])


def rope(b: Builder, ctx: Context) -> object:
    """cos of positions times frequencies as models write it, [batch, 1, length, 3]."""
    inverse = b.call(
        aten.expand.default, b.call(aten.reshape.default, b.constant("f", FREQUENCIES), [1, 3, 1]), [ctx.batch, 3, 1]
    )
    where = b.call(aten.reshape.default, b.positions, [ctx.batch, 1, ctx.length])
    angles = b.call(aten.bmm.default, inverse, b.call(aten._to_copy.default, where, dtype=torch.float32))
    cos = b.call(aten.cos.default, b.call(aten.transpose.int, angles, 1, 2))
    return b.call(aten.unsqueeze.default, cos, 1)


@pytest.mark.parametrize("ctx", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_before_and_after(ctx: Context) -> None:
    b = Builder(ctx.batch, ctx.length)
    x = b.input("x", ctx.batch, 4, ctx.length, 3)
    before = b.done(b.call(aten.mul.Tensor, x, rope(b, ctx)))
    after, outcome = apply(PositionTables(), before, ctx)
    (name,) = after.weights.entries
    assert name.startswith("positions_")
    assert text(after) == lines(f"""
        %0 = aten.embedding({name}, positions)
        %1 = aten.reshape(%0, [{ctx.batch}, 1, {ctx.length}, 3])
        %2 = aten.mul(x, %1)
        return %2
    """)
    assert outcome.changed == 1
    assert after.weights.evaluate(name, lambda n: torch.empty(0)).shape == (ctx.max_length, 3)
    for start in (0, ctx.max_length - ctx.length):
        rows = torch.arange(start, start + ctx.length).expand(ctx.batch, -1).clone()
        same_bits(before, after, positions=rows)
    same_bits(before, after, positions=torch.full((ctx.batch, ctx.length), ctx.max_length - 1))


def test_engines_of_one_artifact_have_one_table() -> None:
    names = set()
    for ctx in (DECODE, PREFILL, dataclasses.replace(DECODE, batch=5), dataclasses.replace(PREFILL, length=24)):
        b = Builder(ctx.batch, ctx.length)
        after, _ = apply(
            PositionTables(),
            b.done(b.call(aten.neg.default, b.call(aten.add.Tensor, rope(b, ctx), b.input("x", 1)))),
            ctx,
        )
        names |= set(after.weights.entries)
    assert len(names) == 1


@pytest.mark.parametrize(
    "ctx", [PREFILL, dataclasses.replace(PREFILL, length=40)], ids=["fits", "longer than the table"]
)
def test_near_miss_a_value_that_depends_on_the_neighbours(ctx: Context) -> None:
    """Dynamic scaling looks at the largest position of the chunk: a table would forget that."""
    b = Builder(1, ctx.length)
    wide = b.call(aten._to_copy.default, b.positions, dtype=torch.float32)
    scaled = b.call(aten.div.Tensor, wide, b.call(aten.add.Tensor, b.call(aten.amax.default, wide, [-1], True), 1.0))
    out = b.call(aten.mul.Tensor, b.input("x", 1, ctx.length), scaled)
    assert untouched(PositionTables(), b.done(out), ctx) == ["its value depends on more than each token's own position"]


def test_near_misses_by_shape() -> None:
    b = Builder(1, 8)
    wide = b.call(aten._to_copy.default, b.positions, dtype=torch.float32)
    total = b.call(aten.sum.default, wide)
    behind = b.call(aten.expand.default, b.call(aten.reshape.default, wide, [1, 1, 8]), [1, 3, 8])
    x = b.input("x", 1)
    outputs = [b.call(aten.mul.Tensor, x, value) for value in (total, behind)]
    assert untouched(PositionTables(), b.done(*outputs), PREFILL) == [
        "its shape does not hold one row per token",
        "tokens are not its leading dimensions",
    ]


def test_near_miss_a_table_that_would_be_huge() -> None:
    b = Builder(1, 8)
    mask = b.call(aten.expand.default, b.call(aten.reshape.default, b.positions, [1, 8, 1]), [1, 8, 1 << 21])
    out = b.call(aten.mul.Tensor, b.input("x", 1), mask)
    assert untouched(PositionTables(), b.done(out), PREFILL) == ["its table would be too large"]


def test_learned_positions_are_a_lookup_already() -> None:
    b = Builder(1, 8)
    stored = b.call(aten.embedding.default, b.weight("wpe", 32, 4), b.positions)
    known = b.call(aten.embedding.default, b.constant("sinusoids", torch.ones(32, 4)), b.positions)
    out = b.call(aten.add.Tensor, b.call(aten.add.Tensor, stored, known), b.input("x", 1, 8, 4))
    assert untouched(PositionTables(), b.done(out), PREFILL) == []
