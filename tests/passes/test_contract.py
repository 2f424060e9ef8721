"""What every pass of the pipeline owes, on traces of real models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ingot.compiler.evaluate import Evaluator, step_inputs
from ingot.compiler.pipelines import PIPELINE
from ingot.passes.base import GraphPass
from ingot.passes.graph import TracedGraph, copy_graph, op_name
from ingot.passes.stages import violations
from torch import Tensor, fx

from .conftest import NAMES, History, Step

PASSES = [p.name for p in PIPELINE]
every_step = pytest.mark.parametrize(("subject", "name"), [(s, p) for s in NAMES for p in PASSES])
Histories = Callable[[str], History]


@pytest.fixture
def step(history: Histories, subject: str, name: str) -> Step:
    return history(subject).steps[name]


def code(traced: TracedGraph) -> str:
    """The graph as it stands, not as it was when it was last compiled."""
    return traced.graph.python_code("self").src


@pytest.mark.parametrize("graph_pass", PIPELINE, ids=PASSES)
def test_it_introduces_itself(graph_pass: GraphPass) -> None:
    assert isinstance(graph_pass, GraphPass)
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", graph_pass.name)
    assert (inspect.getdoc(type(graph_pass)) or "").partition("\n")[0].endswith(".")
    assert graph_pass.leaves >= graph_pass.needs
    assert not vars(graph_pass), "a pass keeps no state"


def test_names_are_unique() -> None:
    assert len(set(PASSES)) == len(PASSES)


def test_every_pass_changes_some_graph(history: Histories) -> None:
    """Else the contract below would be tested on nothing."""
    idle = {p for p in PASSES if not any(history(s).steps[p].record.changed for s in NAMES)}
    # One only states facts; what the other folds, today's models compute outside the trace.
    assert idle <= {"plan-static-buffers", "fold-constants"}


@every_step
def test_running_it_twice_changes_nothing_more(step: Step) -> None:
    assert step.second.changed == 0
    assert code(step.again) == code(step.after)
    assert step.again.weights.entries == step.after.weights.entries


@every_step
def test_the_stage_it_leaves_holds(step: Step) -> None:
    assert step.stage >= step.graph_pass.leaves
    assert violations(step.after, step.stage) == []


@every_step
def test_no_change_means_identical_code(step: Step) -> None:
    assert (step.record.changed == 0) == (code(step.before) == code(step.after))
    assert (step.record.changed == 0) or str(step.after.gm.code).strip() in code(step.after)


@every_step
def test_every_value_is_what_its_op_gives(step: Step) -> None:
    """Computed again on meta; what real kernels give is compared in test_the_numbers_stay."""
    for node in step.after.graph.nodes:
        if node.op == "call_function":
            args: Any = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
            with torch.no_grad():
                assert facts(node.target(*args, **kwargs)) == facts(node.meta["val"]), node.format_node()


@every_step
def test_weights_and_graph_agree(step: Step) -> None:
    traced = step.after
    read = {str(n.target): n for n in traced.graph.nodes if n.op == "get_attr"}
    assert set(read) == set(traced.weights.entries) == set(dict(traced.gm.named_buffers()))
    for name, node in read.items():
        assert facts(getattr(traced.gm, name)) == facts(node.meta["val"])
        assert getattr(traced.gm, name).device.type == "meta"


@pytest.mark.parametrize("subject", NAMES)
def test_weights_are_what_the_graph_says(history: Histories, subject: str) -> None:
    told = history(subject)
    for step in told.steps.values():
        for name in step.after.weights.entries.keys() - step.before.weights.entries.keys():
            value = step.after.weights.evaluate(name, told.load)
            assert facts(value) == facts(getattr(step.after.gm, name)), name


# These hand a matrix product over in another shape, whose sums round otherwise; all others keep every bit.
SUMS_DIFFERENTLY = {"unify-linear", "merge-projections", "gather-last-token", "insert-kv-cache"}


@pytest.mark.parametrize("subject", NAMES)
def test_the_numbers_stay(history: Histories, subject: str) -> None:
    """The logits of a first chunk, before and after each exact pass, with every real value of its announced shape."""
    told = history(subject)
    ctx = told.ctx
    rows = [[(7 * i + 5) % 64 for i in range(ctx.length)], [7]][: ctx.batch]
    inputs = step_inputs(rows, [0] * ctx.batch, ctx.length, ctx.max_blocks, ctx.block_size)
    before = checked_logits(told.traced, told, inputs)
    for name, step in told.steps.items():
        if step.record.changed == 0:
            continue
        after = checked_logits(step.after, told, inputs)
        if step.graph_pass.exact:
            rounding = torch.finfo(torch.bfloat16).eps if "bfloat16" in subject else 2e-6
            error = (after - before).abs().max() / before.abs().max()
            assert error <= (rounding if name in SUMS_DIFFERENTLY else 0.0), name
        before = after


def checked_logits(traced: TracedGraph, told: History, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [batch, vocabulary] of the last tokens, float32."""
    observed = Observed(copy_graph(traced), told.load)
    with torch.no_grad():
        out = observed.run(inputs)
    logits = out[1] if isinstance(out, list | tuple) else out
    return (logits[:, -1] if logits.dim() == 3 else logits).float()


class Observed(Evaluator):
    """Compares every real value with what the graph announces."""

    def run(self, inputs: Any) -> Any:
        for node in self.traced.graph.nodes:
            if node.op == "call_function":
                node.target = watched(node.target, node.meta["val"], node)
        return super().run(inputs)


def watched(target: Any, announced: Any, node: fx.Node) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        value = target(*args, **kwargs)
        assert facts(value) == facts(announced), node.format_node()
        return value

    call.__name__ = op_name(node)
    return call


def facts(value: Any) -> Any:
    """Shape and dtype, through lists and tuples."""
    if isinstance(value, list | tuple):
        return [facts(v) for v in value]
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
