"""sample-tokens: the graph returns sampled tokens beside its logits. Exact: the logits keep every bit."""

from __future__ import annotations

import dataclasses

import torch
from ingot.passes.plan.sample import SAMPLING_INPUTS, SampleTokens

from .graphs import DECODE, PREFILL, Builder, Stage, apply, lines, random, text, untouched, values


def test_decode_counts_by_its_position() -> None:
    b = Builder(2, 1)
    b.input("block_tables", 2, 8, dtype=torch.int32)
    before = b.done(b.input("logits", 2, 11))
    after, outcome = apply(SampleTokens(), before, DECODE)
    assert text(after) == lines("""
        %0 = aten.reshape(positions, [2])
        %1 = ingot.sample(logits, temperature, top_k, top_p, min_p, seeds, %0)
        return [%1, logits]
    """)
    assert outcome.changed == 1
    added = [n for n in after.graph.nodes if n.op == "placeholder"][-5:]
    assert [(n.target, n.meta["val"].dtype) for n in added] == list(SAMPLING_INPUTS)
    assert all(tuple(n.meta["val"].shape) == (2,) for n in added)


def test_prefill_counts_by_the_last_tokens_position() -> None:
    b = Builder(1, 8)
    b.input("block_tables", 1, 8, dtype=torch.int32)
    logits = b.input("logits", 1, 11)
    b.input("last_index", 1, dtype=torch.int64)
    after, _ = apply(SampleTokens(), b.done(logits), PREFILL)
    assert text(after) == lines("""
        %0 = aten.reshape(last_index, [1, 1])
        %1 = aten.gather(positions, 1, %0)
        %2 = aten.reshape(%1, [1])
        %3 = ingot.sample(logits, temperature, top_k, top_p, min_p, seeds, %2)
        return [%3, logits]
    """)
    assert SampleTokens.leaves == Stage.CACHED


def test_on_the_gpu_the_host_gets_the_logit_of_each_token() -> None:
    """Logits stay on the device: in these the host looks for NaN."""
    b = Builder(2, 1)
    b.input("block_tables", 2, 8, dtype=torch.int32)
    before = b.done(b.input("logits", 2, 11))
    after, _ = apply(SampleTokens(), before, dataclasses.replace(DECODE, device="cuda"))
    assert text(after) == lines("""
        %0 = aten.reshape(positions, [2])
        %1 = ingot.sample_with_logit(logits, temperature, top_k, top_p, min_p, seeds, %0)
        %2 = getitem(%1, 0)
        %3 = getitem(%1, 1)
        return [%2, logits, %3]
    """)
    tokens, logits, picked = values(after, top_k=torch.zeros(2, dtype=torch.int32), min_p=torch.zeros(2))
    assert torch.equal(picked, logits[torch.arange(2), tokens])


def test_a_row_gets_the_same_token_from_prefill_and_decode() -> None:
    """The random number hangs on seed and position, not on the engine, the row or the batch."""
    logits = random("logits", 1, 50)
    knobs = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0, "seeds": 1234}
    dtypes = dict(SAMPLING_INPUTS)
    b = Builder(1, 8)
    b.input("block_tables", 1, 8, dtype=torch.int32)
    x = b.input("logits", 1, 50)
    b.input("last_index", 1, dtype=torch.int64)
    prefill, _ = apply(SampleTokens(), b.done(x), PREFILL)
    b = Builder(2, 1)
    b.input("block_tables", 2, 8, dtype=torch.int32)
    decode, _ = apply(SampleTokens(), b.done(b.input("logits", 2, 50)), DECODE)
    seen = set()
    for position in range(3, 8):
        one = {n: torch.tensor([v], dtype=dtypes[n]) for n, v in knobs.items()}
        rows = torch.arange(8)[None]
        token, same = values(prefill, logits=logits, positions=rows, last_index=torch.tensor([position]), **one)
        assert torch.equal(same, logits)
        two = {n: torch.tensor([v, v], dtype=dtypes[n]) for n, v in knobs.items()}
        two["seeds"][0] = 99
        where = torch.tensor([[0], [position]])
        tokens, _ = values(decode, logits=logits.repeat(2, 1), positions=where, **two)
        assert tokens[1] == token[0]
        seen.add(int(token))
    assert len(seen) > 1


def test_a_second_run_finds_nothing() -> None:
    b = Builder(2, 1)
    b.input("block_tables", 2, 8, dtype=torch.int32)
    after, _ = apply(SampleTokens(), b.done(b.input("logits", 2, 11)), DECODE)
    assert untouched(SampleTokens(), after, DECODE) == []
