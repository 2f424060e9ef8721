"""Instruments watch: counts for the report, dumps only where something changed, a reproducer after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ingot.passes.base import Context, GraphPass, Outcome
from ingot.passes.cleanup.canonicalize import Canonicalize
from ingot.passes.cleanup.common_subexpressions import CommonSubexpressions
from ingot.passes.graph import TracedGraph
from ingot.passes.instruments import DumpIR, Recorder, ir_text, op_counts
from ingot.passes.manager import PassError, run_passes
from ingot.passes.stages import Stage

from .graphs import DECODE, Builder, aten


class Crash:
    """Ruins the graph and then raises."""

    name = "crash"
    needs = leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        for node in list(traced.graph.nodes):
            if node.target is aten.mul.Tensor:
                node.target = aten.div.Tensor
        traced.gm.recompile()
        raise RuntimeError("out of ideas")


class Complain:
    """Changes nothing and says why."""

    name = "complain"
    needs = leaves = Stage.CLEAN
    exact = False

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        outcome = Outcome(facts={"seen": 3})
        outcome.miss("mul_1", "it is too small")
        return outcome


@pytest.fixture
def traced() -> TracedGraph:
    b = Builder()
    x = b.input("x", 4)
    one, two = (b.call(aten.mul.Tensor, b.call(aten.clone.default, x), b.weight("w", 4)) for _ in range(2))
    return b.done(b.call(aten.add.Tensor, one, two))


def test_op_counts(traced: TracedGraph) -> None:
    assert op_counts(traced) == {"aten.clone": 2, "aten.mul": 2, "aten.add": 1}


def test_the_recorder_counts_ops_before_and_after(traced: TracedGraph) -> None:
    recorder = Recorder()
    run_passes(traced, [Canonicalize(), CommonSubexpressions(), Complain()], DECODE, [recorder])
    first, second, third = recorder.records
    assert (first.name, first.exact, first.changed) == ("canonicalize", True, 2)
    assert (first.ops_before, first.ops_after, first.ops_changed) == (5, 3, {"aten.clone": -2})
    assert (second.changed, second.ops_before, second.ops_after) == (2, 3, 2)
    assert second.ops_changed == {"aten.mul": -1}
    assert (third.exact, third.changed, third.ops_changed, third.facts) == (False, 0, {}, {"seen": 3})
    assert third.missed == [{"site": "mul_1", "reason": "it is too small"}]
    assert all(r.time_ms >= 0 for r in recorder.records)


def test_dumps_are_written_only_where_something_changed(traced: TracedGraph, tmp_path: Path) -> None:
    """Numbers are those of the passes, so that dumps of two builds can be laid side by side."""
    passes: list[GraphPass] = [Complain(), Canonicalize(), Complain(), CommonSubexpressions()]
    run_passes(traced, passes, DECODE, [DumpIR(tmp_path / "ir", "decode-b2")], Stage.CLEAN)
    files = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert files == [
        "decode-b2-00-traced.py",
        "decode-b2-02-canonicalize.py",
        "decode-b2-04-common-subexpressions.py",
    ]
    texts = [(tmp_path / "ir" / f).read_text() for f in files]
    assert [t.count("aten.clone.default") for t in texts] == [2, 0, 0]
    assert [t.count("aten.mul.Tensor") for t in texts] == [2, 2, 1]
    assert texts[-1] == ir_text(traced)
    assert "# x: (4,) torch.float32" in texts[0]
    for written in texts:
        compile(written, "dump", "exec")


def test_a_crash_leaves_the_graph_the_pass_was_given(traced: TracedGraph, tmp_path: Path) -> None:
    dump = DumpIR(tmp_path, "decode-b2")
    with pytest.raises(PassError):
        run_passes(traced, [Canonicalize(), Crash()], DECODE, [dump])
    written = (tmp_path / "decode-b2-crash-crash.py").read_text()
    story = json.loads(written.splitlines()[0].removeprefix("# "))
    assert story["pass"] == "crash"
    assert story["error"] == "RuntimeError: out of ideas"
    assert Context(**story["context"] | {"quantization": ()}) == DECODE
    assert written.endswith((tmp_path / "decode-b2-01-canonicalize.py").read_text())
    assert "aten.mul" in written and "aten.div" not in written
    compile(written, "reproducer", "exec")


def test_a_crash_in_the_first_pass_is_dumped_too(traced: TracedGraph, tmp_path: Path) -> None:
    with pytest.raises(PassError):
        run_passes(traced, [Crash()], DECODE, [DumpIR(tmp_path, "e")], Stage.CLEAN)
    assert {p.name for p in tmp_path.iterdir()} == {"e-00-traced.py", "e-crash-crash.py"}


def test_watching_changes_nothing(traced: TracedGraph, tmp_path: Path) -> None:
    alone, watched = traced, TracedGraph(traced.gm, traced.weights)
    before = ir_text(alone)
    run_passes(watched, [Complain()], DECODE, [Recorder(), DumpIR(tmp_path, "e")], Stage.CLEAN)
    assert ir_text(watched) == before
