"""Builds that fail, and builds of the same again: the old artifact or the new one, whole, and nothing beside it.

Most find what they need in the session's build cache; those that build without it take the session's engines in place
of compiling them anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from ingot.artifacts.manifest import load_manifest
from ingot.artifacts.store import check
from ingot.compiler import accuracy, accuracy_facts, build, cli
from ingot.compiler.backends import aoti, cpu_kernels
from ingot.compiler.facts import BuildFacts
from ingot.runtime import LLM, SamplingParams
from safetensors.torch import load_file, save_file

from ..conftest import Demo

Ingot = Callable[..., CompletedProcess[str]]
Cli = Callable[..., tuple[int, str, str]]
Snapshot = dict[str, tuple[int, bytes]]


def snapshot(folder: Path) -> Snapshot:
    """Every file below a folder, hidden ones too, with its time of change and its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def compiled(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the session's kernels and engines in the place of compiling. Only for the demo's recipe."""
    constants = {engine.name: engine.constants for engine in load_manifest(demo.artifact).engines}

    def compile_engine(traced: Any, name: str, output: Path, *args: Any, **options: Any) -> Any:
        shutil.copyfile(demo.artifact / "engines" / f"{name}.so", output)
        return constants[name]

    def compile_kernels(output: Path, **options: Any) -> None:
        shutil.copyfile(demo.artifact / "engines" / output.name, output)

    monkeypatch.setattr(aoti, "compile_engine", compile_engine)
    monkeypatch.setattr(cpu_kernels, "compile_kernels", compile_kernels)


# --- what is refused at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--force",)], ids=["plain", "force"])
def test_a_folder_that_is_no_artifact_is_never_touched(
    demo: Demo, ingot: Ingot, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    done = ingot("build", demo.recipe, "-o", tmp_path / "mine", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no artifact" in done.stderr
    assert "fix:" in done.stderr
    assert snapshot(tmp_path) == before


def test_a_build_into_its_own_model_is_refused(demo: Demo, ingot: Ingot) -> None:
    before = snapshot(demo.model)
    for output in (demo.model, demo.model / "out", demo.model.parent):
        assert ingot("build", demo.recipe, "-o", output, "--force").returncode == 2
    assert snapshot(demo.model) == before


# --- the gate, the task, and engines that do not run -----------------------------------------------------------------


def test_a_failing_gate_leaves_the_old_artifact(demo: Demo, main: Cli, compiled: None, tmp_path: Path) -> None:
    old = demo.copy(tmp_path / "out")
    before = snapshot(tmp_path)
    code, out, err = main("build", demo.recipe, "-o", old, "--set", "gate.budgets.max_relative_error=0")
    assert (code, out) == (4, "")
    assert "the numeric gate failed: engine " in err
    assert "max relative error" in err
    assert "0.00e+00" in err
    assert "fix:" in err
    assert snapshot(tmp_path) == before


def test_a_task_that_falls_short_fails_the_build(demo: Demo, main: Cli, compiled: None, tmp_path: Path) -> None:
    shutil.copytree(demo.model, tmp_path / "model")
    shutil.copy(demo.recipe, tmp_path)
    line = {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "certainly 4"}
    (tmp_path / "task.jsonl").write_text(json.dumps(line) + "\n")
    before = snapshot(tmp_path)
    code, _, err = main("build", tmp_path / "recipe.toml", "-o", tmp_path / "out", "--set", "gate.task=task.jsonl")
    assert code == 4
    assert "the task falls short: 0.0% of 1 answers match" in err
    assert "certainly 4" in err
    assert snapshot(tmp_path) == before


def test_an_engine_that_crashes_is_told_by_its_signal(
    demo: Demo, main: Cli, compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "crash.cpp"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) static void crash(void) { abort(); }\n")

    def compile_kernels(output: Path, **options: Any) -> None:
        compiler = os.environ.get("CXX", "g++").split()
        subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(output)], check=True)

    monkeypatch.setattr(cpu_kernels, "compile_kernels", compile_kernels)
    code, _, err = main("build", demo.recipe, "-o", tmp_path / "out", "--no-cache")
    assert code == 5
    assert "SIGABRT" in err
    assert not (tmp_path / "out").exists()


def test_no_compiler_is_one_clear_error(demo: Demo, main: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = main("build", demo.recipe, "-o", tmp_path / "out")
    assert (code, out) == (5, "")
    assert "no-such-compiler" in err
    assert "fix:" in err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(demo: Demo, main: Cli, compiled: None, tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo.model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    code, _, err = main("build", demo.recipe, "--model", model, "-o", tmp_path / "out")
    assert code == 2
    assert name in err
    assert "NaN or infinity" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- building the same again -----------------------------------------------------------------------------------------


def test_the_same_build_gives_the_same_digest(demo: Demo, main: Cli, compiled: None, tmp_path: Path) -> None:
    code, out, _ = main("build", demo.recipe, "-o", tmp_path / "out", "--json", "--no-cache")
    assert code == 0
    assert json.loads(out)["digest"] == load_manifest(demo.artifact).digest()
    assert check(tmp_path / "out") == []


def test_another_build_replaces_the_old_artifact(demo: Demo, main: Cli, compiled: None, tmp_path: Path) -> None:
    old = demo.copy(tmp_path / "out")
    first = load_manifest(old).digest()
    assert main("build", demo.recipe, "-o", old, "--set", "gate.max_tokens=4")[0] == 0
    assert load_manifest(old).digest() != first
    assert check(old) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lossy_build_says_what_it_lost(
    demo: Demo, main: Cli, compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's own engines, taken for lossy ones: the report is in the artifact, and a loss too large fails."""
    monkeypatch.setattr(BuildFacts, "lossy", True)
    size = ("--set", "gate.accuracy_tokens=100")
    code, out, _ = main("build", demo.recipe, "-o", tmp_path / "out", *size)
    assert code == 0
    assert "accuracy of float32 against transformers eager float32, 100 tokens of accuracy.txt" in out
    assert "perplexity ratio" in out
    manifest = load_manifest(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "report" / "accuracy.json").read_text())
    assert manifest.gate["accuracy"] == accuracy_facts.summary(stored)
    assert stored["engine"]["tokens"] == 100
    assert check(tmp_path / "out") == []
    before = snapshot(tmp_path)

    def lossy(*args: Any) -> dict[str, Any]:
        return {**stored, "engine": {**stored["engine"], "mean_kl": 0.5, "mean_kl_error": 0.1}}

    monkeypatch.setattr(accuracy, "measure", lossy)
    code, out, err = main("build", demo.recipe, "-o", tmp_path / "out", *size, "--set", "gate.budgets.mean_kl=0.2")
    assert (code, out) == (4, "")
    assert "the accuracy falls short: mean KL 3.00e-01 > 2.00e-01" in err
    assert "quantization.ignore" in err
    assert snapshot(tmp_path) == before


def test_build_and_generate_from_python(demo: Demo, compiled: None, tmp_path: Path) -> None:
    result = build(demo.recipe, tmp_path / "out", overrides=["gate.max_tokens=8"])
    assert (result.path, result.manifest.recipe["gate"]["max_tokens"]) == (tmp_path / "out", 8)
    assert {"engines", "gate"} <= result.stages.keys()
    with LLM(result.path) as llm, LLM(demo.artifact) as first:
        params = SamplingParams(temperature=0, max_tokens=8)
        assert llm.generate("Once", params)[0].outputs == first.generate("Once", params)[0].outputs


def test_dumped_graphs_tell_what_each_pass_did(demo: Demo, main: Cli, compiled: None, tmp_path: Path) -> None:
    assert main("build", demo.recipe, "-o", tmp_path / "out", "--dump-ir", tmp_path / "ir")[0] == 0
    names = [path.name for path in sorted((tmp_path / "ir").rglob("*")) if path.is_file()]
    assert any("insert-kv-cache" in name for name in names)
    assert not any("quantize" in name for name in names), "a pass that changed nothing leaves no dump"


# --- an interrupted build --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_build_leaves_the_old_artifact_and_nothing_else(
    demo: Demo, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    compiler = tmp_path / "slow-compiler"
    compiler.write_text("#!/bin/sh\nexec sleep 3\n")
    compiler.chmod(0o755)
    old = demo.copy(tmp_path / "out")
    before = snapshot(tmp_path)
    command = [sys.executable, "-m", "ingot.compiler.cli", "build", str(demo.recipe), "-o", str(old)]
    # A test run in the background ignores SIGINT, and its children would, too.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "CXX": str(compiler)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        lines = []
        for line in process.stderr or ():
            lines.append(line)
            if "compile engines: kernels" in line:
                break
        time.sleep(1)  # into the compiler's work
        assert len(list(tmp_path.iterdir())) == 3, "the build works beside the old artifact"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, "".join(lines) + err
    assert out == ""
    assert "Traceback" not in err
    assert snapshot(tmp_path) == before


def test_tests_run_on_one_thread() -> None:
    assert torch.get_num_threads() == 1
