"""Compilers that hang, crash, flood or fail: one error each, in time, and nothing of them goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ingot.artifacts.errors import ResourceError
from ingot.compiler.backends.commands import inductor_compiler, reproducible, run_compiler

CASES = [
    ("sleep 60", "engine e: the C++ compiler took more than 1 s"),
    ("exec 1>&- 2>&-; sleep 60", "took more than 1 s"),
    ("kill -SEGV $$", "killed by SIGSEGV"),
    ("yes", "more than 16 MiB of messages"),
    ("echo 'x.cpp:3: error: no such type' >&2; exit 3", "returned 3: x.cpp:3: error: no such type"),
]


@pytest.mark.parametrize(("script", "said"), CASES)
def test_what_a_compiler_can_do_wrong(tmp_path: Path, script: str, said: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        run_compiler(["sh", "-c", f"{script} # marked-{os.getpid()}"], "engine e", 1.0, tmp_path)
    assert said in caught.value.what
    assert len(str(caught.value)) < 10_000
    assert time.monotonic() - begin < 30
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert f"marked-{os.getpid()}" not in listed


def test_inductors_runs_of_the_compiler_are_bounded_and_hold_no_paths(tmp_path: Path) -> None:
    from torch._inductor import cpp_builder

    kept = cpp_builder.run_compile_cmd
    with inductor_compiler("engine e", 1.0), pytest.raises(ResourceError, match="engine e: "):
        cpp_builder.run_compile_cmd("sh -c 'sleep 60'", str(tmp_path))
    assert cpp_builder.run_compile_cmd is kept
    (tmp_path / "a.cpp").write_text("const char* where() { return __FILE__; }\n")
    with inductor_compiler("engine e", 60.0):
        cpp_builder.run_compile_cmd(f"g++ -shared -fPIC {tmp_path}/a.cpp -o {tmp_path}/a.so", str(tmp_path))
    assert (tmp_path / "a.so").is_file()


def test_no_path_gets_into_a_library(tmp_path: Path) -> None:
    made = []
    for name in ("one", "another/deeper"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "a.cpp").write_text("const char* where() { return __FILE__; }\n")
        command = ["g++", "-g", "-shared", "-fPIC", str(folder / "a.cpp"), "-o", str(folder / "a.so")]
        run_compiler(reproducible(command, {str(folder): "src"}), "a", 60)
        subprocess.run(["strip", "--strip-debug", str(folder / "a.so")], check=True)
        made.append((folder / "a.so").read_bytes())
    assert made[0] == made[1]
    assert b"src/a.cpp" in made[0]


def test_a_compiler_that_is_not_there() -> None:
    with pytest.raises(ResourceError, match="no-such-compiler"):
        run_compiler(["no-such-compiler"], "engine e", 1.0)


def test_ctrl_c_stops_the_compiler_too(tmp_path: Path) -> None:
    code = (
        "import sys; from ingot.compiler.backends.commands import run_compiler;"
        f"run_compiler(['sh', '-c', 'echo > {tmp_path}/begun; sleep 60 # ctrl-c-{os.getpid()}'], 'e', 60)"
    )
    # A test run in the background ignores SIGINT, and its children would, too.
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert f"ctrl-c-{os.getpid()}" not in listed
