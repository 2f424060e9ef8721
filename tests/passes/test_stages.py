"""Stages: what each one refuses, and that every message says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.passes.stages import Stage, violations
from ingot.passes.weights import Stored
from ingot.runtime.ops.schema import overload

from .graphs import Builder, aten


def broken(build: Any, stage: Stage = Stage.TRACED, batch: int = 2) -> list[str]:
    b = Builder(batch)
    x = b.input("x", batch, 2, 1, 4)
    return violations(b.done(build(b, x)), stage)


def test_a_sound_graph_holds_at_every_stage() -> None:
    b = Builder()
    b.input("block_tables", 2, 8, dtype=torch.int32)
    traced = b.done(b.call(aten.mul.Tensor, b.input("x", 2, 4), b.weight("w", 4)))
    assert [violations(traced, stage) for stage in Stage] == [[]] * len(Stage)


def test_stages_are_in_order() -> None:
    assert sorted(Stage, key=lambda s: s.value) == [
        Stage.TRACED, Stage.CLEAN, Stage.FUSED, Stage.CACHED, Stage.QUANTIZED, Stage.PLANNED,
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "more"), [("rand_like", ()), ("bernoulli", ()), ("dropout", (0.5, True))])
def test_nothing_random_ever(name: str, more: tuple) -> None:
    found = broken(lambda b, x: b.call(getattr(aten, name).default, x, *more))
    assert len(found) == 1 and "nothing random" in found[0] and name in found[0]


def test_clean_graphs_have_no_checks_and_copies() -> None:
    for target in (aten.alias.default, aten.detach.default):
        build = lambda b, x, target=target: b.call(target, x)  # noqa: E731
        assert broken(build, Stage.TRACED) == []
        (found,) = broken(build, Stage.CLEAN)
        assert "clean-up must remove it" in found


def attention(b: Builder, x: Any) -> Any:
    return b.call(overload("attention"), x, x, x, 0, 0.5, 0, 0.0, None)


def test_attention_goes_when_the_cache_comes() -> None:
    assert broken(attention, Stage.FUSED) == []
    found = broken(attention, Stage.CACHED)
    assert any("attention without a cache" in f for f in found)
    assert any("input 'block_tables' is missing" in f for f in found)


def test_cached_ops_come_with_the_cache() -> None:
    def build(b: Builder, x: Any) -> Any:
        tables = b.input("block_tables", 2, 8, dtype=torch.int32)
        return b.call(overload("cache_slots"), tables, b.positions, 4)

    assert broken(build, Stage.CACHED) == []
    (found,) = broken(build, Stage.FUSED)
    assert "cached ops come with the cache pass" in found


def test_inputs_may_not_vanish() -> None:
    b = Builder()
    traced = b.done(b.call(aten.neg.default, b.input("x", 4)))
    traced.graph.erase_node(b.tokens)
    assert violations(traced, Stage.TRACED) == ["input 'tokens' is missing: a pass removed a placeholder"]


def test_every_node_has_its_value() -> None:
    b = Builder()
    node = b.call(aten.neg.default, b.input("x", 4))
    del node.meta["val"]
    (found,) = violations(b.done(node), Stage.TRACED)
    assert node.name in found and "passes.graph.emit" in found


def test_only_plain_calls() -> None:
    b = Builder()
    x = b.input("x", 4)
    node = b.graph.call_method("neg", (x,))
    node.meta = {"val": x.meta["val"]}
    (found,) = violations(b.done(node), Stage.TRACED)
    assert "only plain function calls" in found


def test_weights_have_a_source_and_the_nodes_shape_and_dtype() -> None:
    b = Builder()
    w = b.weight("w", 4)
    traced = b.done(b.call(aten.neg.default, w))
    traced.gm.w = torch.empty(5, device="meta")
    (found,) = violations(traced, Stage.TRACED)
    assert "not registered with the node's shape and dtype" in found
    traced.gm.w = torch.empty(4, dtype=torch.bfloat16, device="meta")
    assert len(violations(traced, Stage.TRACED)) == 1
    traced.gm.w = torch.empty(4, device="meta")
    assert violations(traced, Stage.TRACED) == []
    del traced.weights.entries["w"]
    (found,) = violations(traced, Stage.TRACED)
    assert "has no source" in found and "passes.graph.add_weight" in found
    traced.weights.entries["w"] = Stored("w", (4,), torch.float32)
    del traced.gm.w
    assert len(violations(traced, Stage.TRACED)) == 1
