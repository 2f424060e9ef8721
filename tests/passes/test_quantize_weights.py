"""quantize-weights: which weights are stored how, in every scheme. Not exact; its numbers are the schemes' bounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ingot.artifacts.errors import UsageError
from ingot.passes.base import Context, QuantizationGroup
from ingot.passes.graph import TracedGraph
from ingot.passes.quantize.round_to_nearest import RoundToNearest
from ingot.passes.quantize.schemes import SCHEMES
from ingot.passes.quantize.weights import QuantizeWeights
from ingot.passes.weights import Concat, Constant, Quantized, Scales, Stored

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


def tied(shared: bool = True, wide: int = 8) -> TracedGraph:
    """An embedding, perhaps sharing its matrix with the LM head; each call knows its module."""
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.call(aten.embedding.default, b.weight("embed", 40, wide), b.tokens, 0)
    x.meta["source"] = "model.embed_tokens"
    head = b.call(aten.linear.default, x, b.weight("embed" if shared else "head", 40, wide))
    head.meta["source"] = "lm_head"
    return b.done(x, head)


@pytest.mark.parametrize("target", ["Linear", "Embedding", "lm_head", "model.embed_tokens", "embed"])
def test_a_tied_pair_is_one_weight_whichever_of_both_is_meant(target: str) -> None:
    before = tied()
    after, outcome = apply(QuantizeWeights(), before, options(target))
    assert text(after) == lines("""
        %0 = aten.empty([0], dtype=float32, device=device(type='meta'))
        %1 = ingot.embedding_quantized(tokens, embed__int8, embed__scale, None, %0, 'int8', [1, 8])
        %2 = ingot.linear_quantized(%1, embed__int8, embed__scale, None, None, 'int8', [1, 8], '')
        return [%1, %2]
    """)
    assert outcome.changed == 2
    assert outcome.facts["quantized"] == {"int8": 320}
    assert set(after.weights.entries) == {"embed__int8", "embed__scale"}
    ids = torch.tensor([[3], [39]])
    rows, exact = (values(graph, tokens=ids)[0] for graph in (after, before))
    assert 0 < (rows - exact).abs().max() <= exact.abs().max() / 127


@pytest.mark.parametrize("ignored", ["lm_head", "model.embed_tokens", "Embedding", "embed"])
def test_a_tied_pair_stays_whichever_of_both_is_ignored(ignored: str) -> None:
    found = untouched(QuantizeWeights(), tied(), options("Linear", ignore=(ignored,)))
    assert found == ["not among the targets"] * 2


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_an_embedding_alone(scheme: str) -> None:
    before = tied(shared=False)
    after, outcome = apply(QuantizeWeights(), before, options("Embedding", scheme=scheme, group_size=4))
    assert [m.reason for m in outcome.missed] == ["not among the targets"]
    assert "head" in after.weights.entries and "embed" not in after.weights.entries
    ids = torch.tensor([[3], [39]])
    rows, exact = (values(graph, tokens=ids)[0] for graph in (after, before))
    assert 0 < (rows - exact).abs().max() <= exact.abs().max() * (0.1 if scheme == "W4A16" else 0.04)
    after, outcome = apply(QuantizeWeights(), before, options("Linear"))
    assert "embed" in after.weights.entries and [m.reason for m in outcome.missed] == ["not among the targets"]


def test_positions_routers_and_experts_stay() -> None:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    x = b.call(aten.embedding.default, b.weight("wpe", 40, 8), b.positions)
    table = b.call(aten.embedding.default, b.constant("cos", torch.ones(40, 8)), b.positions)
    scores = b.call(aten.softmax.int, b.call(aten.linear.default, x, b.weight("router", 4, 8)), -1)
    chosen = b.call(aten.topk.default, scores, 2)
    picked = b.call(
        aten.index.Tensor, b.weight("experts", 4, 8, 8), [b.call(aten.reshape.default, b.part(chosen, 1), [4])]
    )
    before = b.done(x, table, b.part(chosen, 0), picked)
    assert untouched(QuantizeWeights(), before, options("Linear", "Embedding")) == [
        "a table over positions",
        "a router: it chooses experts",
        "read by aten.index, which has no quantized form",
    ]


def test_near_misses() -> None:
    _, outcome = apply(QuantizeWeights(), subject(), options(ignore=("v",)))
    assert [m.reason for m in outcome.missed] == ["not among the targets"]
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    computed = b.call(aten.neg.default, b.weight("w", 4, 8))
    out = b.call(aten.linear.default, b.input("x", 2, 8), computed)
    assert untouched(QuantizeWeights(), b.done(out), W8A16) == [
        "its weight is computed", "read by aten.neg, which has no quantized form",
    ]  # fmt: skip


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
        "merged with layers.0.k_proj.weight, which is quantized otherwise"
    ]


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


def test_a_group_that_does_not_divide_leaves_the_weight_and_says_so() -> None:
    after, outcome = apply(QuantizeWeights(), subject(), options(scheme="W4A16", group_size=8))
    assert [m.reason for m in outcome.missed] == ["its 4 columns are no multiple of a group of 8"]
    assert outcome.facts == {
        "quantized": {"int4": 32}, "indivisible": [{"weight": "v", "columns": 4, "group_size": 8}],
    }  # fmt: skip
    assert "v" in after.weights.entries and "w__int4" in after.weights.entries


def test_a_merged_weight_is_made_of_its_quantized_parts() -> None:
    after, _ = apply(QuantizeWeights(), merged(), options(scheme="W4A16", group_size=4))
    entry = after.weights.entries["q_and_k__scale"]
    q, k = (Stored(f"layers.0.{n}_proj.weight", (4, 8), torch.float32) for n in "qk")
    make = RoundToNearest("int4", 4)
    assert entry == Scales(Concat((Quantized(q, make, "scale"), Quantized(k, make, "scale"))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e7])
def test_scales_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    """1e7 / 7.5 is beyond float16."""
    after, _ = apply(QuantizeWeights(), merged(), options(scheme="W4A16", group_size=4))

    def load(name: str) -> torch.Tensor:
        value = torch.ones(4, 8)
        value[2, 5] = bad if "k_proj" in name else 1
        return value

    with pytest.raises(
        UsageError, match=r"scales of layers\.0\.q_proj\.weight, layers\.0\.k_proj\.weight hold"
    ) as caught:
        after.weights.evaluate("q_and_k__scale", load)
    assert caught.value.why == "1 of 16 are zero, NaN or infinite, the first at [6, 1]"
    after.weights.evaluate("q_and_k__int4", lambda name: torch.ones(4, 8))


@pytest.mark.parametrize("scale", [torch.tensor([1.0, 0.0]), torch.tensor([3, 255], dtype=torch.uint8)])
def test_zero_scales_and_nan_exponents_are_refused(scale: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="a quantized weight hold"):
        Scales(Constant(scale)).evaluate(lambda name: scale)
    sound = torch.tensor([254, 0], dtype=torch.uint8)
    assert torch.equal(Scales(Constant(sound)).evaluate(lambda name: sound), sound)


def test_a_group_of_scheme_none_keeps_its_weights() -> None:
    groups = (QuantizationGroup("none", ("v",)), QuantizationGroup("W8A16"))
    after, outcome = apply(QuantizeWeights(), subject(), dataclasses.replace(DECODE, quantization=groups))
    assert set(after.weights.entries) == {"w__int8", "w__scale", "v", "bias"}
    assert [m.reason for m in outcome.missed] == ["not among the targets"]


def test_few_rows_on_the_gpu_keep_their_activations() -> None:
    """They wait for the weight; what a chunk of a prompt multiplies is quantized as well."""
    asked = (QuantizationGroup("FP8"),)
    step = dataclasses.replace(DECODE, device="cuda", quantization=asked)
    assert "'fp8', [1, 8], '')" in text(apply(QuantizeWeights(), subject(), step)[0])
    assert "'fp8', [1, 8], 'fp8')" in text(
        apply(QuantizeWeights(), subject(), dataclasses.replace(step, device="cpu"))[0]
    )
    b = Builder(1, 80)
    b.input("block_tables", 1, 8, dtype=torch.int32)
    chunk = b.done(b.call(aten.linear.default, b.input("x", 1, 80, 8), b.weight("w", 4, 8)))
    assert "'fp8', [1, 8], 'fp8')" in text(apply(QuantizeWeights(), chunk, step)[0])
