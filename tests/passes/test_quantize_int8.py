"""quantize-w8a16: int8 weights with a scale per row. Not exact: no weight is off by more than half its row's scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ingot.passes.graph import TracedGraph
from ingot.passes.quantize.int8 import QuantizeInt8, int8_per_channel, selected
from ingot.passes.weights import Concat, Quantized, Stored

from .graphs import BF16, DECODE, Builder, apply, aten, lines, text, untouched, values

W8A16 = dataclasses.replace(DECODE, scheme="W8A16")


def options(*targets: str, ignore: tuple[str, ...] = ()) -> Any:
    return dataclasses.replace(W8A16, targets=targets or ("Linear",), ignore=ignore)


def subject(dtype: torch.dtype = torch.float32) -> TracedGraph:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.input("x", 2, 1, 8, dtype=dtype)
    y = b.call(aten.linear.default, x, b.weight("w", 4, 8, dtype=dtype))
    return b.done(b.call(aten.linear.default, y, b.weight("v", 6, 4, dtype=dtype), b.weight("bias", 6, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_before_and_after(dtype: torch.dtype) -> None:
    before = subject(dtype)
    after, outcome = apply(QuantizeInt8(), before, W8A16)
    assert text(after) == lines("""
        %0 = ingot.linear_int8(x, w__int8, w__scale, None)
        %1 = ingot.linear_int8(%0, v__int8, v__scale, bias)
        return %1
    """)
    assert (outcome.changed, outcome.missed) == (2, [])
    assert set(after.weights.entries) == {"w__int8", "w__scale", "v__int8", "v__scale", "bias"}
    assert after.weights.entries["w__int8"] == Quantized(Stored("w", (4, 8), dtype), int8_per_channel, "values")
    a, b = values(before)[0].float(), values(after)[0].float()
    assert 0 < (a - b).abs().max() <= 0.03 * a.abs().max()


def test_it_runs_only_where_the_recipe_says_so() -> None:
    assert untouched(QuantizeInt8(), subject(), DECODE) == []


def test_a_tied_embedding_reads_the_heads_rows() -> None:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    tied = b.weight("embed", 40, 8)
    x = b.call(aten.embedding.default, tied, b.tokens, 0)
    before = b.done(x, b.call(aten.linear.default, x, tied))
    after, outcome = apply(QuantizeInt8(), before, W8A16)
    assert text(after) == lines("""
        %0 = aten.empty([0], dtype=float32, device=device(type='meta'))
        %1 = ingot.embedding_int8(tokens, embed__int8, embed__scale, %0)
        %2 = ingot.linear_int8(%1, embed__int8, embed__scale, None)
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
    _, outcome = apply(QuantizeInt8(), subject(), options(ignore=("v",)))
    assert [m.reason for m in outcome.missed] == ["not among the targets"]
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    computed = b.call(aten.neg.default, b.weight("w", 4, 8))
    out = b.call(aten.linear.default, b.input("x", 2, 8), computed)
    assert untouched(QuantizeInt8(), b.done(out), W8A16) == ["its weight is computed"]


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
        assert apply(QuantizeInt8(), merged(), options(*targets))[1].changed == 1
    assert untouched(QuantizeInt8(), merged(), options(ignore=("layers.0",))) == ["not among the targets"]
    assert untouched(QuantizeInt8(), merged(), options("q_proj")) == [
        "merged with layers.0.k_proj.weight, which is not among the targets: "
        "skip merge-projections to quantize the rest"
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
    assert selected(name, options(pattern)) is hits
    assert selected(name, options("Linear", ignore=(pattern,))) is not hits


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(arrays("float32", st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite))
def test_no_weight_is_off_by_more_than_half_a_step(weight: Any) -> None:
    given_weight = torch.from_numpy(weight)
    found = int8_per_channel(given_weight)
    values_, scale = found["values"], found["scale"]
    assert (values_.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert values_.abs().max() <= 127  # symmetric: -128 is not used
    assert torch.isfinite(scale).all() and (scale > 0).all()
    error = (values_.double() * scale[:, None].double() - given_weight.double()).abs()
    assert (error <= scale[:, None].double() * (0.5 + 1e-4)).all()
    largest = given_weight.abs().amax(1)
    assert torch.allclose(scale[largest > 1e-20], largest[largest > 1e-20] / 127)


def test_empty_and_tiny_rows() -> None:
    found = int8_per_channel(torch.tensor([[0.0, 0.0], [1e-38, -1e-40], [0.0, 2.0]]))
    assert found["values"].tolist() == [[0, 0], [0, 0], [0, 127]]
    assert torch.isfinite(found["scale"]).all()
