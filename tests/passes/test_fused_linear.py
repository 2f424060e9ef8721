"""fuse-linear: a product takes in the norm before it and the activation or residual add behind it, on the GPU alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ingot.passes.fusion.fused_linear import FuseLinear
from ingot.passes.graph import TracedGraph
from ingot.runtime.ops.cuda.linear_problem import DECODE_ROWS
from ingot.runtime.ops.schema import overload
from torch import fx

from .graphs import BF16, DECODE, F32, PREFILL, Builder, apply, aten, lines, nearly_same, reasons, same_bits, text
from .graphs import untouched as left_alone

CUDA = dataclasses.replace(DECODE, device="cuda")
# Twice 40 rows: above what takes a norm along.
LARGE = dataclasses.replace(PREFILL, device="cuda", batch=2, length=40)
PHASES = pytest.mark.parametrize("ctx", [CUDA, LARGE], ids=["decode", "prefill"])
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])


def written(traced: TracedGraph) -> str:
    """The graph's text, without the operands that only a quantized weight has."""
    return text(traced).replace(", None, None, '', [], ''", "")


def untouched(traced: TracedGraph, ctx: Any = CUDA) -> list[str]:
    return left_alone(FuseLinear(), traced, ctx)


def builder(batch: int = 2, length: int = 1) -> Builder:
    """A graph with a cache has block tables."""
    b = Builder(batch, length)
    b.input("block_tables", batch, 8, dtype=torch.int32)
    return b


def rms_norm(b: Builder, x: fx.Node, name: str = "g", dtype: torch.dtype | None = None) -> Any:
    return b.call(overload("rms_norm"), x, b.weight(name, 8, dtype=dtype or x.meta["val"].dtype), 1e-5, 0.0, True)


def linear(b: Builder, x: fx.Node, name: str = "w", rows: int = 8, bias: bool = False) -> Any:
    dtype = x.meta["val"].dtype
    width = x.meta["val"].shape[-1]
    more = (b.weight(f"{name}_bias", rows, dtype=dtype),) if bias else ()
    return b.call(aten.linear.default, x, b.weight(name, rows, width, dtype=dtype), *more)


def block(dtype: torch.dtype, batch: int, length: int) -> TracedGraph:
    """An MLP with its norm and its residual stream, as the passes before leave it."""
    b = builder(batch, length)
    x, y = b.input("x", batch, length, 8, dtype=dtype), b.input("y", batch, length, 8, dtype=dtype)
    pair = b.call(overload("add_rms_norm"), linear(b, y, "o"), x, b.weight("g", 8, dtype=dtype), 1e-5, 0.0, True)
    stream, normed = b.part(pair, 0), b.part(pair, 1)
    hidden = b.call(overload("gated_activation"), linear(b, normed, "gate_up", 32), "silu", True)
    return b.done(b.call(aten.add.Tensor, stream, linear(b, hidden, "down")))


def test_a_block_in_decode() -> None:
    before = block(F32, 2, 1)
    after, outcome = apply(FuseLinear(), before, CUDA)
    assert written(after) == lines("""
        %0 = ingot.fused_linear(y, o, None, None, x, 0.0, 0.0, False, '', True, False)
        %1 = ingot.fused_linear(%0, gate_up, None, g, None, 1e-05, 0.0, True, 'silu', True, False)
        %2 = ingot.fused_linear(%1, down, None, None, %0, 0.0, 0.0, False, '', True, False)
        return %2
    """)
    assert (outcome.changed, outcome.missed) == (3, [])


def test_a_block_in_prefill() -> None:
    after, outcome = apply(FuseLinear(), block(F32, 2, 40), LARGE)
    assert written(after) == lines("""
        %0 = ingot.fused_linear(y, o, None, None, x, 0.0, 0.0, False, '', True, False)
        %1 = ingot.rms_norm(%0, g, 1e-05, 0.0, True)
        %2 = ingot.fused_linear(%1, gate_up, None, None, None, 0.0, 0.0, False, 'silu', True, False)
        %3 = ingot.fused_linear(%2, down, None, None, %0, 0.0, 0.0, False, '', True, False)
        return %3
    """)
    assert reasons(outcome) == ["so many rows are bound by arithmetic: their norm is computed once, before"]
    assert outcome.changed == 3


@PHASES
@DTYPES
def test_not_a_bit_changes(ctx: Any, dtype: torch.dtype) -> None:
    before = block(dtype, ctx.batch, ctx.length)
    same_bits(before, apply(FuseLinear(), before, ctx)[0])


@pytest.mark.parametrize(("rows", "inside"), [(DECODE_ROWS, True), (DECODE_ROWS + 1, False)])
def test_how_many_rows_take_their_norm_along(rows: int, inside: bool) -> None:
    b = builder(1, rows)
    before = b.done(linear(b, rms_norm(b, b.input("x", 1, rows, 8))))
    after, _ = apply(FuseLinear(), before, dataclasses.replace(LARGE, batch=1, length=rows))
    assert ("rms_norm" not in written(after)) == inside
    same_bits(before, after)


@pytest.mark.parametrize(("offset", "narrow_first"), [(0.0, True), (1.0, False)])
def test_bias_and_the_norms_options_come_along(offset: float, narrow_first: bool) -> None:
    b = builder()
    x = b.input("x", 2, 1, 8, dtype=BF16)
    normed = b.call(overload("rms_norm"), x, b.weight("g", 8, dtype=BF16), 1e-6, offset, narrow_first)
    before = b.done(linear(b, normed, bias=True))
    after, _ = apply(FuseLinear(), before, CUDA)
    assert written(after) == lines(f"""
        %0 = ingot.fused_linear(x, w, w_bias, g, None, 1e-06, {offset}, {narrow_first}, '', True, False)
        return %0
    """)
    same_bits(before, after)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("kind", ["silu", "relu", "gelu", "gelu_tanh"])
def test_gated_activations(kind: str, gate_first: bool) -> None:
    b = builder()
    hidden = linear(b, b.input("x", 2, 1, 8, dtype=BF16), rows=16)
    before = b.done(b.call(overload("gated_activation"), hidden, kind, gate_first))
    after, _ = apply(FuseLinear(), before, CUDA)
    assert written(after) == lines(f"""
        %0 = ingot.fused_linear(x, w, None, None, None, 0.0, 0.0, False, '{kind}', {gate_first}, False)
        return %0
    """)
    same_bits(before, after)


def test_a_norm_that_several_products_read_is_computed_by_each() -> None:
    b = builder()
    normed = rms_norm(b, b.input("x", 2, 1, 8))
    before = b.done(linear(b, normed, "w"), linear(b, normed, "v"))
    after, outcome = apply(FuseLinear(), before, CUDA)
    assert "ingot.rms_norm" not in written(after) and outcome.changed == 2
    same_bits(before, after)


def test_a_product_added_to_itself() -> None:
    b = builder()
    y = linear(b, b.input("x", 2, 1, 8))
    before = b.done(b.call(aten.add.Tensor, y, y))
    after, _ = apply(FuseLinear(), before, CUDA)
    assert "%1 = aten.add(%0, %0)" in written(after)
    same_bits(before, after)


def test_two_products_added_one_takes_the_other_in() -> None:
    """Parallel attention and MLP (GPT-J): the residual must be there before the product that takes it."""
    b = builder()
    x = b.input("x", 2, 1, 8)
    before = b.done(b.call(aten.add.Tensor, linear(b, x, "w"), linear(b, x, "v")))
    after, outcome = apply(FuseLinear(), before, CUDA)
    after.graph.lint()
    assert written(after).count("fused_linear") == outcome.changed == 2
    assert "aten.add" not in written(after)
    same_bits(before, after)


def test_a_residual_that_is_computed_behind_the_product() -> None:
    b = builder()
    x = b.input("x", 2, 1, 8)
    y = linear(b, x)
    before = b.done(b.call(aten.add.Tensor, y, b.call(aten.tanh.default, x)))
    after, _ = apply(FuseLinear(), before, CUDA)
    after.graph.lint()
    assert written(after) == lines("""
        %0 = aten.tanh(x)
        %1 = ingot.fused_linear(x, w, None, None, %0, 0.0, 0.0, False, '', True, False)
        return %1
    """)
    same_bits(before, after)


@pytest.mark.parametrize("reshaped", [False, True], ids=["cast", "reshape and cast"])
def test_logits_are_not_rounded(reshaped: bool) -> None:
    b = builder()
    y = linear(b, b.input("x", 2, 1, 8, dtype=BF16))
    y = b.call(aten.reshape.default, y, [2, 8]) if reshaped else y
    before = b.done(b.call(aten._to_copy.default, y, dtype=torch.float32))
    after, _ = apply(FuseLinear(), before, CUDA)
    reshape = "\n%1 = aten.reshape(%0, [2, 8])" if reshaped else ""
    assert written(after) == (
        "%0 = ingot.fused_linear(x, w, None, None, None, 0.0, 0.0, False, '', True, True)"
        f"{reshape}\nreturn %{int(reshaped)}"
    )
    nearly_same(before, after, torch.finfo(BF16).eps)


def test_what_others_read_too_stays() -> None:
    """The product itself is read elsewhere: its activation, residual and cast stay ops of their own."""
    b = builder()
    x = b.input("x", 2, 1, 8, dtype=BF16)
    wide, y = linear(b, x, "w", 16), linear(b, x, "v")
    before = b.done(
        b.call(overload("gated_activation"), wide, "silu", True), wide, b.call(aten.add.Tensor, y, x),
        b.call(aten._to_copy.default, y, dtype=torch.float32),
    )  # fmt: skip
    after, outcome = apply(FuseLinear(), before, CUDA)
    assert outcome.changed == 2
    assert [op for op in ("gated_activation", "aten.add", "aten._to_copy") if op not in written(after)] == []
    same_bits(before, after)


def behind(b: Builder, x: Any, y: Any, case: str) -> Any:
    """Adds that are no residual add of x [2, 1, 8] and y alike."""
    if case == "scaled":
        return b.call(aten.add.Tensor, y, x, alpha=0.5)
    if case == "a number":
        return b.call(aten.add.Tensor, y, 1.0)
    if case == "another shape":
        return b.call(aten.add.Tensor, y, b.input("row", 8))
    return b.call(aten.add.Tensor, y, b.input("wide", 2, 1, 8, dtype=F32))


@pytest.mark.parametrize("case", ["scaled", "a number", "another shape", "another dtype"])
def test_near_miss_no_residual_alike(case: str) -> None:
    b = builder()
    x = b.input("x", 2, 1, 8, dtype=BF16)
    before = b.done(behind(b, x, linear(b, x), case))
    after, outcome = apply(FuseLinear(), before, CUDA)
    assert "%1 = aten.add(%0" in written(after)
    assert outcome.changed == 1
    same_bits(before, after)


def test_near_miss_a_norm_in_another_dtype() -> None:
    b = builder()
    x = b.input("x", 2, 1, 8, dtype=BF16)
    normed = b.call(overload("rms_norm"), x, b.weight("g", 8), 1e-5, 0.0, False)
    before = b.done(linear(b, normed))
    after, _ = apply(FuseLinear(), before, CUDA)
    assert "%0 = ingot.rms_norm" in written(after)
    same_bits(before, after)


def test_near_miss_a_computed_weight() -> None:
    b = builder()
    weight = b.call(aten.mul.Tensor, b.weight("w", 8, 8), 2.0)
    before = b.done(b.call(aten.linear.default, b.input("x", 2, 1, 8), weight))
    assert untouched(before) == ["its weight is computed, or of a dtype without a kernel"]


def test_near_miss_a_computed_bias() -> None:
    b = builder()
    bias = b.call(aten.mul.Tensor, b.weight("bias", 8), 2.0)
    before = b.done(b.call(aten.linear.default, b.input("x", 2, 1, 8), b.weight("w", 8, 8), bias))
    assert untouched(before) == ["its weight is computed, or of a dtype without a kernel"]


def test_near_miss_float64() -> None:
    b = builder()
    before = b.done(linear(b, b.input("x", 2, 1, 8, dtype=torch.float64)))
    assert untouched(before) == ["its weight is computed, or of a dtype without a kernel"]


def test_an_add_and_norm_without_a_product_stays() -> None:
    """As behind attention of a model whose output projection is something else."""
    b = builder()
    x = b.input("x", 2, 1, 8)
    pair = b.call(overload("add_rms_norm"), b.call(aten.tanh.default, x), x, b.weight("g", 8), 1e-5, 0.0, True)
    before = b.done(b.part(pair, 0), linear(b, b.part(pair, 1)))
    after, outcome = apply(FuseLinear(), before, CUDA)
    assert "ingot.add_rms_norm" in written(after) and outcome.changed == 1
    same_bits(before, after)


@PHASES
def test_nothing_changes_on_the_cpu(ctx: Any) -> None:
    assert untouched(block(F32, ctx.batch, ctx.length), dataclasses.replace(ctx, device="cpu")) == []


def test_a_quantized_product_keeps_its_form() -> None:
    b = builder()
    x = b.input("x", 2, 1, 8)
    parts = (b.weight("w", 12, 4, dtype=torch.uint8), b.weight("s", 12, 2, dtype=torch.float16))
    zero = b.weight("z", 12, 2, dtype=torch.uint8)
    product = b.call(overload("linear_quantized"), rms_norm(b, x), *parts, zero, None, "int4", [1, 4], "")
    before = b.done(b.call(overload("gated_activation"), product, "relu", True))
    after, outcome = apply(FuseLinear(), before, CUDA)
    assert text(after) == lines("""
        %0 = ingot.fused_linear(x, w, None, g, None, 1e-05, 0.0, True, 'relu', True, False, s, z, 'int4', [1, 4], '')
        return %0
    """)
    assert (outcome.changed, outcome.missed) == (1, [])


def test_rows_that_are_quantized_take_their_norm_along_however_many() -> None:
    b = builder(2, 40)
    x = b.input("x", 2, 40, 8, dtype=BF16)
    parts = (b.weight("values", 8, 8, dtype=torch.int8), b.weight("scale", 8, 1))
    product = b.call(overload("linear_quantized"), rms_norm(b, x), *parts, None, None, "int8", [1, 8], "int8")
    after, outcome = apply(FuseLinear(), b.done(product), LARGE)
    assert text(after) == lines("""
        %0 = ingot.fused_linear(x, values, None, g, None, 1e-05, 0.0, True, '', True, False, scale, None, 'int8', \
[1, 8], 'int8')
        return %0
    """)
    assert (outcome.changed, outcome.missed) == (1, [])
