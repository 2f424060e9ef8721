"""Runs a pipeline's builds, several at a time within memory, and judges each artifact against its baseline.

A build is `ingot build` in a process of its own, so that one that crashes ends alone; they share the build cache, whose
entries outlive a pipeline that was killed: the next run takes up what was finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.errors import IngotError, ResourceError, UsageError
from ...artifacts.manifest import load_manifest
from ..accuracy_facts import headline
from ..compare import Row, compare, median
from .pipeline import Baseline, Budgets, Job, Pipeline

Say = Callable[[str], None]
SPEEDS = ("decode tokens/s", "prefill tokens/s")


@dataclass
class Check:
    """One figure against its budget. `baseline` and `limit` are None where there is nothing to compare with."""

    name: str
    value: float | None
    baseline: float | None
    limit: float | None
    ok: bool


@dataclass
class Result:
    """What became of a job. `code` is the build's exit code; `why` the reasons for a stage that was made anew."""

    job: str
    recipe: str
    code: int = 0
    error: str = ""
    digest: str = ""
    seconds: float = 0.0
    rebuilt: list[str] = field(default_factory=list)
    from_cache: int = 0
    total_bytes: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Built, proved and within all budgets."""
        return not self.code and all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"ok": self.ok, **asdict(self)}


def build_all(pipeline: Pipeline, jobs: Sequence[Job], output: Path, cache: Path | None, say: Say) -> list[Result]:
    """Build all jobs into `output`/NAME; a failure is a result, and the others go on."""
    count = slots(pipeline.parallel, pipeline.memory_gb, available_bytes())
    say(f"{len(jobs)} artifacts, {count} at a time")
    with ThreadPoolExecutor(count, thread_name_prefix="ingot-ci") as pool:
        futures = [pool.submit(_build, job, output / job.name, cache, say) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def slots(parallel: int, memory_gb: float, available: int) -> int:
    """How many builds run at a time: as many as asked for, and as fit into the memory that is available (bytes).

    Raises:
        ResourceError: not even one fits.
    """
    if memory_gb <= 0:
        return parallel
    fitting = int(available / (memory_gb * 1e9))
    if fitting < 1:
        why = f"{available / 1e9:.1f} GB are available, and memory_gb asks for {memory_gb} for each"
        raise ResourceError("there is no room for one build", why, "close other programs, or lower memory_gb")
    return min(parallel, fitting)


def available_bytes() -> int:
    """Memory that new processes can have, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _build(job: Job, output: Path, cache: Path | None, say: Say) -> Result:
    command = [sys.executable, "-m", "ingot.compiler.cli", "build", str(job.recipe), "-o", str(output)]
    command += ["--json", "--explain", *(word for item in job.overrides for word in ("--set", item))]
    command += ["--plant", job.plant] if job.plant else []
    command += ["--cache-dir", str(cache)] if cache is not None else []
    say(f"{job.name}: building")
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = Result(job.name, str(job.recipe), code=done.returncode, seconds=time.monotonic() - begin)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line]
        start = next((i for i, line in enumerate(lines) if line.startswith("error: ")), max(0, len(lines) - 5))
        result.error = "\n".join(lines[start : start + 12]) or f"exit {done.returncode}"
        say(f"{job.name}: failed, exit {done.returncode}")
        return result
    facts = json.loads(done.stdout)
    result.digest, result.total_bytes = facts["digest"], facts["total_bytes"]
    result.accuracy = headline(facts["gate"])
    for step in facts["cache"]:
        if step["outcome"] == "hit":
            result.from_cache += 1
        else:
            reason = f" ({'; '.join(step['why'])})" if step["why"] else ""
            result.rebuilt.append(f"{step['stage']} {step['item']}".strip() + reason)
    say(f"{job.name}: built in {result.seconds:.0f} s, {result.from_cache} stages from the cache")
    return result


def judge(result: Result, artifact: Path, baseline: Baseline, folder: Path, budgets: Budgets, say: Say) -> None:
    """Compare a finished artifact with its baseline, both measured now, turn and turn about; fills `result.checks`."""
    if not baseline.folder:
        return
    before = folder / baseline.folder / result.job
    if not before.is_dir():
        result.notes.append(f"no baseline: {before} is not there")
        return
    try:
        if load_manifest(before).digest() == result.digest:
            result.notes.append("the same artifact as its baseline, so there is nothing to measure")
            return
        say(f"{result.job}: measuring against {before}")
        old, new = _measured(before, artifact, baseline)
        result.checks = checks(old, new, budgets)
        if any(not check.ok and check.name in SPEEDS for check in result.checks):
            say(f"{result.job}: slower, measuring again")
            for row, more in zip((old, new), _measured(before, artifact, baseline)):
                row.decode += more.decode
                row.prefill += more.prefill
            result.checks = checks(old, new, budgets)
        result.notes += [note for note in new.notes if note not in result.notes]
    except IngotError as error:
        result.code, result.error = error.exit_code, f"error: {error}"


def _measured(before: Path, artifact: Path, baseline: Baseline) -> tuple[Row, Row]:
    """Both artifacts, measured turn and turn about."""
    found = compare(
        [before, artifact], rounds=baseline.rounds, prompt=baseline.prompt or None, tokens=baseline.tokens or None,
        other_weights=True, trust=[*baseline.trust, "local"],
    )  # fmt: skip
    old, new = found.rows
    return old, new


def checks(old: Row, new: Row, budgets: Budgets) -> list[Check]:
    """Each figure of the new artifact against what the budget makes of the old one's."""
    made = [
        _least("decode tokens/s", new.decode, old.decode, budgets.decode * (1 - budgets.noise)),
        _least("prefill tokens/s", new.prefill, old.prefill, budgets.prefill * (1 - budgets.noise)),
        _most("size in bytes", new.total_bytes, old.total_bytes, budgets.size),
        _most("memory in bytes", new.memory_bytes, old.memory_bytes, budgets.memory),
        _most("mean KL", new.accuracy.get("mean_kl"), old.accuracy.get("mean_kl"), budgets.mean_kl, 1e-6),
    ]
    value, base = new.accuracy.get("top1"), old.accuracy.get("top1")
    limit = None if base is None or not budgets.top1 else base - budgets.top1
    made.append(Check("top-1", value, base, limit, value is None or limit is None or value >= limit))
    return [check for check in made if check.value is not None]


def _least(name: str, new: Sequence[float], old: Sequence[float], share: float) -> Check:
    """Speed: other programs only ever make it less, so the best rounds must fall short too, not the medians alone."""
    value, base = median(new), median(old)
    if value is None or base is None or not share:
        return Check(name, value, base, None, True)
    return Check(name, value, base, base * share, value >= base * share or max(new) >= max(old) * share)


def _most(name: str, value: float | None, base: float | None, share: float, floor: float = 0.0) -> Check:
    limit = max(base * share, floor) if base is not None and share else None
    return Check(name, value, base, limit, value is None or limit is None or value <= limit)


def exit_code(results: Sequence[Result]) -> int:
    """0 if all is well; else what the worst failure asks for: a gate or budget before all else."""
    codes = [result.code or 4 for result in results if not result.ok]
    return 0 if not codes else 4 if 4 in codes else next((code for code in codes if code in (1, 2, 3, 5)), 5)


def check_ship(pipeline: Pipeline, folder: Path) -> None:
    """Refuse what could not be shipped before anything is built.

    Raises:
        UsageError: the key is missing, or `push` is no reference.
    """
    from ...artifacts.oci.reference import Reference

    if pipeline.ship.key and not (folder / pipeline.ship.key).is_file():
        raise UsageError(f"there is no key {folder / pipeline.ship.key}", "ship.key names it", "check the path")
    if pipeline.ship.push:
        Reference.parse(f"{pipeline.ship.push}:tag")
