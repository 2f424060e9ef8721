"""gather-last-token: logits only where a token is sampled. A product of fewer rows may round otherwise: ≤ 1e-6."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.passes.graph import TracedGraph
from ingot.passes.plan.last_token import GatherLastToken
from torch import fx

from .graphs import BF16, DECODE, PREFILL, Builder, apply, aten, lines, reasons, text, untouched, values


def head(b: Builder, x: fx.Node, dtype: torch.dtype = torch.float32) -> Any:
    return b.call(aten.linear.default, x, b.weight("head", 11, 4, dtype=dtype))


def check(before: TracedGraph, after: TracedGraph, tolerance: float = 1e-6) -> None:
    """The row at last_index, whichever it is."""
    whole = values(before)[0].float()
    for last in (0, 3, 7):
        got = values(after, last_index=torch.tensor([last]))[0]
        assert got.dtype == torch.float32 and got.shape == (1, 11)
        assert (got - whole[:, last]).abs().max() <= tolerance * whole.abs().max()


def test_prefill_gathers_before_the_head() -> None:
    b = Builder(1, 8)
    before = b.done(head(b, b.input("x", 1, 8, 4)))
    after, outcome = apply(GatherLastToken(), before, PREFILL)
    assert text(after) == lines("""
        %0 = aten.reshape(last_index, [1, 1, 1])
        %1 = aten.expand(%0, [1, 1, 4])
        %2 = aten.gather(x, 1, %1)
        %3 = aten.linear(%2, head)
        %4 = aten.reshape(%3, [1, 11])
        return %4
    """)
    assert (outcome.changed, outcome.missed) == (1, [])
    assert [n.target for n in after.graph.nodes if n.op == "placeholder"] == ["tokens", "positions", "x", "last_index"]
    check(before, after)


def test_decode_only_drops_the_length() -> None:
    b = Builder(2, 1)
    before = b.done(head(b, b.input("x", 2, 1, 4)))
    after, _ = apply(GatherLastToken(), before, DECODE)
    assert text(after) == "%0 = aten.linear(x, head)\n%1 = aten.reshape(%0, [2, 11])\nreturn %1"
    assert torch.equal(values(after)[0], values(before)[0][:, 0])


def test_ops_behind_the_head_follow() -> None:
    """Gemma 2 caps its logits, Granite divides them: each token alone."""
    b = Builder(1, 8)
    logits = head(b, b.input("x", 1, 8, 4, dtype=BF16), BF16)
    capped = b.call(aten.mul.Tensor, b.call(aten.tanh.default, b.call(aten.div.Tensor, logits, 30.0)), 30.0)
    before = b.done(capped)
    after, outcome = apply(GatherLastToken(), before, PREFILL)
    assert text(after).splitlines()[3:] == [
        "%3 = aten.linear(%2, head)",
        "%4 = aten.div(%3, 30.0)",
        "%5 = aten.tanh(%4)",
        "%6 = aten.mul(%5, 30.0)",
        "%7 = aten.reshape(%6, [1, 11])",
        "%8 = aten._to_copy(%7, dtype=float32)",
        "return %8",
    ]
    assert outcome.changed == 1
    check(before, after, torch.finfo(BF16).eps)


@pytest.mark.parametrize("what", ["norm", "split", "sum"])
def test_near_miss_something_else_behind_the_head(what: str) -> None:
    """All logits are computed then, and the row is taken from them."""
    b = Builder(1, 8)
    logits = head(b, b.input("x", 1, 8, 4))
    if what == "norm":
        logits = b.call(aten.softmax.int, logits, 1)
    elif what == "split":
        logits = b.part(b.call(aten.split.Tensor, logits, 11, -1), 0)
    else:
        logits = b.call(aten.add.Tensor, logits, b.call(aten.relu.default, logits))
    before = b.done(logits)
    after, outcome = apply(GatherLastToken(), before, PREFILL)
    assert reasons(outcome) == ["no LM head found behind the logits: all of them are computed"]
    check(before, after, 0.0)


def test_a_second_run_finds_nothing() -> None:
    b = Builder(1, 8)
    after, _ = apply(GatherLastToken(), b.done(head(b, b.input("x", 1, 8, 4))), PREFILL)
    assert untouched(GatherLastToken(), after, PREFILL) == []
