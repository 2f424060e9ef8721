"""Pipelines: their files, their jobs, figures against budgets, and what the reports say of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import fields, replace
from pathlib import Path

import pytest
from ingot.artifacts.errors import ResourceError, UsageError
from ingot.compiler.ci.jobs import Check, Result, checks, exit_code, slots
from ingot.compiler.ci.pipeline import Baseline, Budgets, Change, Matrix, Pipeline, Ship, jobs_of, load_pipeline
from ingot.compiler.ci.report import junit, summary, write_reports
from ingot.compiler.compare import Row

SMALL = """
name = "nightly"
[matrix]
recipes = ["a.toml", "models/b.toml"]
schemes = ["none", "W8A16"]
"""


def load(tmp_path: Path, text: str) -> list[tuple[str, tuple[str, ...], str]]:
    (tmp_path / "p.toml").write_text(text)
    return [(job.name, job.overrides, job.plant) for job in jobs_of(load_pipeline(tmp_path / "p.toml"), tmp_path)]


def test_the_matrix_in_order(tmp_path: Path) -> None:
    # Both recipes are built once before any of them is built again with another scheme, which shares their stages.
    assert load(tmp_path, SMALL) == [
        ("a-none-cpu", (), ""), ("b-none-cpu", (), ""),
        ("a-W8A16-cpu", ("scheme=W8A16",), ""), ("b-W8A16-cpu", ("scheme=W8A16",), ""),
    ]  # fmt: skip


def test_changes_and_targets(tmp_path: Path) -> None:
    text = SMALL + 'targets = ["cuda"]\n[[change]]\njobs = "b-*"\nset = ["max_length=64"]\nplant = "wrong-block"\n'
    assert load(tmp_path, text)[3] == (
        "b-W8A16-cuda", ("target.device=cuda", "scheme=W8A16", "max_length=64"), "wrong-block",
    )  # fmt: skip


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(SMALL + "[budgets]\ndecode = 1\n")
    pipeline = load_pipeline(tmp_path / "p.toml")
    assert (pipeline.output, pipeline.parallel, pipeline.budgets) == ("ci", 1, replace(Budgets(), decode=1.0))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "name"),
        ("name = 3\n[matrix]\nrecipes = []", "name"),
        ('name = "x"', "matrix"),
        ('name = "x"\n[matrix]\nrecipes = []', "empty"),
        ('name = "x"\n[matrix]\nrecipes = ["a.toml"]\ntargets = ["tpu"]', "tpu"),
        (SMALL.replace("schemes", "scheme"), "matrix.scheme"),
        (SMALL + "[budgets]\nspeed = 1.0", "budgets.speed"),
        (SMALL + '[budgets]\ndecode = "fast"', "budgets.decode"),
        (SMALL + "[baseline]\nrounds = 0", "rounds"),
        (SMALL + '[[change]]\njobs = "c-*"', "no job fits"),
        (SMALL.replace("models/b.toml", "models/a.toml"), "two jobs"),
        (SMALL.replace('"a.toml"', '"a b.toml"'), "cannot be a folder"),
        ("name = [", "no TOML"),
        ("\x00", "no TOML"),
    ],
)
def test_broken_pipelines_are_usage_errors(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert word in str(caught.value)


def test_a_pipeline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load_pipeline(tmp_path / "absent.toml")


@pytest.mark.parametrize(("parallel", "gb", "available", "expected"), [(4, 0, 1, 4), (4, 2, 7e9, 3), (2, 1, 9e9, 2)])
def test_builds_at_a_time(parallel: int, gb: float, available: float, expected: int) -> None:
    assert slots(parallel, gb, int(available)) == expected


def test_no_room_for_one_build() -> None:
    with pytest.raises(ResourceError, match="no room"):
        slots(2, 8, 10**9)


def row(decode: float = 100, prefill: float = 1000, size: int = 1000, kl: float = 1e-3, top1: float = 0.99) -> Row:
    return Row(
        "x", "x", "0", "none", "cpu", size, size, size, [prefill], [decode], accuracy={"mean_kl": kl, "top1": top1}
    )


def failed(old: Row, new: Row, budgets: Budgets | None = None) -> list[str]:
    return [check.name for check in checks(old, new, budgets or Budgets()) if not check.ok]


def test_the_same_figures_are_within_every_budget() -> None:
    assert failed(row(), row()) == []
    assert len(checks(row(), row(), Budgets())) == 6


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (row(decode=93), []),  # 5 % of budget and 3 % of noise
        (row(decode=92), ["decode tokens/s"]),
        (row(prefill=900), ["prefill tokens/s"]),
        (row(size=1051), ["size in bytes", "memory in bytes"]),
        (row(kl=1.6e-3), ["mean KL"]),
        (row(top1=0.979), ["top-1"]),
        (row(decode=1000, prefill=9e9, size=1, kl=0.0, top1=1.0), []),
    ],
)
def test_each_budget(new: Row, expected: list[str]) -> None:
    assert failed(row(), new) == expected


def test_a_disturbed_round_is_no_slowdown() -> None:
    disturbed = row()
    disturbed.decode = [50, 99, 60]
    assert failed(row(), disturbed) == []
    disturbed.decode = [50, 80, 60]
    assert failed(row(), disturbed) == ["decode tokens/s"]


def test_a_budget_of_nothing_is_off_and_lossless_noise_is_none() -> None:
    assert failed(row(), row(decode=1, prefill=1), Budgets(decode=0, prefill=0)) == []
    assert failed(row(kl=1e-14), row(kl=5e-13)) == []


def results() -> list[Result]:
    good = Result(
        "good", "a.toml", digest="ab" * 32, seconds=3, from_cache=5, checks=checks(row(), row(110), Budgets())
    )
    slow = Result("slow", "a.toml", digest="cd" * 32, rebuilt=["engine decode-b1 (shape: 1 → 64)"])
    slow.checks = checks(row(), row(50), Budgets())
    wrong = Result("wrong|<b>", "b.toml", code=4, error="error: the numeric gate failed\n  why: pass \x1b'fault'")
    return [good, slow, wrong]


def test_exit_codes() -> None:
    good, slow, wrong = results()
    assert exit_code([good]) == 0
    assert exit_code([good, slow]) == exit_code([wrong]) == 4
    assert exit_code([replace(wrong, code=5), good]) == 5
    assert exit_code([replace(wrong, code=5), slow]) == 4
    assert exit_code([replace(wrong, code=-9)]) == 5


def test_junit_counts_and_says_the_numbers() -> None:
    root = ElementTree.fromstring(junit("nightly", results()))
    suites = {suite.attrib["name"]: suite.attrib for suite in root}
    assert [suites[name]["failures"] for name in ("good", "slow", "wrong|<b>")] == ["0", "1", "1"]
    assert [len(suite) for suite in root] == [int(suite.attrib["tests"]) for suite in root] == [7, 7, 1]
    said = [failure.attrib["message"] for failure in root.iter("failure")]
    assert said[0] == "decode tokens/s 50 is less than 92.15, which the budget makes of 100"
    assert said[1].startswith("error: the numeric gate failed")


def test_the_summary_says_what_changed() -> None:
    text = summary("nightly", results())
    assert text.startswith("# nightly: 2 of 3 failed")
    assert "| good | ✅ | 110 (+10.0%)" in text
    assert "| slow | ❌ | 50 (-50.0%) ❌" in text
    assert "wrong\\|&lt;b>" in text
    assert "made anew: engine decode-b1 (shape: 1 → 64)" in text
    assert "every stage came from the cache" in text
    assert "the numeric gate failed" in text


def test_reports_are_written_and_agree(tmp_path: Path) -> None:
    write_reports("nightly", results(), tmp_path / "out")
    data = json.loads((tmp_path / "out/result.json").read_text())
    assert [job["ok"] for job in data["jobs"]] == [True, False, False] and data["ok"] is False
    assert ElementTree.parse(tmp_path / "out/junit.xml").getroot().attrib["name"] == "nightly"
    assert (tmp_path / "out/summary.md").read_text("utf-8") == summary("nightly", results())


def test_a_check_without_a_baseline_is_no_failure() -> None:
    assert Check("x", 1.0, None, None, True).ok


# --- the files that are ready to use ---------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", [".github/workflows/ci.yml", "examples/ci/github-actions.yml"]),
        ("vendor.gitlab-ci", ["examples/ci/gitlab-ci.yml"]),
    ],
)
def test_workflow_files_fit_their_schemas(schema: str, files: list[str]) -> None:
    words = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        schema,
        *(str(ROOT / name) for name in files),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_pipeline_is_sound() -> None:
    path = ROOT / "examples/ci/pipeline.toml"
    jobs = jobs_of(load_pipeline(path), path.parent)
    assert [job.name for job in jobs] == ["demo-none-cpu", "demo-W8A16-cpu"]
    assert all(job.recipe.is_file() for job in jobs)


@pytest.mark.parametrize("kind", [Pipeline, Matrix, Change, Baseline, Budgets, Ship])
def test_the_document_has_every_key(kind: type) -> None:
    text = (ROOT / "docs/ci.md").read_text("utf-8")
    sections = ("matrix", "change", "baseline", "budgets", "ship")
    for name in (item.name for item in fields(kind) if item.name not in sections):
        assert re.search(rf"`(\w+)?\.?{name}`", text), name
