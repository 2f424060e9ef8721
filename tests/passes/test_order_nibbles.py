"""order-nibbles: int4 weights in the order in which the GPU's kernels read them. Exact: the same values."""

from __future__ import annotations

import dataclasses

import torch
from ingot.passes.graph import TracedGraph
from ingot.passes.plan.nibbles import OrderNibbles
from ingot.runtime.ops.schema import overload

from .graphs import DECODE, Builder, apply, aten, lines, same_bits, text, untouched

CUDA = dataclasses.replace(DECODE, device="cuda")


def subject(format: str = "int4", computed: bool = False) -> TracedGraph:
    """A product and a look-up that share one weight [6, 8]."""
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.input("x", 2, 1, 8)
    stored = torch.arange(24, dtype=torch.uint8).reshape(6, 4) * 9
    weight = b.constant("w", stored if format == "int4" else stored.repeat(1, 2).to(torch.int8))
    weight = b.call(aten.clone.default, weight) if computed else weight
    scale = b.constant("s", torch.rand(6, 2 if format == "int4" else 1))
    group = [1, 4] if format == "int4" else [1, 8]
    y = b.call(
        overload("fused_linear"), x, weight, None, None, None, 0.0, 0.0, False, "", True, False, scale, None, format,
        group, "",
    )  # fmt: skip
    like = b.call(aten.empty.memory_format, [0], dtype=torch.float32, device=torch.device("meta"))
    rows = b.call(overload("embedding_quantized"), b.tokens, weight, scale, None, like, format, group)
    return b.done(y, rows)


def test_both_readers_of_a_weight_read_its_halves() -> None:
    before = subject()
    after, outcome = apply(OrderNibbles(), before, CUDA)
    assert text(after) == lines("""
        %0 = ingot.fused_linear(x, w__halves, None, None, None, 0.0, 0.0, False, '', True, False, s, None, \
'int4_halves', [1, 4], '')
        %1 = aten.empty([0], dtype=float32, device=device(type='meta'))
        %2 = ingot.embedding_quantized(tokens, w__halves, s, None, %1, 'int4_halves', [1, 4])
        return [%0, %2]
    """)
    assert (outcome.changed, outcome.missed) == (2, [])
    assert set(after.weights.entries) == {"w__halves", "s"}
    same_bits(before, after)


def test_near_misses() -> None:
    assert untouched(OrderNibbles(), subject(computed=True), CUDA) == ["its weight is computed"] * 2
    assert untouched(OrderNibbles(), subject("int8"), CUDA) == []
    assert untouched(OrderNibbles(), subject()) == []
