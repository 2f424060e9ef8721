"""Child processes: workers that answer requests line by line, one-shot runs, and how much memory they took.

Every child gets a session of its own: an interrupt reaches the harness alone, which ends its children and still
prints what is finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..artifacts.errors import ResourceError
from .machine import core_count

_SAMPLE_S = 0.5  # between two looks at a build's memory: a look at gigabytes costs some 10 ms


def environment(extra: Mapping[str, str] | None = None, device: str = "cpu") -> dict[str, str]:
    """The environment of every child: as many threads as cores for ours and peers alike, no network, GPUs or none."""
    threads = {name: str(core_count()) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **threads, **quiet, **hidden, **(extra or {})}


class Worker:
    """A module of this package running as a child: one JSON request per line in, one JSON answer per line out."""

    def __init__(
        self, module: str, *arguments: str, device: str = "cpu", extra: Mapping[str, str] | None = None
    ) -> None:
        self._name = module.rpartition(".")[2]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(extra, device),
            start_new_session=True,
        )

    def ask(self, request: Mapping[str, Any], timeout: float = 1800.0) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            ResourceError: the worker died, took longer than `timeout` seconds, or reports an error.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ResourceError(f"{self._name} has no pipes", "", "")
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            ready, _, _ = select.select([stdout], [], [], timeout)
            line = stdout.readline() if ready else None
        except OSError:
            line = b""
        if line is None:
            raise ResourceError(f"{self._name}: no answer to {request.get('op')!r} within {timeout:.0f} s", "", "")
        if not line:
            raise ResourceError(f"{self._name} died", self._last_words(), "")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ResourceError(f"{self._name} failed", str(answer["error"]), "")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self._process)
        self._errors.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        return f"exit code {code}: {tail(self._errors.read())}"


def serve(handlers: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The worker's side: answer requests on stdin by their "op" until it is closed.

    What libraries print goes to stderr, so that stdout holds answers only.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = handlers[request["op"]](request)
            except Exception as error:  # noqa: BLE001 - whatever it is, the harness is told
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


@dataclass(frozen=True)
class Finished:
    """A child that ran to its end: exit code, output, seconds and memory (see results.Build for the two peaks).

    `timed_out`: it was ended because it took too long.
    """

    code: int
    stdout: str
    stderr: str
    started: float  # time.monotonic(), which all processes of a machine share
    seconds: float
    peak_bytes: int = 0
    largest_process_bytes: int = 0
    timed_out: bool = False


def run(
    command: Sequence[str],
    *,
    extra: Mapping[str, str] | None = None,
    watch_memory: bool = False,
    device: str = "cpu",
    timeout: float | None = None,
) -> Finished:
    """Run a command to its end, with its output kept; with `watch_memory` the memory of all its processes is sampled.

    After `timeout` seconds it is ended, and whatever it has started with it.

    `largest_process_bytes` is exact (the kernel's), `peak_bytes` the largest sample of the sum of proportional set
    sizes, in which memory shared between processes counts once.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(extra, device),
            start_new_session=True,
        )
        late = threading.Event()
        timer = threading.Timer(timeout, _cut_off, (process.pid, late)) if timeout is not None else None
        try:
            if timer is not None:
                timer.start()
            with _sampling(process.pid) if watch_memory else contextlib.nullcontext([0]) as peaks:
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.monotonic() - started
                process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if timer is not None:
                timer.cancel()
            end(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    largest = usage.ru_maxrss * 1024
    peak = max(peaks[0], largest)
    return Finished(process.returncode, texts[0], texts[1], started, seconds, peak, largest, late.is_set())


def _cut_off(session: int, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a child and whatever it has started, if it still runs."""
    if process.returncode is None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def tail(text: str | bytes, longest: int = 600) -> str:
    """The end of an output, for a message."""
    words = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
    words = words.strip()
    return words if len(words) <= longest else "…" + words[-longest:]


@contextlib.contextmanager
def _sampling(session: int) -> Iterator[list[int]]:
    """Keep the largest total memory of a session's processes in the one item of the list."""
    peaks, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLE_S):
            peaks[0] = max(peaks[0], session_bytes(session))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def session_bytes(session: int) -> int:
    """The sum of the proportional set sizes of all processes in a session."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # Behind the command's name, which may hold blanks: state, parent, group, session.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total
