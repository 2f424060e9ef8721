"""quantize-weights: which weights are stored how, in every scheme. Not exact; its numbers are the schemes' bounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ingot.passes.base import Context, QuantizationGroup
from ingot.passes.graph import TracedGraph
from ingot.passes.quantize.round_to_nearest import RoundToNearest
from ingot.passes.quantize.schemes import SCHEMES
from ingot.passes.quantize.weights import QuantizeWeights, selected
from ingot.passes.weights import Concat, Quantized, Stored

from .graphs import BF16, DECODE, Builder, apply, aten, lines, text, untouched, values


def options(*targets: str, ignore: tuple[str, ...] = (), scheme: str = "W8A16", **more: Any) -> Context:
    group = QuantizationGroup(scheme, targets or ("Linear",), ignore, **more)
    return dataclasses.replace(DECODE, quantization=(group,))


W8A16 = options()


def subject(dtype: torch.dtype = torch.float32) -> TracedGraph:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.input("x", 2, 1, 8, dtype=dtype)
    y = b.call(aten.linear.default, x, b.weight("w", 4, 8, dtype=dtype))
    return b.done(b.call(aten.linear.default, y, b.weight("v", 6, 4, dtype=dtype), b.weight("bias", 6, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_before_and_after(dtype: torch.dtype) -> None:
    before = subject(dtype)
    after, outcome = apply(QuantizeWeights(), before, W8A16)
    assert text(after) == lines("""
        %0 = ingot.linear_quantized(x, w__int8, w__scale, None, None, 'int8', [1, 8], '')
        %1 = ingot.linear_quantized(%0, v__int8, v__scale, None, bias, 'int8', [1, 4], '')
        return %1
    """)
    assert (outcome.changed, outcome.missed) == (2, [])
    assert set(after.weights.entries) == {"w__int8", "w__scale", "v__int8", "v__scale", "bias"}
    assert after.weights.entries["w__int8"] == Quantized(Stored("w", (4, 8), dtype), RoundToNearest("int8"), "values")
    a, b = values(before)[0].float(), values(after)[0].float()
    assert 0 < (a - b).abs().max() <= 0.03 * a.abs().max()


def test_it_runs_only_where_the_recipe_says_so() -> None:
    assert untouched(QuantizeWeights(), subject(), DECODE) == []


def test_a_tied_embedding_reads_the_heads_rows() -> None:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    tied = b.weight("embed", 40, 8)
    x = b.call(aten.embedding.default, tied, b.tokens, 0)
    before = b.done(x, b.call(aten.linear.default, x, tied))
    after, outcome = apply(QuantizeWeights(), before, W8A16)
    assert text(after) == lines("""
        %0 = aten.empty([0], dtype=float32, device=device(type='meta'))
        %1 = ingot.embedding_quantized(tokens, embed__int8, embed__scale, None, %0, 'int8', [1, 8])
        %2 = ingot.linear_quantized(%1, embed__int8, embed__scale, None, None, 'int8', [1, 8], '')
        return [%1, %2]
    """)
    assert outcome.changed == 2
    assert set(after.weights.entries) == {"embed__int8", "embed__scale"}
    rows, exact = (
        values(after, tokens=torch.tensor([[3], [39]]))[0],
        values(before, tokens=torch.tensor([[3], [39]]))[0],
    )
    assert (rows - exact).abs().max() <= exact.abs().max() / 127


def test_near_misses() -> None:
    _, outcome = apply(QuantizeWeights(), subject(), options(ignore=("v",)))
    assert [m.reason for m in outcome.missed] == ["not among the targets"]
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    computed = b.call(aten.neg.default, b.weight("w", 4, 8))
    out = b.call(aten.linear.default, b.input("x", 2, 8), computed)
    assert untouched(QuantizeWeights(), b.done(out), W8A16) == ["its weight is computed"]


def merged() -> TracedGraph:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.input("x", 2, 8)
    traced = b.done(b.call(aten.linear.default, x, b.weight("q_and_k", 8, 8)))
    parts = tuple(Stored(f"layers.0.{n}_proj.weight", (4, 8), torch.float32) for n in "qk")
    traced.weights.entries["q_and_k"] = Concat(parts)
    return traced


def test_a_merged_weight_is_named_by_its_parts() -> None:
    """Patterns speak of the checkpoint's names, whatever passes have made of them."""
    for targets in (("Linear",), ("re:[qk]_proj",), ("*_proj.weight",), ("layers",), ("q_proj", "k_proj")):
        assert apply(QuantizeWeights(), merged(), options(*targets))[1].changed == 1
    assert untouched(QuantizeWeights(), merged(), options(ignore=("layers.0",))) == ["not among the targets"]
    assert untouched(QuantizeWeights(), merged(), options("q_proj")) == [
        "merged with layers.0.k_proj.weight, which is quantized otherwise: skip merge-projections to quantize the rest"
    ]


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("Linear", True),
        ("lm_head", False),
        ("model.layers.1", True),
        ("model.layers.11", False),
        ("layers.1", True),
        ("mlp.gate_proj", True),
        ("gate", False),
        ("*.gate_proj.weight", True),
        ("*.gate_proj", False),
        (r"re:layers\.\d+\.mlp", True),
        (r"re:^mlp", False),
    ],
)
def test_patterns(pattern: str, hits: bool) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    assert selected(name, QuantizationGroup("W8A16", (pattern,))) is hits
    assert selected(name, QuantizationGroup("W8A16", ("Linear",), (pattern,))) is not hits


WEIGHTS = {
    ("W8A16", True): "w__int8, w__scale, None, None, 'int8', [1, 8], ''",
    ("W8A8", True): "w__int8, w__scale, None, None, 'int8', [1, 8], 'int8'",
    ("W4A16", True): "w__int4, w__scale, None, None, 'int4', [1, 4], ''",
    ("W4A16", False): "w__int4, w__scale, w__zero, None, 'int4', [1, 4], ''",
    ("FP8-W8A16", True): "w__fp8, w__scale, None, None, 'fp8', [1, 8], ''",
    ("FP8", True): "w__fp8, w__scale, None, None, 'fp8', [1, 8], 'fp8'",
}


def test_every_scheme_is_tried() -> None:
    assert {name for name, _ in WEIGHTS} == set(SCHEMES)


@pytest.mark.parametrize(("scheme", "symmetric"), WEIGHTS)
def test_each_scheme_says_how_a_weight_is_stored(scheme: str, symmetric: bool) -> None:
    before = subject()
    after, outcome = apply(QuantizeWeights(), before, options(scheme=scheme, group_size=4, symmetric=symmetric))
    assert text(after).splitlines()[0] == f"%0 = ingot.linear_quantized(x, {WEIGHTS[scheme, symmetric]})"
    assert (outcome.changed, outcome.missed) == (2, [])
    a, b = values(before)[0], values(after)[0]
    assert 0 < (a - b).abs().max() <= (0.25 if scheme == "W4A16" else 0.1) * a.abs().max()


def test_the_first_group_that_takes_a_weight_has_it() -> None:
    groups = (QuantizationGroup("W4A16", ("v",), group_size=4), QuantizationGroup("W8A16"))
    after, outcome = apply(QuantizeWeights(), subject(), dataclasses.replace(DECODE, quantization=groups))
    assert outcome.changed == 2
    assert set(after.weights.entries) == {"w__int8", "w__scale", "v__int4", "v__scale", "bias"}


def test_a_group_that_does_not_divide_leaves_the_weight() -> None:
    after, outcome = apply(QuantizeWeights(), subject(), options(scheme="W4A16", group_size=8))
    assert [m.reason for m in outcome.missed] == ["its 4 columns are no multiple of a group of 8"]
    assert "v" in after.weights.entries and "w__int4" in after.weights.entries


def test_a_merged_weight_is_made_of_its_quantized_parts() -> None:
    after, _ = apply(QuantizeWeights(), merged(), options(scheme="W4A16", group_size=4))
    entry = after.weights.entries["q_and_k__scale"]
    q, k = (Stored(f"layers.0.{n}_proj.weight", (4, 8), torch.float32) for n in "qk")
    make = RoundToNearest("int4", 4)
    assert entry == Concat((Quantized(q, make, "scale"), Quantized(k, make, "scale")))
