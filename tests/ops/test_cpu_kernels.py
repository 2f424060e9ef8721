"""The build of the kernels library: what it does when the compiler is missing, fails, crashes or hangs."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from ingot.artifacts.errors import ResourceError, UsageError
from ingot.compiler.backends import cpu_kernels
from ingot.compiler.backends.cpu_kernels import C_SHIMS, compile_kernels, kernels_soname


def compiler(folder: Path, script: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "script,message",
    [
        ("echo 'fatal error: no such header' >&2; exit 1", "no such header"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("sleep 60 & wait", "more than 1 s"),
        ("yes 'warning: unused'", "more than 16 MiB of messages"),
    ],
)
def test_a_compiler_that_fails_is_reported_and_leaves_nothing_behind(tmp_path, monkeypatch, script, message):
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    output = tmp_path / "out" / "kernels.so"
    output.parent.mkdir()
    with pytest.raises(ResourceError, match=message) as caught:
        compile_kernels(output, timeout=1)
    assert caught.value.fix
    assert list(output.parent.iterdir()) == []


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match="no-such-compiler") as caught:
        compile_kernels(tmp_path / "kernels.so")
    assert "install g++" in caught.value.fix


def test_an_unknown_instruction_set_is_refused(tmp_path):
    with pytest.raises(UsageError, match="sse9"):
        compile_kernels(tmp_path / "kernels.so", isa="sse9")


def test_every_declared_op_is_exported(kernels):
    for name, declarations in C_SHIMS.items():
        assert f"aoti_torch_cpu_{name}(" in declarations[0]
        assert isinstance(getattr(kernels.library, f"aoti_torch_cpu_{name}"), ctypes._CFuncPtr)  # type: ignore[attr-defined]


def test_the_soname_follows_the_source(kernels, tmp_path, monkeypatch):
    dynamic = subprocess.run(["readelf", "-d", kernels.library._name], capture_output=True, text=True).stdout
    assert f"[{kernels_soname()}]" in dynamic
    names = {kernels_soname(isa=i, with_shim=s) for i in ("native", "portable") for s in (True, False)}
    assert len(names) == 4
    for path in cpu_kernels.SOURCE_FOLDER.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cpu_kernels, "SOURCE_FOLDER", tmp_path)
    assert kernels_soname() in names
    with (tmp_path / "linear.cpp").open("a") as file:
        file.write("// changed\n")
    assert kernels_soname() not in names
