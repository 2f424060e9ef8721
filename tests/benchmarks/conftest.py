"""A report made by hand; nothing in these tests is timed."""

from __future__ import annotations

import pytest
from ingot.benchmarks.results import Build, Goal, Machine, Model, Pass, Report
from ingot.compiler.traffic import Traffic


@pytest.fixture
def model() -> Model:
    """A measured model: three pairs of runs, of which the second met a slow machine."""
    made = Model("small", "recipes/small.toml", ["a=1"], dtype="bfloat16", scheme="W8A16", parameters=1_500_000)
    made.checkpoint_bytes, made.artifact_bytes, made.weights_bytes = 3_000_000, 2_500_000, 2_000_000
    made.traffic = Traffic(100_000_000, 1000, 499_000)
    made.build = Build(12.5, 4_500_000, 4_000_000, False, {"gate": 1.5})
    for ours, theirs in ((40.0, 10.0), (20.0, 5.0), (44.0, 22.0)):
        made.open_series("ingot", "tg128", "tok/s", 1, made.traffic.total).add(ours)
        made.open_series("peer", "tg8", "tok/s").add(theirs)
    for ours, theirs in ((0.5, 3.0), (0.4, 2.0)):
        made.open_series("ingot", "start", "s").add(ours)
        made.open_series("peer", "start", "s").add(theirs)
    made.goals = [
        Goal("tokens_per_second", ">=", 30.0, "somebody"),
        Goal("start_s", "<=", 0.1, "somebody"),
        Goal("build_peak_over_checkpoint", "<=", 2.0, "somebody"),
        Goal("unheard_of", "<=", 2.0, "somebody"),
    ]
    made.notes = ["a note"]
    return made


@pytest.fixture
def report(model: Model) -> Report:
    """A report of that model and a skipped one."""
    machine = Machine("Some CPU", 2, 2, 32 << 20, 8 << 30, ["avx2"], "Linux", 0.1)
    made = Report(
        "2026-01-01T00:00:00+00:00", "abcdef" * 6, True, ["python"], 3, machine, {"torch": "2.13.0", "gone": ""}
    )
    made.add_reads([Pass("one", 7.0), Pass("two", 8.0)])
    made.models = [model, Model("other", "recipes/other.toml", [], skipped="no | checkpoint")]
    return made
