"""The target check names every reason, from text of /proc/cpuinfo and package metadata, and imports nothing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts import target as module
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.manifest import Target
from ingot.artifacts.target import check_target, cpu_flags, host_target, require_target

HOST = Target("cpu", "linux", "x86_64", ("avx2", "fma", "f16c"), "none", "2.13.1+cpu")


def cpuinfo(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "cpuinfo").write_text("\n".join(lines) + "\n")
    return tmp_path / "cpuinfo"


def test_flags_are_those_all_processors_share(tmp_path: Path) -> None:
    file = cpuinfo(
        tmp_path, "flags\t\t: fpu avx2 fma avx512f", "model name : x", "flags\t\t: fpu avx2 fma", "bugs: avx"
    )
    assert cpu_flags(file) == {"fpu", "avx2", "fma"}
    assert host_target(file).isa == ("avx2", "fma")


def test_arm_and_systems_that_do_not_tell(tmp_path: Path) -> None:
    assert host_target(cpuinfo(tmp_path, "Features\t: fp asimd sve2")).isa == ("asimd", "sve2")
    assert host_target(tmp_path / "none").isa == ()
    (tmp_path / "cpuinfo").write_bytes(b"flags: avx2 \xff\xfe\n")
    assert host_target(tmp_path / "cpuinfo").isa == ("avx2",)


def test_this_machine_fits_itself() -> None:
    assert check_target(host_target()) == []
    require_target(host_target(), "the artifact")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "npu"}, ["npu", "cpu and cuda"]),
        ({"system": "darwin"}, ["darwin", "linux"]),
        ({"machine": "aarch64"}, ["aarch64", "x86_64"]),
        ({"isa": ("avx2", "amx_tile", "avx512f")}, ["amx_tile, avx512f"]),
        ({"isa": ("not_a_flag",)}, ["not_a_flag"]),
        ({"host_library": "libtorch", "torch": "2.12.0"}, ["2.12", "2.13.1", 'pip install "torch==2.12.*"']),
    ],
)
def test_each_reason_is_named(change: dict[str, Any], words: list[str]) -> None:
    [reason] = check_target(dataclasses.replace(HOST, **change), HOST)
    assert all(word in reason for word in words)


def test_torch_matters_only_to_engines_linked_against_it() -> None:
    wants = dataclasses.replace(HOST, host_library="libtorch", torch="2.13.0")
    assert check_target(wants, HOST) == []
    [reason] = check_target(wants, dataclasses.replace(HOST, torch=""))
    assert "not installed" in reason
    assert 'pip install "torch==2.13.*"' in reason
    assert check_target(dataclasses.replace(HOST, torch="1.0"), HOST) == []
    # 2.1 is not the beginning of 2.13
    assert check_target(dataclasses.replace(wants, torch="2.1.0"), HOST)


def test_all_reasons_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert module.torch_version() == ""
    alien = Target("npu", "plan9", "mips", ("msa",), "libtorch", "9.9")
    assert len(check_target(alien)) == 4
    with pytest.raises(VerificationError) as caught:
        require_target(alien, "the artifact demo")
    assert "demo" in caught.value.what
    assert all(word in caught.value.why for word in ("npu", "plan9", "mips", "torch 9.9"))


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import ingot.artifacts.store as s; s.check_target; from ingot.artifacts.target import *;"
        "check_target(host_target());"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'tokenizers', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
