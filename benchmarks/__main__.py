"""`python -m ingot.benchmarks`: measure the machine, then every model, print the tables, keep the JSON.

Exit codes: 0 all that was asked for was measured, or left out with a reason, 2 usage, 5 a model failed, 130 interrupted
(what is finished is printed and kept all the same). Goals not reached are reported, not failed.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..artifacts.errors import IngotError, ResourceError
from .bandwidth import read_bandwidth
from .command_line import Asked, understand
from .goals import summarize
from .gpu_ceilings import gpu_ceilings
from .gpu_run import measure_gpu
from .machine import commit, describe_machine, versions
from .results import Report
from .run import Say, begin, measure
from .table import render

_LEAST_S = 15.0  # what measuring the ceilings once more must leave room for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        asked = understand(words)
        report = _report(asked, ["python", "-m", "ingot.benchmarks", *words])
    except IngotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        run_all(report, asked)
    except KeyboardInterrupt:
        report.interrupted = True
    _finish(report, asked.target)
    print(render(report), end="")
    if asked.target:
        again = f"python -m ingot.benchmarks.table {shlex.quote(str(asked.target))}"
        print(f"\nwrote {asked.target}; drawn again by: {again}", file=sys.stderr)
    if report.interrupted:
        return 130
    return ResourceError.exit_code if any(m.failed for m in report.models) else 0


def run_all(report: Report, asked: Asked) -> None:
    """Measure everything into `report`, with the ceilings before the first model and again behind."""
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", file=sys.stderr, flush=True)

    gpu = asked.device == "cuda"
    _ceilings(report, asked, say)
    for subject in asked.subjects:
        model = next((m for m in report.models if m.name == subject.name), None)
        if model is None:
            model = begin(subject)
            report.models.append(model)
        (measure_gpu if gpu else measure)(subject, model, asked.options, say)
        if model.skipped:
            say(f"{subject.name}: skipped")
            continue
        if model.failed:
            say(f"{subject.name}: failed: {model.failed}")
        if not gpu:  # a GPU has no neighbours, and starting torch for it takes longer than a model's test
            _ceilings(report, asked, say)
        _finish(report, asked.target)
    if gpu and asked.options.budget.left > _LEAST_S:
        _ceilings(report, asked, say)


def _ceilings(report: Report, asked: Asked, say: Say) -> None:
    if asked.device == "cpu":
        say("read bandwidth")
        report.add_reads(read_bandwidth(asked.quick))
        return
    say("read bandwidth and matmul rate of the GPU")
    found = gpu_ceilings(asked.quick, max(asked.options.budget.left, _LEAST_S))
    if found.problem:
        say(f"the GPU's ceilings: {found.problem}")
    if found.gpu:
        found.describe(report.machine)
    report.add_reads(found.reads)
    report.add_matmuls(found.matmuls)


def _report(asked: Asked, command: list[str]) -> Report:
    """A new report, or the one that is to be completed: of this very commit, and the same number of repetitions.

    Raises:
        UsageError: the file is no report.
    """
    head, changed = (asked.commit, False) if asked.commit else commit()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    repetitions = asked.options.repetitions
    report = Report(created, head, changed, command, repetitions, describe_machine(), versions())
    if asked.resume and asked.target and asked.target.is_file():
        earlier = Report.from_json(asked.target.read_bytes(), str(asked.target))
        if (earlier.commit, earlier.repetitions, earlier.machine.cpu) == (head, repetitions, report.machine.cpu):
            report.models, report.reads, report.matmuls = earlier.models, earlier.reads, earlier.matmuls
        else:
            why = "its file is of another commit, machine or number of repetitions"
            print(f"--resume: {why}; everything is measured anew", file=sys.stderr)
    return report


def _finish(report: Report, target: Path | None) -> None:
    """Bring what is derived up to date, and keep it: an hour's run must not be lost to what comes after it."""
    for model in report.models:
        summarize(model, report.limits(model.device))
    if target:
        report.write(target)


if __name__ == "__main__":
    # Whoever ends the harness politely gets what is finished, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
