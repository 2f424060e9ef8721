"""quantize-kv-cache: caches of int8 or fp8 with scales beside them. Not exact: a key is off by half a step at most."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ingot.passes.cache.paged import InsertKVCache
from ingot.passes.graph import TracedGraph
from ingot.passes.quantize.kv_cache import CACHE_DTYPES, QuantizeKVCache
from ingot.runtime.ops.schema import overload

from .graphs import DECODE, F32, Builder, apply, lines, text, untouched, values


def subject() -> TracedGraph:
    """Two layers with a cache."""
    b = Builder()
    heads = (("q", 4), ("k", 2), ("v", 2))
    layers = [[b.input(f"{n}{layer}", 2, count, 1, 8) for n, count in heads] for layer in range(2)]
    out = [b.call(overload("attention"), *qkv, layer, 0.5, 0, 0.0, None) for layer, qkv in enumerate(layers)]
    return apply(InsertKVCache(), b.done(*out))[0]


def asking(kind: str) -> Any:
    return dataclasses.replace(DECODE, kv_cache_dtype=kind)


@pytest.mark.parametrize("kind", list(CACHE_DTYPES))
def test_before_and_after(kind: str) -> None:
    before = subject()
    after, outcome = apply(QuantizeKVCache(), before, asking(kind))
    assert text(after) == lines("""
        %0 = ingot.cache_slots(block_tables, positions, 4)
        %1 = ingot.cache_write(k_cache_0, k0, %0, k_scale_cache_0)
        %2 = ingot.cache_write(v_cache_0, v0, %0, v_scale_cache_0)
        %3 = ingot.paged_attention(q0, k_cache_0, v_cache_0, block_tables, positions, 0.5, 0, 0.0, None, \
k_scale_cache_0, v_scale_cache_0)
        %4 = ingot.cache_write(k_cache_1, k1, %0, k_scale_cache_1)
        %5 = ingot.cache_write(v_cache_1, v1, %0, v_scale_cache_1)
        %6 = ingot.paged_attention(q1, k_cache_1, v_cache_1, block_tables, positions, 0.5, 0, 0.0, None, \
k_scale_cache_1, v_scale_cache_1)
        return [%3, %6]
    """)
    assert (outcome.changed, outcome.missed) == (4, [])
    inputs = {str(n.target): n.meta["val"] for n in after.graph.nodes if n.op == "placeholder" and "cache" in n.target}
    blocks, size = DECODE.num_blocks, DECODE.block_size
    for layer in range(2):
        for kv in "kv":
            code, scale = inputs.pop(f"{kv}_cache_{layer}"), inputs.pop(f"{kv}_scale_cache_{layer}")
            assert (code.shape, code.dtype) == ((blocks, size, 2, 8), CACHE_DTYPES[kind])
            assert (scale.shape, scale.dtype) == ((blocks, size, 2), F32)
    assert not inputs
    tables = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]], dtype=torch.int32)
    at = {"positions": torch.tensor([[0], [0]]), "block_tables": tables}
    for exact, found in zip(values(before, **at), values(after, **at)):
        # One key alone: the result is its value, off by half a step.
        step = exact.abs().amax(-1, keepdim=True) / (254 if kind == "int8" else 16)
        assert (found - exact).abs().max() > 0
        assert ((found - exact).abs() <= step * 1.001).all()


def test_it_runs_only_where_the_recipe_says_so() -> None:
    assert untouched(QuantizeKVCache(), subject(), DECODE) == []
    once, _ = apply(QuantizeKVCache(), subject(), asking("int8"))
    assert untouched(QuantizeKVCache(), once, asking("int8")) == []
