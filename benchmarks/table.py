"""Draws a report as Markdown tables in llama-bench's manner: `python -m ingot.benchmarks.table FILE`.

The same text is printed after a run and pasted into docs/performance.md; columns are padded so that it also reads
well on a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..artifacts.errors import IngotError, UsageError
from .goals import in_cache, share
from .results import OURS, Goal, Model, Report, Series

_BUSY = 0.3  # load average per core beyond which somebody else is at work
_WORDS = {
    "ms_per_token": ("time per token", "ms"),
    "tokens_per_second": ("decode", "tok/s"),
    "start_s": ("start to first token", "s"),
    "read_share": ("share of the read bandwidth", "%"),
    "matmul_share": ("share of the matmul rate", "%"),
    "prefill_ms": ("prompt to first token", "ms"),
    "times gpt-fast": ("decode over gpt-fast", "×"),
    "build_s": ("build time", "s"),
    "build_peak_over_checkpoint": ("build memory over checkpoint", "×"),
}
_MS = "ms: of a decode step, the time per token of each row (TPOT); of a prompt, the time to its first token (TTFT)."
_SPEED = (
    *("model", "size", "params", "dtype", "engine", "test", "tok/s", "median", "ms"),
    *("needs", "per second", "of ceiling"),
)


def render(report: Report) -> str:
    """The whole report: machine, speed, start and memory, builds, goals, notes."""
    measured = [m for m in report.models if not m.skipped]
    parts = [_heading(report), "### Speed\n\n" + speed_table(report, measured), _MS]
    if any(m.find(OURS, "start") for m in measured):
        parts.append("### Process start to first token\n\n" + start_table(measured))
    if any(m.artifact_bytes for m in measured):
        parts.append("### Artifacts and builds\n\n" + build_table(measured))
    if any(m.goals for m in report.models):
        parts.append("### Goals\n\n" + goal_table(report.models))
    remarks = [f"- {m.name}: skipped: {m.skipped}" for m in report.models if m.skipped]
    remarks += [f"- {m.name}: failed: {_one_line(m.failed)}" for m in report.models if m.failed]
    remarks += [f"- {m.name}: {_one_line(note)}" for m in report.models for note in m.notes]
    if report.machine.load > _BUSY * report.machine.cores:
        remarks.append("- the machine was busy before the run began: these figures are no measurement of it")
    remarks += ["- the run was interrupted: what is missing was not measured"] if report.interrupted else []
    return "\n\n".join([*parts, *(["\n".join(remarks)] if remarks else [])]) + "\n"


def _heading(report: Report) -> str:
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)
    commit = f"commit {report.commit[:12]}{' (with changes)' if report.changed else ''}; " if report.commit else ""
    reads: dict[str, float] = {}
    for one in report.reads:
        reads[one.method] = max(reads.get(one.method, 0.0), one.gb_s)
    best = "; ".join(f"{method}: {gb_s:.1f}" for method, gb_s in reads.items())
    gpu = f"{machine.gpu}, {_size(machine.gpu_memory_bytes)}; " if machine.gpu else ""
    products = f"\nMatmul rate: **{report.matmul_tflop_s:.0f} TFLOP/s** (bfloat16)." if report.matmuls else ""
    return (
        f"{gpu}{machine.cpu}, {machine.cores} cores, {machine.threads} threads, {' '.join(machine.flags)}; "
        f"L3 {_size(machine.l3_bytes)}, memory {_size(machine.memory_bytes)}; load average before {machine.load:.2f}.\n"
        f"{report.created}; {commit}{versions}.\n"
        f"Read bandwidth: **{report.read_gb_s:.1f} GB/s** ({best}).{products}"
    )


def speed_table(report: Report, models: Sequence[Model]) -> str:
    """One row per engine and test: mean ± sd and median of the rate, what a step needs, its share of the ceiling."""
    rows, peers = [], _peers(models)
    for model in models:
        for series in model.series:
            if series.unit == "tok/s" and series.samples:
                rows.append(_speed_row(report, model, series, peers))
    return markdown((*_SPEED, *(f"× {peer}" for peer in peers)), rows, "lrrlllrrrrrr" + "r" * len(peers))


def _speed_row(report: Report, model: Model, series: Series, peers: Sequence[str]) -> list[str]:
    mine, limits = series.engine == OURS, report.limits(model.device)
    facts = ["", "", ""]
    if series.flops:
        facts = [f"{series.flops / 1e12:.2f} TFLOP", f"{series.tflop_s:.1f} TFLOP"]
    elif series.read_bytes:
        facts = [f"{series.read_bytes / 1e6:.1f} MB", f"{series.gb_s:.1f} GB"]
    part = share(series, limits)
    facts = [*facts[:2], "in cache" if in_cache(series, limits) else f"{part:.0%}" if part else ""]
    found = {r.peer: f"{r.median:.2f}" for r in model.ratios if mine and r.test == series.test and r.samples}
    facts += [found.get(peer, "") for peer in peers]
    kind = model.scheme if mine and model.scheme not in ("", "none") else model.dtype
    size = _size(model.weights_bytes if mine else model.checkpoint_bytes)
    time = f"{1000 / series.steps_per_second:.3f}" if series.steps_per_second else ""
    rate = f"{series.mean:.2f} ± {series.sd:.2f}"
    identity = [model.name, size, _count(model.parameters), kind, series.engine, series.test]
    return [*identity, rate, f"{series.median:.2f}", time, *facts]


def _peers(models: Sequence[Model]) -> list[str]:
    """The peers whose rates were compared, in the order they were measured."""
    rates = (s.engine for m in models for s in m.series if s.unit == "tok/s" and s.engine != OURS)
    return list(dict.fromkeys(rates))


def start_table(models: Sequence[Model]) -> str:
    """One row per engine: seconds and peak memory of a fresh process."""
    rows = []
    for model in models:
        for series in model.series:
            if series.test == "start" and series.samples:
                peak = next((s for s in model.series if (s.engine, s.test) == (series.engine, "peak")), None)
                mine = series.engine == OURS
                ratio = next((r for r in model.ratios if mine and r.test == "start" and r.samples), None)
                rows.append([
                    model.name, series.engine, f"{series.mean:.3f} ± {series.sd:.3f}", f"{series.median:.3f}",
                    f"{series.best:.3f}", _size(peak.median) if peak else "", f"{ratio.median:.1f}" if ratio else "",
                ])  # fmt: skip
    return markdown(("model", "engine", "s", "median", "best", "peak memory", "× transformers"), rows, "llrrrrr")


def build_table(models: Sequence[Model]) -> str:
    """One row per model: sizes, and what its build took."""
    rows = []
    for model in models:
        build = model.build
        known = build.seconds > 0
        over = build.peak_bytes / model.checkpoint_bytes if model.checkpoint_bytes else 0.0
        when = ("an earlier run" if build.reused else "this run") if known else "not measured"
        rows.append([
            model.name, _size(model.checkpoint_bytes), _size(model.weights_bytes), _size(model.artifact_bytes),
            f"{build.seconds:.1f}" if known else "", _size(build.peak_bytes) if known else "",
            f"{over:.2f}" if known else "", when,
        ])  # fmt: skip
    names = ("model", "checkpoint", "weights", "artifact", "build s", "build memory", "× checkpoint", "built in")
    return markdown(names, rows, "lrrrrrrl")


def goal_table(models: Sequence[Model]) -> str:
    """One row per goal: reached or not, first and then."""
    rows = []
    for model in models:
        for goal in model.goals:
            what, target, then, value = _goal_words(goal)
            reached = ("yes" if goal.reached else "no") if goal.known else "not measured"
            reached_then = ("yes" if goal.reached_then else "no") if goal.known and goal.then else ""
            rows.append([model.name, what, goal.test, target, value, reached, then, reached_then, goal.source])
    names = ("model", "goal", "test", "first", "measured", "reached", "then", "reached", "from")
    return markdown(names, rows, "lllrrlrll")


def _goal_words(goal: Goal) -> tuple[str, str, str, str]:
    """What, first target, second target, value."""
    words, unit = _WORDS.get(goal.what, (goal.what, ""))
    factor, digits = (100.0, 0) if unit == "%" else (1.0, 3 if unit in ("ms", "s") and goal.target < 10 else 1)
    digits = 2 if unit == "×" else digits
    relation = "≤" if goal.relation == "<=" else "≥"
    value = f"{goal.value * factor:.{digits}f} {unit}" if goal.known else ""
    then = f"{relation} {goal.then * factor:g} {unit}" if goal.then else ""
    return words, f"{relation} {goal.target * factor:g} {unit}", then, value


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table, padded; `align` has a letter, l or r, per column."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [list(names), *map(list, rows)]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(names))]
    rule = ["-" * (w - 1) + ":" if a == "r" else "-" * w for w, a in zip(widths, align, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _size(size: float) -> str:
    """Bytes in decimal units, as bandwidths are."""
    if not size:
        return ""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _count(number: int) -> str:
    units = ((10**9, "B"), (10**6, "M"), (10**3, "k"))
    return next((f"{number / n:.2f} {unit}" for n, unit in units if number >= n), str(number))


def _one_line(text: str) -> str:
    """`text` in one line that nothing in it can leave: what children print is not ours."""
    return "".join(c if c.isprintable() else " " for c in text)


def main(arguments: Sequence[str]) -> int:
    """Print the tables of a JSON file; the exit code is 0, or the error's."""
    try:
        if len(arguments) != 1:
            raise UsageError("one file is wanted", "", "python -m ingot.benchmarks.table benchmarks/results/NAME.json")
        try:
            text = Path(arguments[0]).read_bytes()
        except OSError as error:
            raise UsageError(f"{arguments[0]} cannot be read", str(error), "name a JSON file of the harness") from error
        print(render(Report.from_json(text, arguments[0])), end="")
    except IngotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
