"""fuse-gated-activation: act(gate) * up of two neighbours becomes one op. Exact: bit for bit, in bfloat16 too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.passes.fusion.gated_activation import FuseGatedActivation
from torch import fx

from .graphs import BF16, F32, Builder, apply, aten, lines, same_bits, text, untouched

DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
KINDS: dict[str, tuple[Any, dict[str, str]]] = {
    "silu": (aten.silu.default, {}),
    "relu": (aten.relu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
}


def slices(b: Builder, x: fx.Node, *bounds: tuple[int, int]) -> list[fx.Node]:
    last = x.meta["val"].dim() - 1
    return [b.call(aten.slice.Tensor, x, last, start, stop) for start, stop in bounds]


def gated(b: Builder, gate: fx.Node, up: fx.Node, kind: str = "silu") -> Any:
    target, kwargs = KINDS[kind]
    return b.call(aten.mul.Tensor, b.call(target, gate, **kwargs), up)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_after_merging_the_projections(kind: str, dtype: torch.dtype) -> None:
    b = Builder()
    x = b.input("x", 2, 3, 12, dtype=dtype)
    gate, up = slices(b, x, (0, 6), (6, 12))
    before = b.done(gated(b, gate, up, kind))
    after, outcome = apply(FuseGatedActivation(), before)
    assert text(after) == f"%0 = ingot.gated_activation(x, '{kind}', True)\nreturn %0"
    assert (outcome.changed, outcome.missed) == (1, [])
    same_bits(before, after)


def test_before_and_after() -> None:
    b = Builder()
    gate, up = slices(b, b.input("x", 2, 12), (0, 6), (6, 12))
    before = b.done(gated(b, gate, up))
    assert text(before) == lines("""
        %0 = aten.slice(x, 1, 0, 6)
        %1 = aten.slice(x, 1, 6, 12)
        %2 = aten.silu(%0)
        %3 = aten.mul(%2, %1)
        return %3
    """)
    after, _ = apply(FuseGatedActivation(), before)
    assert text(after) == "%0 = ingot.gated_activation(x, 'silu', True)\nreturn %0"


@DTYPES
def test_phi3s_split(dtype: torch.dtype) -> None:
    """One gate_up weight, and the product written the other way round."""
    b = Builder()
    halves = b.call(aten.split.Tensor, b.input("x", 2, 3, 12, dtype=dtype), 6, -1)
    gate, up = b.part(halves, 0), b.part(halves, 1)
    before = b.done(b.call(aten.mul.Tensor, up, b.call(aten.silu.default, gate)))
    assert text(before) == lines("""
        %0 = aten.split(x, 6, -1)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        %3 = aten.silu(%1)
        %4 = aten.mul(%2, %3)
        return %4
    """)
    after, _ = apply(FuseGatedActivation(), before)
    assert text(after) == "%0 = ingot.gated_activation(x, 'silu', True)\nreturn %0"
    same_bits(before, after)


@pytest.mark.parametrize("form", ["chunk", "split", "split_with_sizes"])
def test_up_first_in_every_form(form: str) -> None:
    b = Builder()
    x = b.input("x", 4, 12)
    target, size = {
        "chunk": (aten.chunk.default, 2),
        "split": (aten.split.Tensor, 6),
        "split_with_sizes": (aten.split_with_sizes.default, [6, 6]),
    }[form]
    halves = b.call(target, x, size, 1)
    before = b.done(gated(b, b.part(halves, 1), b.part(halves, 0)))
    after, _ = apply(FuseGatedActivation(), before)
    assert text(after) == "%0 = ingot.gated_activation(x, 'silu', False)\nreturn %0"
    same_bits(before, after)


@DTYPES
def test_neighbours_in_something_larger(dtype: torch.dtype) -> None:
    """Parallel blocks merge q, k, v, gate and up into one product: the op reads a slice of it."""
    b = Builder()
    x = b.input("x", 2, 3, 20, dtype=dtype)
    q, gate, up = slices(b, x, (0, 8), (8, 14), (14, 20))
    before = b.done(gated(b, gate, up), q)
    after, outcome = apply(FuseGatedActivation(), before)
    assert text(after) == lines("""
        %0 = aten.slice(x, 2, 0, 8)
        %1 = aten.slice(x, 2, 8, 20)
        %2 = ingot.gated_activation(%1, 'silu', True)
        return [%2, %0]
    """)
    assert outcome.changed == 1
    same_bits(before, after)


def near_miss(build: Any, width: int = 12) -> list[str]:
    b = Builder()
    return untouched(FuseGatedActivation(), b.done(build(b, b.input("x", 2, width))))


@pytest.mark.parametrize("target", [aten.sigmoid.default, aten.tanh.default, aten.mish.default])
def test_near_miss_other_activations(target: Any) -> None:
    def build(b: Builder, x: fx.Node) -> Any:
        gate, up = slices(b, x, (0, 6), (6, 12))
        return b.call(aten.mul.Tensor, b.call(target, gate), up)

    assert near_miss(build) == [f"aten.{target._opname} is none of the op's activations"]


def test_near_miss_no_activation() -> None:
    assert near_miss(lambda b, x: b.call(aten.mul.Tensor, *slices(b, x, (0, 6), (6, 12)))) == [
        "aten.slice is none of the op's activations"
    ]


def test_near_miss_not_neighbours() -> None:
    def build(b: Builder, x: fx.Node) -> Any:
        gate, up = slices(b, x, (0, 6), (8, 14))
        return gated(b, gate, up)

    assert near_miss(build, 14) == ["gate and up are not neighbours of the same size"]


def test_near_miss_overlapping() -> None:
    def build(b: Builder, x: fx.Node) -> Any:
        gate, up = slices(b, x, (0, 6), (3, 9))
        return gated(b, gate, up)

    assert near_miss(build) == ["gate and up are not neighbours of the same size"]


def test_near_miss_another_dimension() -> None:
    """Halves of the rows are no halves of a row: not even near."""

    def build(b: Builder, x: fx.Node) -> Any:
        return gated(b, b.call(aten.slice.Tensor, x, 0, 0, 1), b.call(aten.slice.Tensor, x, 0, 1, 2))

    assert near_miss(build) == []


def test_near_miss_interleaved() -> None:
    def build(b: Builder, x: fx.Node) -> Any:
        gate, up = (b.call(aten.slice.Tensor, x, 1, start, 12, 2) for start in (0, 1))
        return gated(b, gate, up)

    assert near_miss(build) == ["gate and up are interleaved"]


def test_near_miss_gpt_oss() -> None:
    """Clamped, scaled and interleaved: (up + 1) * gate * sigmoid(1.702 * gate)."""

    def build(b: Builder, x: fx.Node) -> Any:
        gate, up = (b.call(aten.slice.Tensor, x, 1, start, 12, 2) for start in (0, 1))
        gate, up = b.call(aten.clamp.default, gate, None, 7.0), b.call(aten.clamp.default, up, -7.0, 7.0)
        sigmoid = b.call(aten.sigmoid.default, b.call(aten.mul.Tensor, gate, 1.702))
        return b.call(aten.mul.Tensor, b.call(aten.add.Tensor, up, 1), b.call(aten.mul.Tensor, gate, sigmoid))

    assert near_miss(build) == ["both parts are computed with before the product (aten.mul, aten.add)"]


def test_near_miss_a_clamped_gate() -> None:
    def build(b: Builder, x: fx.Node) -> Any:
        gate, up = slices(b, x, (0, 6), (6, 12))
        return gated(b, b.call(aten.clamp.default, gate, None, 7.0), up)

    assert near_miss(build) == ["the gate goes through aten.clamp before its activation"]


def test_near_miss_another_dtype() -> None:
    b = Builder()
    gate, up = slices(b, b.input("x", 2, 12, dtype=BF16), (0, 6), (6, 12))
    wide = b.call(aten.silu.default, b.call(aten._to_copy.default, gate, dtype=F32))
    out = b.call(aten.mul.Tensor, b.call(aten._to_copy.default, wide, dtype=BF16), up)
    assert untouched(FuseGatedActivation(), b.done(out)) == ["the gate is computed in another dtype"]


def test_two_tensors_are_no_near_miss() -> None:
    b = Builder()
    assert untouched(FuseGatedActivation(), b.done(gated(b, b.input("x", 2, 6), b.input("y", 2, 6)))) == []


def test_a_part_times_itself_is_none_either() -> None:
    """x * sigmoid(x) written out."""

    def build(b: Builder, x: fx.Node) -> Any:
        (gate,) = slices(b, x, (0, 6))
        return b.call(aten.mul.Tensor, gate, b.call(aten.sigmoid.default, gate))

    assert near_miss(build) == []
