"""A pipeline with a planted slowdown and a planted fault: each fails by its own number, and what is good passes."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from ingot.artifacts.manifest import load_manifest

from ..conftest import Demo

Ingot = Callable[..., CompletedProcess[str]]
PIPELINE = """
name = "nightly"
output = "out"
parallel = 2
[matrix]
recipes = ["good.toml", "slow.toml", "wrong.toml"]
[[change]]
jobs = "slow-*"
set = ["shapes.decode_batch_sizes=[64]"]
[[change]]
jobs = "wrong-*"
plant = "swap-gate-up"
[baseline]
folder = "production"
rounds = 3
[budgets]
prefill = 0
decode = 0.7
size = 1.5
memory = 0
"""


@pytest.fixture(scope="module")
def pipeline(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline with three recipes of one model and their baselines."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "pipeline.toml").write_text(PIPELINE)
    shutil.copytree(demo.model, folder / "model")
    for name in ("good", "slow", "wrong"):
        shutil.copyfile(demo.recipe, folder / f"{name}.toml")
        demo.copy(folder / f"production/{name}-none-cpu")
    return folder


def test_a_slowdown_and_a_fault_are_caught_with_their_numbers(pipeline: Path, ingot: Ingot) -> None:
    done = ingot("ci", pipeline / "pipeline.toml", "--cache-dir", pipeline / "cache", timeout=1200)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    jobs = {job["job"]: job for job in json.loads((pipeline / "out/result.json").read_text())["jobs"]}
    good, slow, wrong = (jobs[f"{name}-none-cpu"] for name in ("good", "slow", "wrong"))
    assert good["ok"], good
    assert good["digest"] == load_manifest(pipeline / "production/good-none-cpu").digest()
    assert [check["name"] for check in slow["checks"] if not check["ok"]] == ["decode tokens/s"]
    assert wrong["code"] == 4 and "fault-swap-gate-up" in wrong["error"]
    assert not (pipeline / "out/wrong-none-cpu").exists()
    text = (pipeline / "out/summary.md").read_text("utf-8")
    assert text.startswith("# nightly: 2 of 3 failed")
    assert "fault-swap-gate-up" in text and "decode tokens/s" in text
    suites = ElementTree.parse(pipeline / "out/junit.xml").getroot()
    assert [suite.attrib["failures"] for suite in suites] == ["0", "1", "1"]
    # Again, with a registry that is not there: all that was finished comes out of the cache.
    (pipeline / "pipeline.toml").write_text(
        PIPELINE.replace(', "slow.toml", "wrong.toml"', "").partition("[[change]]")[0]
        + '[ship]\npush = "127.0.0.1:1/x"\n'
    )
    done = ingot("ci", pipeline / "pipeline.toml", "--json", "--cache-dir", pipeline / "cache", timeout=1200)
    assert done.returncode == 5, done.stderr
    [again] = json.loads(done.stdout)["jobs"]
    assert "not shipped" in again["error"] and "127.0.0.1:1" in again["error"]
    assert again["from_cache"] and not again["rebuilt"]
    assert load_manifest(pipeline / "out/good-none-cpu").digest() == good["digest"]


@pytest.mark.parametrize("text", ["", 'name = "x"\n[matrix]\nrecipes = ["no.toml"]\n[ship]\nkey = "no.pem"\n'])
def test_a_broken_pipeline_exits_with_2_before_any_work(tmp_path: Path, ingot: Ingot, text: str) -> None:
    (tmp_path / "pipeline.toml").write_text(text)
    done = ingot("ci", tmp_path / "pipeline.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.toml"]
