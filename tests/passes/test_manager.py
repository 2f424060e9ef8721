"""The manager: order, stages, clean-up, and errors that name the pass and all that ran before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.artifacts.errors import UnsupportedModelError
from ingot.passes.base import Context, GraphPass, Outcome
from ingot.passes.graph import TracedGraph, add_weight, operands
from ingot.passes.manager import PassError, run_passes
from ingot.passes.weights import Stored

from .graphs import DECODE, Builder, Stage, aten, text

F32 = torch.float32


class Scripted:
    """A pass that does what it is told."""

    exact = True

    def __init__(
        self, name: str, act: Callable[[TracedGraph], int], needs: Stage = Stage.TRACED, leaves: Stage = Stage.TRACED
    ) -> None:
        self.name, self.act, self.needs, self.leaves = name, act, needs, leaves

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        return Outcome(self.act(traced))


def idle(name: str = "idle", leaves: Stage = Stage.TRACED) -> Scripted:
    return Scripted(name, lambda traced: 0, leaves=leaves)


@pytest.fixture
def traced() -> TracedGraph:
    b = Builder()
    x = b.call(aten.mul.Tensor, b.input("x", 4), b.weight("w", 4))
    return b.done(b.call(aten.add.Tensor, x, b.weight("v", 4)))


def nodes(traced: TracedGraph, target: object) -> list[torch.fx.Node]:
    return [n for n in traced.graph.nodes if n.target is target]


def test_passes_run_in_order_and_give_the_stage_reached(traced: TracedGraph) -> None:
    ran: list[str] = []

    def noting(name: str) -> GraphPass:
        return Scripted(name, lambda traced: len(ran.append(name) or ()))  # type: ignore[func-returns-value]

    stage = run_passes(traced, [noting("a"), idle(leaves=Stage.FUSED), noting("b")], DECODE)
    assert (ran, stage) == (["a", "b"], Stage.FUSED)
    assert run_passes(traced, [], DECODE, stage=Stage.CLEAN) == Stage.CLEAN


def test_a_stage_is_never_left_backwards(traced: TracedGraph) -> None:
    assert run_passes(traced, [idle(leaves=Stage.FUSED), idle(leaves=Stage.CLEAN)], DECODE) == Stage.FUSED


def test_after_a_change_dead_code_and_unread_weights_go(traced: TracedGraph) -> None:
    def drop(traced: TracedGraph) -> int:
        (add,) = nodes(traced, aten.add.Tensor)
        add.replace_all_uses_with(operands(add)[0])
        return 1

    run_passes(traced, [Scripted("drop", drop)], DECODE)
    assert text(traced) == "%0 = aten.mul(x, w)\nreturn %0"
    assert set(traced.weights.entries) == {"w"}
    assert dict(traced.gm.named_buffers()).keys() == {"w"}
    assert "add" not in traced.gm.code


def test_inputs_nobody_reads_stay(traced: TracedGraph) -> None:
    run_passes(traced, [Scripted("claims", lambda traced: 1)], DECODE)
    assert [n.target for n in traced.graph.nodes if n.op == "placeholder"] == ["tokens", "positions", "x"]


def failing(act: Callable[[TracedGraph], int], traced: TracedGraph, **kwargs: Stage) -> PassError:
    passes = [idle("first"), idle("second"), Scripted("culprit", act, **kwargs), idle("never")]
    with pytest.raises(PassError) as caught:
        run_passes(traced, passes, DECODE)
    error = caught.value
    assert error.pass_name == "culprit"
    assert "'culprit'" in str(error) and "ran before it: first, second)" in str(error)
    assert "never" not in str(error)
    assert "passes.skip" in str(error)
    return error


def test_a_pass_that_raises(traced: TracedGraph) -> None:
    error = failing(lambda traced: 1 // 0, traced)
    assert "ZeroDivisionError" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_pass_that_breaks_the_stage(traced: TracedGraph) -> None:
    def alias(traced: TracedGraph) -> int:
        (mul,) = nodes(traced, aten.mul.Tensor)
        mul.target, mul.args = aten.alias.default, mul.args[:1]
        return 1

    error = failing(alias, traced, leaves=Stage.CLEAN)
    assert "stage CLEAN does not hold" in str(error) and "aten.alias" in str(error)


def test_a_pass_that_leaves_a_dangling_weight(traced: TracedGraph) -> None:
    """A node that reads a weight nobody knows the value of."""

    def dangle(traced: TracedGraph) -> int:
        del traced.weights.entries["w"]
        return 1

    assert "weight 'w' has no source" in str(failing(dangle, traced))


def test_a_pass_that_forgets_a_nodes_value(traced: TracedGraph) -> None:
    def bare(traced: TracedGraph) -> int:
        (mul,) = nodes(traced, aten.mul.Tensor)
        with traced.graph.inserting_after(mul):
            new = traced.graph.call_function(aten.neg.default, (mul,))
        nodes(traced, aten.add.Tensor)[0].replace_input_with(mul, new)
        return 1

    assert "node.meta['val'] is missing" in str(failing(bare, traced))


def test_a_pass_that_uses_before_it_defines(traced: TracedGraph) -> None:
    def backwards(traced: TracedGraph) -> int:
        (mul,), (add,) = nodes(traced, aten.mul.Tensor), nodes(traced, aten.add.Tensor)
        add.append(mul)
        return 1

    assert "used before it has been defined" in str(failing(backwards, traced))


def test_a_pass_that_renames_a_weight_to_one_that_is(traced: TracedGraph) -> None:
    def clash(traced: TracedGraph) -> int:
        with traced.graph.inserting_before(nodes(traced, aten.mul.Tensor)[0]):
            add_weight(traced, "w", Stored("other", (4,), F32), (4,), F32)
        return 1

    assert "weight 'w' exists and means something else" in str(failing(clash, traced))


def test_a_pass_that_comes_too_early(traced: TracedGraph) -> None:
    error = failing(lambda traced: 0, traced, needs=Stage.CACHED, leaves=Stage.CACHED)
    assert "needs stage CACHED, the graph is TRACED" in str(error)


def test_the_first_pass_has_none_before_it(traced: TracedGraph) -> None:
    with pytest.raises(PassError, match="ran before it: nothing"):
        run_passes(traced, [Scripted("only", lambda traced: 1 // 0)], DECODE)


def test_errors_with_a_meaning_of_their_own_pass_through(traced: TracedGraph) -> None:
    """A pass may find that the model cannot be compiled: exit code 3, not a bug of the pass."""

    def refuse(traced: TracedGraph) -> int:
        raise UnsupportedModelError("this model is too strange", "it is", "")

    with pytest.raises(UnsupportedModelError, match="too strange"):
        run_passes(traced, [Scripted("refuses", refuse)], DECODE)
