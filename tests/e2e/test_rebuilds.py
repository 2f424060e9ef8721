"""Builds out of the cache, killed and disturbed builds, and equal builds on unequal machines."""

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
from typing import Any

import pytest
from ingot.artifacts.manifest import load_manifest
from ingot.artifacts.store import check

from ..conftest import Demo
from .fault_table import FAULTS, HEAD, SIGNALS, compile_shim

Ingot = Callable[..., subprocess.CompletedProcess[str]]


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """ "stage item" -> hit, miss or off."""
    assert done.returncode == 0, done.stderr
    return {f"{step['stage']} {step['item']}".strip(): step["outcome"] for step in json.loads(done.stdout)["cache"]}


# --- what a change makes anew ----------------------------------------------------------------------------------------


def test_an_unchanged_build_imports_no_torch_and_gives_the_same(demo: Demo, tmp_path: Path) -> None:
    code = (
        "import sys; from ingot.compiler import cli; code = cli.main(sys.argv[1:]);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    words = ["build", str(demo.recipe), "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert set(outcomes(done).values()) == {"hit"}
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (demo.artifact / "manifest.json").read_bytes()
    assert check(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("setting", "made"),
    [
        ("name=other", set()),
        ("gate.max_tokens=5", {"gate"}),
        ("gate.task_exact_match=0.5", set()),
        ("decode_batch_sizes=[4]", {"gate", "speed"}),
        ('passes.skip=["fuse-linear"]', {"trace"}),  # it acts for CUDA alone: the graphs are the same
    ],
)
def test_a_change_makes_what_depends_on_it(
    demo: Demo, ingot: Ingot, tmp_path: Path, setting: str, made: set[str]
) -> None:
    done = ingot("build", demo.recipe, "-o", tmp_path / "out", "--set", setting, "--json", "--explain")
    found = outcomes(done)
    assert {name.split()[0] for name, outcome in found.items() if outcome == "miss"} == made
    for step in json.loads(done.stdout)["cache"]:
        assert bool(step["why"]) == (step["outcome"] == "miss")


def test_one_more_batch_size_compiles_one_engine(demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    words = ("--set", "decode_batch_sizes=[1,2,4]", "--json")
    found = outcomes(ingot("build", demo.recipe, "-o", tmp_path / "out", *words))
    missed = {name for name, outcome in found.items() if outcome == "miss"}
    assert missed == {"trace decode-b2", "engine decode-b2", "gate", "speed"}


def test_the_explanation_names_the_recipe_key(demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    done = ingot("build", demo.recipe, "-o", tmp_path / "out", "--set", "gate.max_tokens=6", "--explain")
    assert done.returncode == 0, done.stderr
    assert any("recipe.gate.max_tokens: " in line and "→ 6" in line for line in done.stdout.splitlines())


# --- builds that are stopped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_build_goes_on_where_it_was(demo: Demo, ingot: Ingot, tmp_path: Path, number: signal.Signals) -> None:
    compiler = tmp_path / "slow-compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo slow && exit 0\nexec sleep 60\n')
    compiler.chmod(0o755)
    words = ["build", str(demo.recipe), "-o", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "ingot.compiler.cli", *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "CXX": str(compiler)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        for line in process.stderr or ():
            if "compile engines: kernels" in line:
                break
        time.sleep(0.3)
        process.send_signal(number)
        err = (process.stderr or sys.stdin).read()
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    assert "Traceback" not in err
    listed = json.loads(ingot("cache", "ls", "--json", "--cache-dir", tmp_path / "cache").stdout)["entries"]
    assert sorted(entry["stage"] for entry in listed) == ["trace", "trace", "trace", "weights"]
    # Built again with a compiler that fails at once: up to there everything is found, so torch is not needed.
    compiler.write_text("#!/bin/sh\nexit 1\n")
    code = "import sys; from ingot.compiler import cli; print(cli.main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False,
        env={**os.environ, "CXX": str(compiler)},
    )  # fmt: skip
    assert done.stdout == "5 False\n", done.stderr


def test_a_second_build_of_one_output_is_refused(demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    from ingot.artifacts.writer import ArtifactWriter

    with ArtifactWriter(tmp_path / "out"):
        done = ingot("build", demo.recipe, "-o", tmp_path / "out")
    assert done.returncode == 5
    assert f"it is process {os.getpid()}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_builds_at_once_of_one_recipe_give_equal_results(demo: Demo, tmp_path: Path) -> None:
    """Of the stages only the gate is not in the session's cache yet; one of the eight runs it."""
    words = [sys.executable, "-m", "ingot.compiler.cli", "build", str(demo.recipe), "--json"]
    words += ["--set", "gate.max_tokens=3"]
    builds = [
        subprocess.Popen([*words, "-o", str(tmp_path / f"out{i}")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(8)
    ]
    steps: list[dict[str, Any]] = []
    for build in builds:
        out, err = build.communicate(timeout=300)
        assert build.returncode == 0, err
        steps += json.loads(out)["cache"]
    assert [step["stage"] for step in steps if step["outcome"] == "miss"] == ["gate"]
    assert len({load_manifest(tmp_path / f"out{i}").digest() for i in range(8)}) == 1


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the shim is Linux's")
def test_faults_at_some_calls_leave_the_old_or_the_new(demo: Demo, tmp_path: Path) -> None:
    """A sample of the table that `make faults` prints in full."""
    shutil.copytree(demo.recipe.parent, tmp_path / "demo")
    environment = {**os.environ, "LD_PRELOAD": str(compile_shim(tmp_path))}
    command = [sys.executable, "-m", "ingot.tests.e2e.fault_table", "--prepared", str(tmp_path)]
    command += ["--step", "61", "--random", "1", "--only", "cold/old"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("cold", "warm"))]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == len(FAULTS) + len(SIGNALS), HEAD


# --- equal builds on unequal machines --------------------------------------------------------------------------------


def test_compiled_code_holds_no_path_and_is_the_same_elsewhere(demo: Demo, tmp_path: Path) -> None:
    """Another folder, home, time zone, user, umask, hash seed and cache of the compiler's: the same digests."""
    copy = tmp_path / "elsewhere" / "deep"
    subprocess.run(["cp", "-r", str(demo.recipe.parent), str(copy.parent)], check=True)
    environment = {
        **os.environ, "HOME": str(tmp_path / "home"), "TZ": "Asia/Tokyo", "USER": "somebody", "PYTHONHASHSEED": "7",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TMPDIR": str(tmp_path), "LANG": "C",
    }  # fmt: skip
    words = ["build", str(copy.parent / "recipe.toml"), "-o", str(tmp_path / "out"), "--no-cache"]
    done = subprocess.run(
        [sys.executable, "-m", "ingot.compiler.cli", *words], env=environment, capture_output=True, text=True,
        timeout=600, check=False, umask=0o077,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out").digest() == load_manifest(demo.artifact).digest()
    for path in (tmp_path / "out" / "engines").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert b"site-packages" not in path.read_bytes(), path
