"""insert-kv-cache: attention over a sequence becomes attention over a paged cache.

The sums run over more (masked) keys, which may round otherwise: ≤ 1e-6 relative in float32.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.evaluate import Evaluator
from ingot.passes.base import Context
from ingot.passes.cache.paged import InsertKVCache
from ingot.passes.graph import TracedGraph
from ingot.passes.manager import PassError
from ingot.runtime.ops.schema import overload

from .graphs import DECODE, PREFILL, Builder, apply, aten, lines, random, text

VOCABULARY, LENGTH = 16, 24


def attention_only(ctx: Context, window: int = 0, softcap: float = 0.0, sinks: bool = False) -> TracedGraph:
    """Two layers: embedded tokens and positions -> q, k, v -> attention; 4 query heads over 2 key heads."""
    b = Builder(ctx.batch, ctx.length)
    x = b.call(aten.embedding.default, b.weight("embed", VOCABULARY, 16), b.tokens)
    x = b.call(aten.add.Tensor, x, b.call(aten.embedding.default, b.weight("wpe", 32, 16), b.positions))
    for layer in (0, 1):
        heads = []
        for name, count in (("q", 4), ("k", 2), ("v", 2)):
            y = b.call(aten.linear.default, x, b.weight(f"{name}{layer}", count * 4, 16))
            y = b.call(aten.reshape.default, y, [ctx.batch, ctx.length, count, 4])
            heads.append(b.call(aten.transpose.int, y, 1, 2))
        sink = b.weight(f"sinks{layer}", 4) if sinks else None
        out = b.call(overload("attention"), *heads, layer, 0.5, window if layer == 0 else 0, softcap, sink)
        x = b.call(aten.add.Tensor, x, b.call(aten.reshape.default, out, [ctx.batch, ctx.length, 16]))
    return b.done(x)


def weight(name: str) -> torch.Tensor:
    """Small enough that no softmax is all one token."""
    shapes: dict[str, tuple[int, ...]] = {"e": (VOCABULARY, 16), "w": (32, 16), "s": (4,), "q": (16, 16)}
    return random(name, *shapes.get(name[0], (8, 16))) / 4


def test_before_and_after() -> None:
    b = Builder()
    q = b.input("q", 2, 4, 1, 8)
    k, v = b.input("k", 2, 2, 1, 8), b.input("v", 2, 2, 1, 6)
    table = b.call(aten.embedding.default, b.constant("wpe", torch.ones(32, 6)), b.positions)
    out = b.call(overload("attention"), q, k, v, 3, 0.5, 7, 30.0, b.weight("sinks", 4))
    before = b.done(b.call(aten.add.Tensor, out, b.call(aten.unsqueeze.default, table, 2)))
    after, outcome = apply(InsertKVCache(), before)
    assert text(after) == lines("""
        %0 = ingot.cache_slots(block_tables, positions, 4)
        %1 = aten.clamp(positions, 0)
        %2 = aten.embedding(wpe, %1)
        %3 = ingot.cache_write(k_cache_0, k, %0, None)
        %4 = ingot.cache_write(v_cache_0, v, %0, None)
        %5 = ingot.paged_attention(q, k_cache_0, v_cache_0, block_tables, positions, 0.5, 7, 30.0, sinks, None, None)
        %6 = aten.unsqueeze(%2, 2)
        %7 = aten.add(%5, %6)
        return %7
    """)
    inputs = {n.target: tuple(n.meta["val"].shape) for n in after.graph.nodes if n.op == "placeholder"}
    assert inputs["block_tables"] == (2, 8)
    assert (inputs["k_cache_0"], inputs["v_cache_0"]) == ((17, 4, 2, 8), (17, 4, 2, 6))
    assert outcome.changed == 1
    assert outcome.facts["layers"] == [{"key": [2, 8], "value": [2, 6], "window": 7}]


def test_caches_are_numbered_by_layer_whatever_their_order_in_the_graph() -> None:
    b = Builder()
    q = b.input("q", 2, 2, 1, 8)
    late, early = (b.call(overload("attention"), q, q, q, layer, 0.5, layer, 0.0, None) for layer in (9, 4))
    after, outcome = apply(InsertKVCache(), b.done(late, early))
    assert [x["window"] for x in outcome.facts["layers"]] == [4, 9]  # type: ignore[attr-defined]
    assert "paged_attention(q, k_cache_1, v_cache_1, block_tables, positions, 0.5, 9" in text(after)


def test_two_layers_of_one_index_are_refused() -> None:
    b = Builder()
    q = b.input("q", 2, 2, 1, 8)
    calls = [b.call(overload("attention"), q, q, q, 4, 0.5, 0, 0.0, None) for _ in range(2)]
    with pytest.raises(PassError, match=r"(?s)insert-kv-cache.*share a layer index: \[4, 4\]"):
        apply(InsertKVCache(), b.done(*calls))


def whole_sequence(window: int, softcap: float, sinks: bool, tokens: torch.Tensor) -> torch.Tensor:
    """[length, width] without a cache."""
    length = len(tokens)
    traced = attention_only(dataclasses.replace(PREFILL, length=length), window, softcap, sinks)
    return Evaluator(traced, weight).run({"tokens": tokens[None], "positions": torch.arange(length)[None]})[0]


@settings(max_examples=12, deadline=None)
@given(
    prompt=st.integers(1, LENGTH - 4), window=st.sampled_from([0, 1, 5]), softcap=st.sampled_from([0.0, 2.0]),
    sinks=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_chunks_and_steps_equal_the_whole_sequence(
    prompt: int, window: int, softcap: float, sinks: bool, seed: int
) -> None:
    """A prompt in padded chunks of 8, then one token a step beside another row, over shuffled blocks."""
    torch.manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (LENGTH,))
    wanted = whole_sequence(window, softcap, sinks, tokens)
    prefill = Evaluator(apply(InsertKVCache(), attention_only(PREFILL, window, softcap, sinks), PREFILL)[0], weight)
    decode = Evaluator(apply(InsertKVCache(), attention_only(DECODE, window, softcap, sinks), DECODE)[0], weight)
    decode.share_cache(prefill)
    for name, layer in (("k", 0), ("v", 0), ("k", 1), ("v", 1)):
        # What lies in foreign blocks must not matter, not even if it is no number.
        prefill.caches[f"{name}_cache_{layer}"] = torch.full((17, 4, 2, 4), float("nan"))
    table = torch.zeros(1, 8, dtype=torch.int32)
    table[0, : LENGTH // 4] = torch.randperm(16)[: LENGTH // 4] + 1
    for start in range(0, prompt, 8):
        stop = min(start + 8, prompt)
        ids, positions = torch.zeros(1, 8, dtype=torch.int64), torch.full((1, 8), -1)
        ids[0, : stop - start], positions[0, : stop - start] = tokens[start:stop], torch.arange(start, stop)
        out = run(prefill, ids, positions, table)
        close(out[0, : stop - start], wanted[start:stop])
    row = seed % 2
    tables = torch.zeros(2, 8, dtype=torch.int32)
    tables[row] = table[0]
    for position in range(prompt, LENGTH):
        ids, positions = torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), -1)
        ids[row], positions[row] = tokens[position], position
        out = run(decode, ids, positions, tables)
        close(out[row, 0], wanted[position])


def run(engine: Evaluator, tokens: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    out = engine.run({"tokens": tokens, "positions": positions, "block_tables": tables})
    assert isinstance(out, torch.Tensor)
    return out


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_padding_writes_to_the_null_block_alone() -> None:
    traced, _ = apply(InsertKVCache(), attention_only(PREFILL), PREFILL)
    engine = Evaluator(traced, weight)
    untouched_before = random("cache", 17, 4, 2, 4)
    engine.caches = {f"{n}_cache_{i}": untouched_before.clone() for n in "kv" for i in (0, 1)}
    tables = torch.arange(1, 9, dtype=torch.int32)[None]
    engine.run({"tokens": torch.zeros(1, 8).long(), "positions": torch.full((1, 8), -1), "block_tables": tables})
    for cache in engine.caches.values():
        assert torch.equal(cache[1:], untouched_before[1:])
