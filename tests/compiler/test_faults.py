"""Planted faults: each is seen by the numeric gate's metrics, and bisection names it and nothing else.

On a tiny random Llama, run eagerly: no engine is compiled here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from ingot.artifacts.errors import UsageError
from ingot.compiler.backends.aoti import input_buffers, output_buffers
from ingot.compiler.bisect import Oracle, bisect, find_culprit, search
from ingot.compiler.console import SilentProgress
from ingot.compiler.faults import FAULTS, ShiftRoPE, plant
from ingot.compiler.gate import Budget, GateTokens, judge, plan_tokens
from ingot.compiler.model_weights import open_weights
from ingot.compiler.pipelines import PIPELINE, STRUCTURAL
from ingot.compiler.plan import Plan, make_plan
from ingot.compiler.recipe import Recipe, load_recipe
from ingot.passes.base import Context, GraphPass, Outcome
from ingot.passes.graph import TracedGraph, copy_graph
from ingot.passes.instruments import Recorder
from ingot.passes.manager import run_passes
from ingot.passes.weights import Load

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
RECIPE = """
name = "faults"
[model]
source = "random"
config = "config.json"
max_length = 64
[shapes]
decode_batch_sizes = [2]
prefill_lengths = [8]
kv_block_size = 4
[gate]
prompts = ["a", "b"]
max_tokens = 8
"""
NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "recipe.toml").write_text(RECIPE)
    return load_recipe(folder / "recipe.toml")


@pytest.fixture(scope="module")
def planned(recipe: Recipe) -> tuple[Plan, Load]:
    plan, model = make_plan(recipe, SilentProgress())
    return plan, open_weights(model, plan.folder, recipe.model.dtype, recipe.model.seed).load


@pytest.fixture(scope="module")
def oracle(planned: tuple[Plan, Load]) -> Oracle:
    return Oracle(*planned, plan_tokens(planned[0], None))


def test_the_sound_pipeline_has_no_culprit(planned: tuple[Plan, Load]) -> None:
    found = find_culprit(*planned, plan_tokens(planned[0], None), PIPELINE)
    assert found.name is None
    assert "no pass does" in found.detail
    assert len(found.tried) == 1, "one look at the whole is enough"


def test_bisection_begins_with_what_the_gate_saw_fail(planned: tuple[Plan, Load]) -> None:
    tokens = plan_tokens(planned[0], None)
    (case,) = Oracle(*planned, tokens, ("prefill-c8", "decode-b2"), worst=0).cases
    assert (case.pair.prefill, case.pair.decode) == ("prefill-c8", "decode-b2")
    assert case.sequences == (0, len(tokens.sequences) - 1), "the worst, and the longest beside it"


def test_a_trace_that_misses_the_budget_is_no_pass_and_yet_a_miss(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "budget", Budget(max_relative_error=0.0))
    found = search(oracle, PIPELINE)
    assert (found.name, found.missed) == (None, True)
    assert "already misses the budget" in found.detail


def test_the_gate_names_the_failing_pair_and_its_worst_sequence(recipe: Recipe) -> None:
    pairs = [("prefill-c8", "decode-b1"), ("prefill-c8", "decode-b2")]
    wanted = [np.eye(3, 4, dtype=np.float32), np.eye(3, 4, dtype=np.float32)]
    off = wanted[1] + np.array([0.5, 0, 0, 0], np.float32)
    logits = [[(0, wanted[0]), (1, wanted[1])], [(0, wanted[0]), (1, off)]]
    result = judge(recipe, pairs, logits, wanted, None, GateTokens([[1], [1]], [1, 1]))
    assert (result.failed_pair, result.worst) == (pairs[1], 1)
    assert judge(recipe, pairs[:1], logits[:1], wanted, None, GateTokens([[1], [1]], [1, 1])).failed_pair is None


@pytest.mark.parametrize("name", NAMES)
def test_bisection_names_the_planted_pass(oracle: Oracle, name: str) -> None:
    passes = plant(name, PIPELINE)
    found = search(oracle, passes)
    assert found.name == name
    assert "max relative error" in found.detail
    assert len(found.tried) <= 2 + len(passes).bit_length()


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_among_few_passes_is_named_too(oracle: Oracle, name: str) -> None:
    """Bisection may not count on the rest of the pipeline being there."""
    after = next(f.after for f in FAULTS if f.name == name)
    few = [p for p in PIPELINE if p.name in (*STRUCTURAL, after)]
    assert search(oracle, few).name is None
    assert search(oracle, plant(name, few)).name == name


def test_a_shift_that_prefill_shares_is_no_fault(oracle: Oracle) -> None:
    """Rotary attention sees differences of positions alone: the reason why ShiftRoPE leaves prefill out."""

    class ShiftBoth:
        name = "shift-both"
        needs = leaves = PIPELINE[0].leaves
        exact = True

        def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
            return ShiftRoPE().run(traced, replace(ctx, phase="decode"))

    passes = list(PIPELINE)
    passes.insert([p.name for p in passes].index("position-tables") + 1, ShiftBoth())
    assert search(oracle, passes).name is None


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_looks_sound_from_outside(oracle: Oracle, name: str) -> None:
    """It changes the graph, and neither stages nor inputs nor outputs give it away."""
    passes = plant(name, PIPELINE)
    for engine, traced in oracle.traces.items():
        sound, faulty, recorder = copy_graph(traced), copy_graph(traced), Recorder()
        run_passes(sound, PIPELINE, oracle.plan.contexts[engine])
        run_passes(faulty, passes, oracle.plan.contexts[engine], [recorder])
        record = next(r for r in recorder.records if r.name == name)
        assert record.changed > 0 or (name, engine[:7]) == ("fault-shift-rope", "prefill")
        assert record.missed == []
        assert input_buffers(sound) == input_buffers(faulty)
        assert output_buffers(sound) == output_buffers(faulty)


def test_where_there_is_nothing_to_spoil_a_fault_says_so(oracle: Oracle) -> None:
    """On a graph of inputs alone."""
    graph = copy_graph(next(iter(oracle.traces.values())))
    tokens = next(n for n in graph.graph.nodes if n.target == "tokens")
    next(n for n in graph.graph.nodes if n.op == "output").args = (tokens,)
    for node in reversed([n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]):
        graph.graph.erase_node(node)
    context = next(c for c in oracle.plan.contexts.values() if c.phase == "decode")
    for fault in FAULTS:
        outcome = fault.run(graph, context)
        assert outcome.changed == 0
        assert len(outcome.missed) == 1, fault.name


def test_bisect_takes_a_planted_pipeline(recipe: Recipe) -> None:
    """What `ingot bisect RECIPE --plant NAME` calls."""
    found = bisect(recipe, progress=SilentProgress(), passes=plant("swap-gate-up", PIPELINE))
    assert found.name == "fault-swap-gate-up"


@pytest.mark.parametrize(
    ("name", "passes", "says"),
    [
        ("typo", PIPELINE, "the faults are: scale-weight, swap-gate-up, drop-residual, shift-rope, wrong-block"),
        ("wrong-block", PIPELINE[:3], "its place is behind insert-kv-cache"),
    ],
)
def test_what_cannot_be_planted(name: str, passes: Sequence[GraphPass], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plant(name, passes)


def test_planting_leaves_the_pipeline_alone() -> None:
    before = [p.name for p in PIPELINE]
    for fault in FAULTS:
        for name in (fault.name, fault.name.removeprefix("fault-")):
            planted = [p.name for p in plant(name, PIPELINE)]
            assert planted[planted.index(fault.name) - 1] == fault.after
            assert [n for n in planted if n != fault.name] == before
    assert [p.name for p in PIPELINE] == before


def test_a_scaled_weight_keeps_its_dtype(oracle: Oracle) -> None:
    traced = copy_graph(next(iter(oracle.traces.values())))
    run_passes(traced, plant("scale-weight", PIPELINE), next(iter(oracle.plan.contexts.values())))
    (name,) = [n for n in traced.weights.entries if n.endswith("__scaled")]
    load: Callable[[str], torch.Tensor] = lambda _: torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)  # noqa: E731
    assert traced.weights.entries[name].sources() == ("lm_head.weight",)
    assert traced.weights.evaluate(name, load).dtype == torch.float32  # the model's, not the file's
    torch.testing.assert_close(traced.weights.evaluate(name, load), torch.tensor([[1.02, -2.04]]))
