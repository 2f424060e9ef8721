"""`python -m ingot.benchmarks`: measure the machine, then every model, print the tables, keep the JSON.

Exit codes: 0 all that was asked for was measured or skipped with a reason, 2 usage, 5 a model failed, 130 interrupted
(what is finished is printed and kept all the same). Goals not reached are reported, not failed.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..artifacts.errors import IngotError, ResourceError, UsageError
from .bandwidth import read_bandwidth
from .builds import stories_folder
from .goals import summarize
from .machine import ROOT, commit, describe_machine, versions
from .results import Report
from .run import Options, begin, measure
from .subjects import SUBJECTS, Subject, choose
from .table import render

_PEERS = ("transformers", "none")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    try:
        subjects = choose(args.models, args.quick)
        peers = tuple(p for p in args.peers if p != "none")
        repetitions = args.repetitions or (2 if args.quick else 5)
        if repetitions < 1:
            raise UsageError(f"--repetitions {repetitions} measures nothing", "", "give 1 or more")
        options = Options(args.artifacts, stories_folder(args.stories), peers, repetitions, args.rebuild)
    except IngotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    head, changed = commit()
    command = ["python", "-m", "ingot.benchmarks", *words]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    report = Report(created, head, changed, command, repetitions, describe_machine(), versions())
    target = _target(args.json)
    try:
        run_all(report, subjects, options, args.quick, target)
    except KeyboardInterrupt:
        report.interrupted = True
    _finish(report, target)
    print(render(report), end="")
    if target:
        again = f"python -m ingot.benchmarks.table {shlex.quote(str(target))}"
        print(f"\nwrote {target}; drawn again by: {again}", file=sys.stderr)
    if report.interrupted:
        return 130
    return ResourceError.exit_code if any(m.failed for m in report.models) else 0


def run_all(report: Report, subjects: Sequence[Subject], options: Options, quick: bool, target: Path | None) -> None:
    """Measure everything into `report`, with the read bandwidth before the first and after each model."""
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", file=sys.stderr, flush=True)

    say("read bandwidth")
    report.add_reads(read_bandwidth(quick))
    for subject in subjects:
        report.models.append(begin(subject))
        measure(subject, report.models[-1], options, say)
        if report.models[-1].skipped:
            say(f"{subject.name}: skipped")
            continue
        if report.models[-1].failed:
            say(f"{subject.name}: failed: {report.models[-1].failed}")
        report.add_reads(read_bandwidth(quick))
        _finish(report, target)


def _finish(report: Report, target: Path | None) -> None:
    """Bring what is derived up to date, and keep it: an hour's run must not be lost to what comes after it."""
    for model in report.models:
        summarize(model, report.read_gb_s, report.machine.l3_bytes)
    if target:
        report.write(target)


def _target(given: str | None) -> Path | None:
    """Where the JSON goes: a path as it is given; a bare name is one in benchmarks/results."""
    if given is None:
        return None
    path = Path(given)
    return ROOT / "benchmarks" / "results" / f"{given}.json" if path.name == given and path.suffix != ".json" else path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ingot.benchmarks", description="Measure Ingot and its peers in one run.", allow_abbrev=False
    )
    names = ", ".join(s.name for s in SUBJECTS)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help=f"some of: {names} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few tokens, 2 repetitions, no large model unless named")
    parser.add_argument("--json", metavar="FILE", help="keep the results; a NAME means benchmarks/results/NAME.json")
    parser.add_argument("--repetitions", type=int, metavar="N", help="default 5")
    parser.add_argument(
        "--artifacts", type=Path, default=Path("artifacts/built"), metavar="DIR", help="default: artifacts/built"
    )
    parser.add_argument("--rebuild", action="store_true", help="build every artifact, to measure the builds")
    parser.add_argument("--stories", type=Path, metavar="DIR", help="the folder of stories260K")
    parser.add_argument("--peers", nargs="+", choices=_PEERS, default=["transformers"], help="default: transformers")
    return parser


if __name__ == "__main__":
    # Whoever ends the harness politely gets what is finished, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
