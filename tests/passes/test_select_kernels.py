"""select-kernels: on the CPU, products with stored weights go to Ingot's kernel. Exact: its semantics are linear's."""

from __future__ import annotations

import dataclasses

import torch
from ingot.passes.graph import TracedGraph
from ingot.passes.plan.kernels import SelectKernels

from .graphs import BF16, DECODE, Builder, apply, aten, lines, same_bits, text, untouched


def subject(dtype: torch.dtype = torch.float32, computed: bool = False) -> TracedGraph:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.input("x", 2, 1, 8, dtype=dtype)
    weight = b.weight("w", 4, 8, dtype=dtype)
    y = b.call(aten.linear.default, x, b.call(aten.neg.default, weight) if computed else weight)
    return b.done(b.call(aten.linear.default, y, b.weight("v", 6, 4, dtype=dtype), b.weight("bias", 6, dtype=dtype)))


def test_before_and_after() -> None:
    for dtype in (torch.float32, BF16):
        before = subject(dtype)
        after, outcome = apply(SelectKernels(), before)
        assert text(after) == lines("""
            %0 = ingot.linear_dense(x, w, None)
            %1 = ingot.linear_dense(%0, v, bias)
            return %1
        """)
        assert (outcome.changed, outcome.missed) == (2, [])
        same_bits(before, after)


def test_near_misses() -> None:
    _, outcome = apply(SelectKernels(), subject(computed=True))
    assert (outcome.changed, [m.reason for m in outcome.missed]) == (1, ["its weight is computed"])
    assert untouched(SelectKernels(), subject(torch.float64)) == ["no kernel for its dtype"] * 2


def test_other_devices_keep_linear() -> None:
    assert untouched(SelectKernels(), subject(), dataclasses.replace(DECODE, device="cuda")) == []
