"""pack-weights: on the CPU, weights become panels at build. Exact: a row holds the same numbers in another order."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ingot.passes.base import QuantizationGroup
from ingot.passes.graph import TracedGraph
from ingot.passes.plan.kernels import SelectKernels
from ingot.passes.plan.pack_weights import PackWeights
from ingot.passes.quantize.weights import QuantizeWeights
from ingot.passes.weights import Packed, Stored

from .graphs import BF16, DECODE, Builder, apply, aten, lines, same_bits, text, untouched, values


def subject(dtype: torch.dtype = BF16, k: int = 64) -> TracedGraph:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    tied = b.weight("embed", 70, k, dtype=dtype)
    x = b.call(aten.embedding.default, tied, b.tokens, 0)
    y = b.call(aten.linear.default, x, b.weight("v", 65, k, dtype=dtype), b.weight("bias", 65, dtype=dtype))
    return b.done(b.call(aten.linear.default, x, tied), y)


def quantized(scheme: str, dtype: torch.dtype = BF16, k: int = 64, **more: Any) -> TracedGraph:
    group = QuantizationGroup(scheme, **more)
    traced, _ = apply(QuantizeWeights(), subject(dtype, k), dataclasses.replace(DECODE, quantization=(group,)))
    return traced


def test_before_and_after() -> None:
    before, _ = apply(SelectKernels(), subject())
    after, outcome = apply(PackWeights(), before)
    assert text(after) == lines("""
        %0 = aten.empty([0], dtype=bfloat16, device=device(type='meta'))
        %1 = ingot.embedding_packed(tokens, embed__packed, None, None, %0, 64, 'bfloat16', 0)
        %2 = ingot.linear_packed(%1, v__packed, None, None, bias, 65, 'bfloat16', 0, '')
        %3 = ingot.linear_packed(%1, embed__packed, None, None, None, 70, 'bfloat16', 0, '')
        return [%3, %2]
    """)
    assert (outcome.changed, outcome.missed) == (3, [])
    assert after.weights.entries["v__packed"] == Packed(Stored("v", (65, 64), BF16), "bfloat16")
    assert set(after.weights.entries) == {"embed__packed", "v__packed", "bias"}
    same_bits(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scheme", "more", "group"),
    [("W8A16", {}, 0), ("W8A8", {}, 0), ("W4A16", {"group_size": 32}, 32),
     ("W4A16", {"group_size": 64, "symmetric": False}, 0)],
)  # fmt: skip
def test_quantized_weights(scheme: str, more: dict[str, Any], group: int, dtype: torch.dtype) -> None:
    before = quantized(scheme, dtype, **more)
    after, outcome = apply(PackWeights(), before)
    assert (outcome.changed, outcome.missed) == (3, [])
    calls = text(after)
    assert "linear_quantized" not in calls and "embedding_quantized" not in calls
    assert calls.count(f", 'int{scheme[1]}', {group}, '{'int8' if scheme == 'W8A8' else ''}')") == 2
    assert all(name.endswith("__packed") or name == "bias" for name in after.weights.entries)
    for a, b in zip(values(before), values(after)):
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == BF16 else 1e-6, atol=1e-5)


def test_near_misses() -> None:
    before, _ = apply(SelectKernels(), subject(torch.float32))
    assert untouched(PackWeights(), before) == ["no panels for its dtype"] * 2
    assert untouched(PackWeights(), quantized("FP8")) == ["no panels for fp8"] * 2
    assert (
        untouched(PackWeights(), quantized("W4A16", k=24, group_size=12))
        == ["a scale for 1 x 12 is read row by row"] * 2
    )


def test_other_devices_keep_their_layout() -> None:
    before = quantized("W8A16")
    assert untouched(PackWeights(), before, dataclasses.replace(DECODE, device="cuda")) == []
