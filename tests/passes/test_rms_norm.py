"""fuse-rms-norm: the norm of every model family becomes one op. Exact: bit for bit, in bfloat16 too."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from ingot.compiler.trace import _flatten
from ingot.passes.cleanup.canonicalize import Canonicalize
from ingot.passes.fusion.rms_norm import FuseRMSNorm
from ingot.passes.graph import TracedGraph
from torch import fx, nn

from .graphs import BF16, F32, Builder, apply, aten, lines, random, reasons, same_bits, text, untouched, values

EPS = 1e-5


def scaled(b: Builder, wide: fx.Node, eps: float = EPS) -> Any:
    """wide * rsqrt(mean(wide²) + eps)."""
    mean = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, wide, 2), [-1], True)
    return b.call(aten.mul.Tensor, wide, b.call(aten.rsqrt.default, b.call(aten.add.Tensor, mean, eps)))


def cast(b: Builder, x: fx.Node, dtype: torch.dtype) -> Any:
    return b.call(aten._to_copy.default, x, dtype=dtype)


def test_llama_rounds_before_the_weight() -> None:
    b = Builder()
    x = b.input("x", 2, 3, 8, dtype=BF16)
    before = b.done(b.call(aten.mul.Tensor, b.weight("w", 8, dtype=BF16), cast(b, scaled(b, cast(b, x, F32)), BF16)))
    assert text(before) == lines("""
        %0 = aten._to_copy(x, dtype=float32)
        %1 = aten.pow(%0, 2)
        %2 = aten.mean(%1, [-1], True)
        %3 = aten.add(%2, 1e-05)
        %4 = aten.rsqrt(%3)
        %5 = aten.mul(%0, %4)
        %6 = aten._to_copy(%5, dtype=bfloat16)
        %7 = aten.mul(w, %6)
        return %7
    """)
    after, outcome = apply(FuseRMSNorm(), before)
    assert text(after) == "%0 = ingot.rms_norm(x, w, 1e-05, 0.0, True)\nreturn %0"
    assert (outcome.changed, outcome.missed) == (1, [])
    same_bits(before, after)


def test_gpt_oss_rounds_after_the_weight() -> None:
    b = Builder()
    x = b.input("x", 2, 3, 8, dtype=BF16)
    weighted = b.call(aten.mul.Tensor, scaled(b, cast(b, x, F32)), b.weight("w", 8, dtype=BF16))
    before = b.done(cast(b, weighted, BF16))
    after, _ = apply(FuseRMSNorm(), before)
    assert text(after) == "%0 = ingot.rms_norm(x, w, 1e-05, 0.0, False)\nreturn %0"
    same_bits(before, after)


def test_gemma_has_an_offset() -> None:
    b = Builder()
    x = b.input("x", 2, 3, 8, dtype=BF16)
    weight = b.call(aten.add.Tensor, cast(b, b.weight("w", 8, dtype=BF16), F32), 1.0)
    before = b.done(cast(b, b.call(aten.mul.Tensor, scaled(b, cast(b, x, F32)), weight), BF16))
    after, _ = apply(FuseRMSNorm(), before)
    assert text(after) == "%0 = ingot.rms_norm(x, w, 1e-05, 1.0, False)\nreturn %0"
    same_bits(before, after)


def test_where_it_rounds_matters() -> None:
    """Else the tests above could not tell narrow_first from its opposite."""
    x, w = random("x", 64, 64, dtype=BF16), random("w", 64, dtype=BF16)
    op = torch.ops.ingot.rms_norm
    assert not torch.equal(op(x, w, EPS, 0.0, True), op(x, w, EPS, 0.0, False))


def test_in_float32_nothing_rounds() -> None:
    b = Builder()
    x = b.input("x", 2, 3, 8)
    before = b.done(b.call(aten.mul.Tensor, b.weight("w", 8), scaled(b, x)))
    after, _ = apply(FuseRMSNorm(), before)
    assert text(after) == "%0 = ingot.rms_norm(x, w, 1e-05, 0.0, False)\nreturn %0"
    same_bits(before, after)


def test_a_wide_value_with_a_narrow_weight() -> None:
    """Cohere norms x - mean(x), which is float32 already."""
    b = Builder()
    x = cast(b, b.input("x", 2, 8, dtype=BF16), F32)
    centred = b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, [-1], True))
    weight = cast(b, b.weight("w", 8, dtype=BF16), F32)
    before = b.done(cast(b, b.call(aten.mul.Tensor, weight, scaled(b, centred)), BF16))
    after, _ = apply(FuseRMSNorm(), before)
    assert text(after).splitlines()[-3:] == [
        "%3 = ingot.rms_norm(%2, w, 1e-05, 0.0, False)",
        "%4 = aten._to_copy(%3, dtype=bfloat16)",
        "return %4",
    ]
    same_bits(before, after)


def near_miss(build: Any) -> list[str]:
    b = Builder()
    return untouched(FuseRMSNorm(), b.done(build(b, b.input("x", 2, 8, dtype=BF16), b.weight("w", 8, dtype=BF16))))


def test_near_miss_all_in_bfloat16() -> None:
    assert near_miss(lambda b, x, w: b.call(aten.mul.Tensor, w, scaled(b, x))) == [
        "it is computed in bfloat16, the op computes in float32"
    ]


def test_near_miss_it_stays_wide() -> None:
    assert near_miss(lambda b, x, w: b.call(aten.mul.Tensor, w, scaled(b, cast(b, x, F32)))) == [
        "its result stays wider than its input"
    ]


def test_near_miss_a_wide_weight_on_a_rounded_norm() -> None:
    """The product is float32 here; the op would round it once more."""

    def build(b: Builder, x: fx.Node, _: fx.Node) -> Any:
        rounded = cast(b, scaled(b, cast(b, x, F32)), BF16)
        return cast(b, b.call(aten.mul.Tensor, b.weight("w32", 8), rounded), BF16)

    assert near_miss(build) == ["it is rounded before a weight of another dtype"]


def test_near_miss_rounded_to_something_else() -> None:
    def build(b: Builder, x: fx.Node, w: fx.Node) -> Any:
        return b.call(aten.mul.Tensor, w, cast(b, scaled(b, cast(b, x, F32)), torch.float16))

    assert near_miss(build) == ["it is rounded to another dtype than its input's"]


def test_near_miss_the_weight_is_rounded() -> None:
    def build(b: Builder, x: fx.Node, _: fx.Node) -> Any:
        weight = cast(b, b.weight("w32", 8), BF16)
        return cast(b, b.call(aten.mul.Tensor, weight, scaled(b, cast(b, x, F32))), BF16)

    assert near_miss(build) == ["the weight is rounded first"]


def test_near_miss_the_offset_is_rounded() -> None:
    def build(b: Builder, x: fx.Node, w: fx.Node) -> Any:
        weight = b.call(aten.add.Tensor, w, 1.0)
        return cast(b, b.call(aten.mul.Tensor, scaled(b, cast(b, x, F32)), weight), BF16)

    assert near_miss(build) == ["the offset is added to the weight before it is made wide"]


def test_near_miss_a_weight_of_one() -> None:
    def build(b: Builder, x: fx.Node, _: fx.Node) -> Any:
        return cast(b, b.call(aten.mul.Tensor, scaled(b, cast(b, x, F32)), b.weight("w1", 1, dtype=BF16)), BF16)

    assert near_miss(build) == ["the weight is not as long as the last dimension"]


def test_near_miss_no_weight() -> None:
    assert near_miss(lambda b, x, w: cast(b, scaled(b, cast(b, x, F32)), BF16)) == ["no weight is applied to it"]


def test_another_value_is_squared() -> None:
    """x * rsqrt(mean(y²)): no norm at all, so no near miss either."""
    b = Builder()
    x, y = b.input("x", 2, 8), b.input("y", 2, 8)
    mean = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, y, 2), [-1], True)
    scale = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, mean, EPS))
    out = b.call(aten.mul.Tensor, b.weight("w", 8), b.call(aten.mul.Tensor, x, scale))
    assert untouched(FuseRMSNorm(), b.done(out)) == []


class Alone(nn.Module):
    """A norm as a model of its own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.model = norm

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


def traced_norm(norm: nn.Module) -> TracedGraph:
    """The graph of a bfloat16 norm of width 64, its weight stored."""
    meta = copy.deepcopy(norm).to("meta")
    inputs = (
        torch.zeros(2, 5, 64, dtype=BF16, device="meta"),
        torch.zeros(2, 5, dtype=torch.int64, device="meta"),
    )
    with torch.no_grad():
        program = torch.export.export(Alone(meta), inputs, strict=False).run_decompositions({})
    return _flatten(program.module(check_guards=False), {})


NORMS = [
    ("llama", "LlamaRMSNorm", (0.0, True)),
    ("qwen3", "Qwen3RMSNorm", (0.0, True)),
    ("gemma2", "Gemma2RMSNorm", (1.0, False)),
    ("gemma3", "Gemma3RMSNorm", (1.0, False)),
    ("gpt_oss", "GptOssRMSNorm", (0.0, False)),
    ("olmo2", "Olmo2RMSNorm", (0.0, False)),
]


@pytest.mark.parametrize(("family", "name", "flags"), NORMS, ids=[n for _, n, _ in NORMS])
def test_the_models_own_norms(family: str, name: str, flags: tuple[float, bool]) -> None:
    """Traced from transformers' module: one op, the bits of the graph before it, and those of the module itself."""
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(64)
    norm = made.to(BF16).requires_grad_(False)
    before, _ = apply(Canonicalize(), traced_norm(norm))
    after, outcome = apply(FuseRMSNorm(), before)
    assert (outcome.changed, reasons(outcome)) == (1, [])
    assert text(after) == f"%0 = ingot.rms_norm(tokens, weight, 1e-06, {flags[0]}, {flags[1]})\nreturn %0"
    same_bits(before, after)
    x = random("tokens", 2, 5, 64, dtype=BF16)
    norm.weight.copy_(random("weight", 64, dtype=BF16))
    assert torch.equal(values(after, tokens=x)[0], norm(x))
