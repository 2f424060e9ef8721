"""`ingot doctor`: what is found, what follows from it, and that nothing heavy is imported to say so."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts.cuda_probe import CudaHost
from ingot.compiler import cli, doctor

H100 = CudaHost("", 1, (9, 0), "NVIDIA H100", "13.0", (12, 8))
Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Doctor:
    """The command's exit code and its JSON."""

    def call(*words: str) -> tuple[int, dict[str, Any]]:
        code = cli.main(["doctor", "--json", "--cache-dir", str(tmp_path / "cache"), *words])
        return code, json.loads(capsys.readouterr().out)

    return call


def found(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(finding for finding in report["findings"] if finding["name"] == name)


def test_this_machine_runs_and_builds_for_the_cpu(examine: Doctor) -> None:
    code, report = examine()
    assert (code, report["able"]["run"], report["able"]["build"]) == (0, True, True)


@pytest.mark.parametrize(
    ("host", "lost"),
    [
        (CudaHost("there is no NVIDIA driver"), {"NVIDIA driver"}),
        (CudaHost("", 0, bindings="13.0", driver=(12, 8)), {"GPU"}),
        (CudaHost("", 1, (9, 0), "NVIDIA H100", "13.0", (12, 2)), {"NVIDIA driver"}),
        (CudaHost("", 1, (8, 0), "NVIDIA A100", "13.0", (12, 8)), {"GPU"}),
        (H100, set()),
    ],
)
def test_what_a_gpu_lacks_is_named(
    examine: Doctor, monkeypatch: pytest.MonkeyPatch, host: CudaHost, lost: set[str]
) -> None:
    monkeypatch.setattr(doctor, "probe_cuda", lambda: host)
    monkeypatch.setattr(doctor.toolchain, "versions", lambda *names: {"torch": "2.11.0+cu130"})
    code, report = examine("--needs", "build-cuda")
    missing = {f["name"] for f in report["findings"] if f["status"] == "missing" and "build-cuda" in f["needed_for"]}
    assert missing - {"triton", "cuda-bindings"} == lost  # these two depend on the machine that tests
    assert (code == 0) == (not missing)
    assert all(f["fix"] for f in report["findings"] if f["status"] == "missing")
    if host.compute == (8, 0):
        assert report["able"]["run-cuda"] or missing & {"cuda-bindings"}, "older GPUs run what was built for them"


def test_a_compiler_that_does_not_work_is_found_by_trying(
    examine: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo g++ 99 && exit 0\necho error: no headers >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    code, report = examine()
    assert (code, report["able"]["build"], report["able"]["run"]) == (5, False, True)
    assert "no headers" in found(report, "C++ compiler")["found"]
    assert examine("--needs", "run")[0] == 0


@pytest.mark.parametrize(("version", "status"), [("2.10.1", "missing"), ("2.11", "ok"), ("3.0.0+cpu", "ok")])
def test_versions_are_compared_as_numbers(
    examine: Doctor, monkeypatch: pytest.MonkeyPatch, version: str, status: str
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else real(name))
    assert found(examine()[1], "torch")["status"] == status


def test_a_cache_folder_that_is_refused_is_told(examine: Doctor, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "build").mkdir()
    (tmp_path / "cache" / "build").chmod(0o777)
    code, report = examine()
    assert (code, found(report, "build cache")["status"]) == (0, "low")
    assert "others can write" in found(report, "build cache")["found"]


def test_the_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    for name, least, extra, _ in doctor.PACKAGES:
        assert f"{name}>={least}" in extras[extra]
    assert any(re.match(rf"triton>={re.escape('3.6')}", item) for item in extras["dev"])


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from ingot.compiler import cli; cli.main(['doctor', '--cache-dir', sys.argv[1]]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'triton')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "can    build for the CPU" in done.stdout
