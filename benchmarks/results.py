"""The one JSON schema of all results: what was measured, on which machine, with which versions.

Lists are filled while a run goes on, so that an interrupted run still is a valid report, and a later one can take it
up again. Sizes are in bytes, times in seconds, rates in tokens per second; 0 and "" mean "not measured".
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..artifacts import strict
from ..artifacts.errors import UsageError, VerificationError
from ..artifacts.strict import OneOf, Range
from ..compiler.traffic import Traffic

SCHEMA_VERSION = 2
OURS = "ingot"


@dataclass
class Series:
    """Repetitions of one test on one engine, in the order they were taken.

    `engine` is "ingot" or the peer's name, `test` is llama-bench's word ("tg128": 128 tokens generated, "pp512": a
    prompt of 512 tokens, "tg128 @ d1024 b8": 128 tokens in each of 8 rows behind prompts of 1024) or "start" (process
    start to first token) or "peak" (memory of that process).

    A rate counts the tokens of all rows. `per_step` says how many of them a step makes: the rows of a decode step, the
    length of a prompt. `read_bytes` and `flops` are what such a step must read and compute.
    """

    engine: str
    test: str
    unit: Annotated[str, OneOf(("tok/s", "s", "bytes"))]
    per_step: int = 0
    read_bytes: int = 0
    flops: int = 0
    samples: list[float] = field(default_factory=list)
    mean: float = 0.0
    sd: float = 0.0
    median: float = 0.0

    def add(self, sample: float) -> None:
        """Append a sample and bring mean, standard deviation (of the sample, n - 1) and median up to date."""
        self.samples.append(float(sample))
        self.mean = statistics.fmean(self.samples)
        self.sd = statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0
        self.median = float(statistics.median(self.samples))

    @property
    def best(self) -> float:
        """The best sample: the highest rate, or the shortest time; 0 when there is none."""
        if not self.samples:
            return 0.0
        return max(self.samples) if self.unit == "tok/s" else min(self.samples)

    @property
    def steps_per_second(self) -> float:
        """The median rate in steps; 0 where that says nothing."""
        return self.median / self.per_step if self.per_step else 0.0

    @property
    def gb_s(self) -> float:
        """What must be read, in GB/s."""
        return self.read_bytes * self.steps_per_second / 1e9

    @property
    def tflop_s(self) -> float:
        """What must be computed, in TFLOP/s."""
        return self.flops * self.steps_per_second / 1e12


@dataclass
class Ratio:
    """How many times better than a peer, from pairs of runs taken one right after the other."""

    peer: str
    test: str
    peer_test: str
    samples: list[float]
    median: float


@dataclass
class Build:
    """What a build took. Caches of the compiler and of its tuner were empty where it is `cold`.

    `peak_bytes` is the largest sum over all its processes, `largest_process_bytes` the largest of one. With `reused` it
    was an earlier run that built the artifact and measured this.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    largest_process_bytes: int = 0
    reused: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    cold: bool = True


@dataclass
class Goal:
    """A number to reach, `target` first and `then` after it (0: there is no second).

    `test` names the test it speaks of where a model has several. `value` counts only where `known`; `source` says who
    asks for it.
    """

    what: str
    relation: Annotated[str, OneOf(("<=", ">="))]
    target: float
    source: str
    test: str = ""
    then: float = 0.0
    value: float = 0.0
    known: bool = False
    reached: bool = False
    reached_then: bool = False


@dataclass
class Model:
    """One model: what it is, and all that was measured of it. `skipped` gives the reason why nothing was."""

    name: str
    recipe: str
    settings: list[str]
    device: Annotated[str, OneOf(("cpu", "cuda"))] = "cpu"
    skipped: str = ""
    failed: str = ""
    dtype: str = ""
    scheme: str = ""
    parameters: int = 0
    checkpoint_bytes: int = 0
    artifact_bytes: int = 0
    weights_bytes: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    build: Build = field(default_factory=Build)
    series: list[Series] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def open_series(
        self, engine: str, test: str, unit: str, per_step: int = 0, read_bytes: int = 0, flops: int = 0
    ) -> Series:
        """The series of this name, made if there is none."""
        for series in self.series:
            if (series.engine, series.test, series.unit) == (engine, test, unit):
                return series
        self.series.append(Series(engine, test, unit, per_step, read_bytes, flops))
        return self.series[-1]

    def find(self, engine: str, kind: str, test: str = "") -> Series | None:
        """The engine's first series with samples whose test begins with `kind` ("tg", "pp", "start", "peak").

        With `test` it must be that very test.
        """
        fits = (s for s in self.series if s.engine == engine and s.test.startswith(kind) and s.samples)
        return next((s for s in fits if test in ("", s.test)), None)


@dataclass
class Machine:
    """Where the run was made. `flags` are those that decide about kernels, `load` the load average before the run.

    `gpu` and what follows it describe the first visible GPU of a run on the device "cuda".
    """

    cpu: str
    cores: int
    threads: int
    l3_bytes: int
    memory_bytes: int
    flags: list[str]
    system: str
    load: float
    gpu: str = ""
    gpu_memory_bytes: int = 0
    gpu_l2_bytes: int = 0


@dataclass
class Pass:
    """The best of some passes over a large buffer."""

    method: str
    gb_s: float


@dataclass
class Matmul:
    """The best rate of large bfloat16 matrix products."""

    method: str
    tflop_s: float


@dataclass(frozen=True)
class Limits:
    """What nothing on the device can exceed (0: not measured), and the cache that hides its memory."""

    read_gb_s: float
    matmul_tflop_s: float
    cache_bytes: int


@dataclass
class Report:
    """One run of the harness. The ceilings are the best of `reads` and `matmuls`, taken between the models."""

    created: str
    commit: str
    changed: bool
    command: list[str]
    repetitions: int
    machine: Machine
    versions: dict[str, str]
    read_gb_s: float = 0.0
    reads: list[Pass] = field(default_factory=list)
    matmul_tflop_s: float = 0.0
    matmuls: list[Matmul] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    interrupted: bool = False
    schema_version: Annotated[int, Range(SCHEMA_VERSION, SCHEMA_VERSION)] = SCHEMA_VERSION

    def add_reads(self, passes: Sequence[Pass]) -> None:
        """Take measured read bandwidths into account."""
        self.reads += passes
        self.read_gb_s = max((p.gb_s for p in self.reads), default=0.0)

    def add_matmuls(self, matmuls: Sequence[Matmul]) -> None:
        """Take measured matmul rates into account."""
        self.matmuls += matmuls
        self.matmul_tflop_s = max((m.tflop_s for m in self.matmuls), default=0.0)

    def limits(self, device: str) -> Limits:
        """The ceilings, with the cache of the device that was measured."""
        cache = self.machine.gpu_l2_bytes if device == "cuda" else self.machine.l3_bytes
        return Limits(self.read_gb_s, self.matmul_tflop_s, cache)

    def to_json(self) -> str:
        """The report as JSON, keys in the schema's order."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Report:
        """Parse and check a report; `source` is its name in messages.

        Raises:
            UsageError: it is no report of this schema; names the field.
        """
        try:
            report: Report = strict.build(cls, strict.read_json(text, source), source)
        except VerificationError as error:
            raise UsageError(error.what, error.why, "measure again: python -m ingot.benchmarks --json FILE") from None
        return report

    def write(self, path: Path) -> None:
        """Write the JSON to `path` at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(self.to_json(), "utf-8")
        part.replace(path)


def pairwise(ours: Series, peer: Series) -> Ratio:
    """Ours against a peer, repetition by repetition: how many times faster (or smaller) we are."""
    higher = ours.unit == "tok/s"
    pairs = [(a, b) if higher else (b, a) for a, b in zip(ours.samples, peer.samples)]
    samples = [top / bottom for top, bottom in pairs if bottom > 0]
    median = float(statistics.median(samples)) if samples else 0.0
    return Ratio(peer.engine, ours.test, peer.test, samples, median)
