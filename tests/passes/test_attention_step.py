"""fuse-attention-step: in a decode step on the GPU, norms, RoPE, cache write and attention of a layer become one op."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ingot.compiler.evaluate import Evaluator
from ingot.passes.cache.attention_step import FuseAttentionStep
from ingot.passes.graph import TracedGraph
from ingot.passes.quantize.kv_cache import QuantizeKVCache
from ingot.runtime.ops.schema import overload
from torch import Tensor, fx

from .graphs import BF16, DECODE, F32, PREFILL, Builder, apply, aten, lines, load, reasons, text, untouched

CUDA = dataclasses.replace(DECODE, device="cuda")
HEADS, KV_HEADS, DIM = 4, 2, 8


class Layer:
    """A decode step's attention as the cache pass leaves it, with parts left out or changed."""

    def __init__(self, dtype: torch.dtype = F32, batch: int = 2, length: int = 1) -> None:
        self.b, self.dtype, self.batch, self.length = Builder(batch, length), dtype, batch, length
        self.tables = self.b.input("block_tables", batch, 8, dtype=torch.int32)
        self.caches = [self.b.input(f"{n}_cache_0", 17, 4, KV_HEADS, DIM, dtype=dtype) for n in "kv"]
        self.scales: list[fx.Node | None] = [None, None]
        self.cos, self.sin = (self.b.input(n, batch, 1, length, DIM, dtype=dtype) for n in ("cos", "sin"))
        self.slots = self.b.call(overload("cache_slots"), self.tables, self.b.positions, 4)

    def heads(self, name: str, count: int) -> fx.Node:
        """[batch, count, length, DIM]."""
        return self.b.call(aten.transpose.int, self.flat(name, count), 1, 2)

    def flat(self, name: str, count: int) -> fx.Node:
        """[batch, length, count, DIM]."""
        return self.b.input(name, self.batch, self.length, count, DIM, dtype=self.dtype)

    def norm(self, x: fx.Node, name: str, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Any:
        weight = self.b.weight(name, DIM, dtype=dtype or self.dtype)
        return self.b.call(overload("rms_norm"), x, weight, eps, 0.0, True)

    def turned(self, x: fx.Node, cos: fx.Node | None = None) -> Any:
        return self.b.call(overload("rotate_half"), x, cos or self.cos, self.sin)

    def attend(self, q: Any, k: Any, v: Any, sinks: bool = False, write: bool = True) -> TracedGraph:
        """Cache writes and attention with a window of 6 and a soft cap of 20."""
        if write:
            self.b.call(overload("cache_write"), self.caches[0], k, self.slots, self.scales[0])
        self.b.call(overload("cache_write"), self.caches[1], v, self.slots, self.scales[1])
        sink = self.b.weight("sinks", HEADS, dtype=self.dtype) if sinks else None
        positions = self.b.positions
        options = (0.5, 6, 20.0, sink, *self.scales)
        out = self.b.call(overload("paged_attention"), q, *self.caches, self.tables, positions, *options)
        return self.b.done(out)


def plain(layer: Layer) -> TracedGraph:
    q, k, v = layer.heads("q", HEADS), layer.heads("k", KV_HEADS), layer.heads("v", KV_HEADS)
    return layer.attend(layer.turned(q), layer.turned(k), v)


def normed(layer: Layer) -> TracedGraph:
    """Qwen 3: norms over the heads before they change places."""
    q = layer.b.call(aten.transpose.int, layer.norm(layer.flat("q", HEADS), "q_norm"), 1, 2)
    k = layer.b.call(aten.transpose.int, layer.norm(layer.flat("k", KV_HEADS), "k_norm"), 1, 2)
    return layer.attend(layer.turned(q), layer.turned(k), layer.heads("v", KV_HEADS), sinks=True)


def bare(layer: Layer) -> TracedGraph:
    """GPT-2: positions come with the embedding."""
    return layer.attend(layer.heads("q", HEADS), layer.heads("k", KV_HEADS), layer.heads("v", KV_HEADS))


def run(traced: TracedGraph, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention and the caches behind it: a row in the middle of its third block, and a padding row."""
    generator = torch.Generator().manual_seed(seed)
    known = {name: (tuple(e.shape), e.dtype) for name, e in traced.weights.entries.items()}  # type: ignore[attr-defined]
    engine = Evaluator(traced, load(known))
    inputs: dict[str, Tensor] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder" and node.meta["val"].is_floating_point():
            value = torch.randn(node.meta["val"].shape, generator=generator).to(node.meta["val"].dtype)
            (engine.caches if "_cache_" in str(node.target) else inputs)[str(node.target)] = value
    tables = torch.arange(1, 17, dtype=torch.int32).view(2, 8).flip(1)
    inputs |= {"tokens": torch.zeros(2, 1).long(), "positions": torch.tensor([[9], [-1]]), "block_tables": tables}
    with torch.no_grad():
        out = engine.run(inputs)
    assert isinstance(out, Tensor)
    return out, engine.caches


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("subject", [plain, normed, bare])
def test_not_a_bit_changes_in_the_result_nor_in_the_cache(subject: Any, dtype: torch.dtype) -> None:
    before = subject(Layer(dtype))
    after, outcome = apply(FuseAttentionStep(), before, CUDA)
    assert (outcome.changed, outcome.missed) == (1, [])
    for seed in range(3):
        (wanted, caches), (found, written) = run(before, seed), run(after, seed)
        assert torch.equal(found, wanted) and not found[1].any()
        assert all(torch.equal(written[name], cache) for name, cache in caches.items())


def test_rope() -> None:
    after, _ = apply(FuseAttentionStep(), plain(Layer()), CUDA)
    assert text(after) == lines("""
        %0 = aten.transpose(q, 1, 2)
        %1 = aten.transpose(k, 1, 2)
        %2 = aten.transpose(v, 1, 2)
        %3 = ingot.attention_step(%0, %1, %2, k_cache_0, v_cache_0, block_tables, positions, cos, sin, None, None, \
None, 0.0, 0.0, False, 0.5, 6, 20.0, None, None)
        return %3
    """)


def test_norms_and_sinks() -> None:
    after, _ = apply(FuseAttentionStep(), normed(Layer()), CUDA)
    assert text(after) == lines("""
        %0 = aten.transpose(v, 1, 2)
        %1 = aten.transpose(q, 1, 2)
        %2 = aten.transpose(k, 1, 2)
        %3 = ingot.attention_step(%1, %2, %0, k_cache_0, v_cache_0, block_tables, positions, cos, sin, q_norm, k_norm, \
sinks, 1e-05, 0.0, True, 0.5, 6, 20.0, None, None)
        return %3
    """)


def test_neither_rope_nor_norms() -> None:
    after, _ = apply(FuseAttentionStep(), bare(Layer()), CUDA)
    assert "block_tables, positions, None, None, None, None, None, 0.0, 0.0, False, 0.5" in text(after)
    assert "cache_write" not in text(after)


def test_a_norm_behind_the_transpose() -> None:
    layer = Layer()
    q, k = layer.norm(layer.heads("q", HEADS), "q_norm"), layer.norm(layer.heads("k", KV_HEADS), "k_norm")
    before = layer.attend(layer.turned(q), layer.turned(k), layer.heads("v", KV_HEADS))
    after, _ = apply(FuseAttentionStep(), before, CUDA)
    assert "rms_norm" not in text(after) and "rotate_half" not in text(after)
    assert torch.equal(run(before, 0)[0], run(after, 0)[0])


def looked_up(layer: Layer, where: fx.Node, name: str, rows: int = 32) -> Any:
    """A row per token of a stored table, as position-tables writes it."""
    table = layer.b.weight(name, rows, DIM, dtype=layer.dtype)
    return layer.b.call(
        aten.reshape.default, layer.b.call(aten.embedding.default, table, where), [layer.batch, 1, 1, DIM]
    )


def with_tables(layer: Layer, where: fx.Node | None = None, sin_rows: int = 32) -> TracedGraph:
    """Llama: cos and sin come from tables of all positions."""
    where = where or layer.b.call(aten.clamp.default, layer.b.positions, 0)
    layer.cos, layer.sin = looked_up(layer, where, "cos_table"), looked_up(layer, where, "sin_table", sin_rows)
    return plain(layer)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_whole_tables_are_looked_up_by_the_op(dtype: torch.dtype) -> None:
    before = with_tables(Layer(dtype))
    after, _ = apply(FuseAttentionStep(), before, CUDA)
    assert text(after) == lines("""
        %0 = aten.transpose(q, 1, 2)
        %1 = aten.transpose(k, 1, 2)
        %2 = aten.transpose(v, 1, 2)
        %3 = ingot.attention_step(%0, %1, %2, k_cache_0, v_cache_0, block_tables, positions, cos_table, sin_table, \
None, None, None, 0.0, 0.0, False, 0.5, 6, 20.0, None, None)
        return %3
    """)
    (wanted, caches), (found, written) = run(before, 0), run(after, 0)
    assert torch.equal(found, wanted)
    assert all(torch.equal(written[name], cache) for name, cache in caches.items())


@pytest.mark.parametrize("case", ["by tokens", "by positions below zero", "of different lengths"])
def test_near_miss_rows_of_other_tables(case: str) -> None:
    layer = Layer()
    where = {"by tokens": layer.b.tokens, "by positions below zero": layer.b.positions}.get(case)
    before = with_tables(layer, where, 31 if case == "of different lengths" else 32)
    after, outcome = apply(FuseAttentionStep(), before, CUDA)
    assert outcome.changed == 1
    assert text(after).count("aten.embedding") == 2 and "rotate_half" not in text(after)
    if case != "by positions below zero":
        assert torch.equal(run(before, 0)[0], run(after, 0)[0])


def kept(layer: Layer, q: Any, k: Any) -> str:
    """What the pass leaves of q and k before the fused op, which must compute the same."""
    before = layer.attend(q, k, layer.heads("v", KV_HEADS))
    after, outcome = apply(FuseAttentionStep(), before, CUDA)
    assert outcome.changed == 1
    assert torch.equal(run(before, 0)[0], run(after, 0)[0])
    return text(after)


def test_near_miss_only_q_is_turned() -> None:
    layer = Layer()
    found = kept(layer, layer.turned(layer.heads("q", HEADS)), layer.heads("k", KV_HEADS))
    assert "ingot.rotate_half" in found and "positions, None, None" in found


def test_near_miss_two_tables() -> None:
    layer = Layer()
    other = layer.b.input("other", 2, 1, 1, DIM)
    q, k = layer.turned(layer.heads("q", HEADS)), layer.turned(layer.heads("k", KV_HEADS), other)
    assert kept(layer, q, k).count("ingot.rotate_half") == 2


def test_near_miss_one_table_for_all_rows() -> None:
    layer = Layer()
    layer.cos, layer.sin = (layer.b.input(f"{n}_row", 1, 1, 1, DIM) for n in ("cos", "sin"))
    q, k = layer.turned(layer.heads("q", HEADS)), layer.turned(layer.heads("k", KV_HEADS))
    assert kept(layer, q, k).count("ingot.rotate_half") == 2


def test_near_miss_norms_that_differ() -> None:
    layer = Layer()
    q, k = layer.norm(layer.heads("q", HEADS), "q_norm", 1e-5), layer.norm(layer.heads("k", KV_HEADS), "k_norm", 1e-6)
    assert kept(layer, layer.turned(q), layer.turned(k)).count("ingot.rms_norm") == 2


def test_near_miss_only_k_has_a_norm() -> None:
    layer = Layer()
    q, k = layer.heads("q", HEADS), layer.norm(layer.heads("k", KV_HEADS), "k_norm")
    found = kept(layer, layer.turned(q), layer.turned(k))
    assert "ingot.rms_norm" in found and "rotate_half" not in found


def test_near_miss_a_norm_in_another_dtype() -> None:
    layer = Layer(BF16)
    q, k = (layer.norm(layer.heads(n, c), f"{n}_norm", dtype=F32) for n, c in (("q", HEADS), ("k", KV_HEADS)))
    q, k = (layer.b.call(aten._to_copy.default, x, dtype=BF16) for x in (q, k))
    assert kept(layer, layer.turned(q), layer.turned(k)).count("ingot.rms_norm") == 2


def test_near_miss_a_transpose_of_what_is_normed() -> None:
    """The norm runs over another dimension than the heads' own."""
    layer = Layer()
    q, k = (layer.b.input(n, 2, c, DIM, 1) for n, c in (("q", HEADS), ("k", KV_HEADS)))
    norms = [layer.b.call(overload("rms_norm"), x, layer.b.weight(f"{x}_norm", 1), 1e-5, 0.0, True) for x in (q, k)]
    q, k = (layer.b.call(aten.transpose.int, x, 2, -1) for x in norms)
    assert kept(layer, layer.turned(q), layer.turned(k)).count("ingot.rms_norm") == 2


def test_near_miss_keys_written_elsewhere() -> None:
    """Layers that share the cache of another (Gemma 3n)."""
    layer = Layer()
    q, k, v = layer.heads("q", HEADS), layer.heads("k", KV_HEADS), layer.heads("v", KV_HEADS)
    before = layer.attend(layer.turned(q), k, v, write=False)
    assert untouched(FuseAttentionStep(), before, CUDA) == ["its keys and values are written elsewhere"]


def test_prefill_and_the_cpu_are_left_alone() -> None:
    prefill = dataclasses.replace(PREFILL, device="cuda")
    assert untouched(FuseAttentionStep(), plain(Layer(batch=1, length=8)), prefill) == []
    assert untouched(FuseAttentionStep(), plain(Layer()), DECODE) == []


def test_every_layer() -> None:
    layer = Layer()
    b = layer.b
    more = [b.input(f"{n}_cache_1", 17, 4, KV_HEADS, DIM) for n in "kv"]
    for caches, name in ((layer.caches, "a"), (more, "b")):
        q, k, v = (layer.heads(f"{name}{n}", c) for n, c in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
        for cache, x in zip(caches, (layer.turned(k), v)):
            b.call(overload("cache_write"), cache, x, layer.slots, None)
        call = overload("paged_attention")
        out = b.call(call, layer.turned(q), *caches, layer.tables, b.positions, 0.5, 0, 0.0, None, None, None)
    after, outcome = apply(FuseAttentionStep(), b.done(out), CUDA)
    assert outcome.changed == 2 and reasons(outcome) == []
    assert "cache_write" not in text(after)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_cache_goes_along(kind: str) -> None:
    before, _ = apply(QuantizeKVCache(), plain(Layer()), dataclasses.replace(CUDA, kv_cache_dtype=kind))
    after, outcome = apply(FuseAttentionStep(), before, CUDA)
    assert outcome.changed == 1
    assert text(after).endswith("0.5, 6, 20.0, k_scale_cache_0, v_scale_cache_0)\nreturn %3")
    (wanted, caches), (found, written) = run(before, 0), run(after, 0)
    assert torch.equal(found, wanted)
    assert set(caches) == {"k_cache_0", "v_cache_0", "k_scale_cache_0", "v_scale_cache_0"}
    assert all(torch.equal(written[name].view(torch.uint8), cache.view(torch.uint8)) for name, cache in caches.items())
