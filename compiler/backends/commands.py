"""Runs the C++ compiler: bounded in time and in what it may say, and stopped with all that it started.

What it makes must not depend on where it ran: the paths of sources and headers are mapped to constant ones, and the
build id, which covers what is stripped later, is left out.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...artifacts.errors import ResourceError

ENGINE_TIMEOUT_S = 1800.0
_MOST_OUTPUT_BYTES = 16 << 20
_FIX = "a C++17 compiler with OpenMP is needed (g++ 11 or later); a killed compiler usually ran out of memory"


def reproducible(command: Sequence[str], paths: Mapping[str, str]) -> list[str]:
    """The command with flags under which no path gets into what it makes; `paths`: folder -> what stands for it."""
    link = ["-Wl,--build-id=none"] if "-shared" in command else []
    return [*command, *(f"-ffile-prefix-map={folder}={name}" for folder, name in paths.items()), *link]


def run_compiler(command: Sequence[str], what: str, timeout: float, cwd: str | Path | None = None) -> None:
    """Run one command of the compiler for at most `timeout` seconds; `what` says in errors what was compiled.

    Raises:
        ResourceError: there is no such compiler; it failed, crashed, took too long or said too much.
    """
    try:
        # A session of its own: a compiler that hangs is stopped together with the processes it started.
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise ResourceError(
            f"the C++ compiler {command[0]!r} could not be started", str(error),
            "install g++ (Debian: apt-get install g++), or set CXX to a compiler with OpenMP",
        ) from error  # fmt: skip
    try:
        said, ended = _listen(process, time.monotonic() + timeout)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    text = said.decode(errors="replace").strip()
    if ended == "time":
        raise ResourceError(
            f"{what}: the C++ compiler took more than {timeout:.0f} s and was stopped", shlex.join(command)[:2000],
            "check that the machine has memory and a free core, allow more (--engine-timeout), or set CXX to another",
        )  # fmt: skip
    if ended == "output":
        raise ResourceError(
            f"{what}: the C++ compiler wrote more than {_MOST_OUTPUT_BYTES >> 20} MiB of messages and was stopped",
            text[:2000], "set CXX to a working compiler",
        )  # fmt: skip
    if code := process.returncode:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"returned {code}"
        first = next((line for line in text.splitlines() if "error:" in line), "")
        raise ResourceError(
            f"{what} could not be compiled: the compiler {how}" + (f": {first[:300]}" if first else ""),
            f"{shlex.join(command)[:2000]}\n{text[-2000:]}", _FIX,
        )  # fmt: skip


def _listen(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, str]:
    """What the process says until it ends; and "time" or "output" where it was too long or too much."""
    said = bytearray()
    if process.stdout is None:
        return b"", ""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(said), "time"
            if not selector.select(left):
                continue
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            said += piece
            if len(said) > _MOST_OUTPUT_BYTES:
                return bytes(said), "output"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # it closed its output and goes on
        return bytes(said), "time"
    return bytes(said), ""


@contextlib.contextmanager
def inductor_compiler(what: str, timeout: float) -> Iterator[None]:
    """Inside, Inductor's runs of the compiler are ours: all of them together take at most `timeout` seconds."""
    import torch
    from torch._inductor import cpp_builder
    from torch._inductor.codecache import cache_dir

    deadline = time.monotonic() + timeout
    include = str(Path(torch.__file__).parent / "include")
    paths = {include: "torch", cache_dir(): "inductor"}

    def run(cmd_line: str, cwd: str) -> None:
        command = shlex.split(cmd_line)
        # Inductor names a source by a digest over paths, among others: `c…x.kernel.cpp` is just the kernel.
        named = {
            word: Path(word).name.partition(".")[2]
            for word in command
            if word.endswith((".kernel.cpp", ".wrapper.cpp"))
        }
        run_compiler(reproducible(command, {**paths, **named}), what, max(1.0, deadline - time.monotonic()), cwd)

    kept = cpp_builder.run_compile_cmd
    cpp_builder.run_compile_cmd = run
    try:
        yield
    finally:
        cpp_builder.run_compile_cmd = kept
