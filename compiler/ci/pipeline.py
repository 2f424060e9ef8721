"""A pipeline file: what to build, what to compare it with, how much worse it may be, and where it goes."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from ...artifacts import strict
from ...artifacts.errors import UsageError, VerificationError
from ...artifacts.files import read_small
from ...artifacts.strict import AtMost, Matches, OneOf, Range

_MAX_BYTES = 1 << 20
_FIX = "docs/ci.md lists all keys"
Line = Annotated[str, Matches(r"[^\x00-\x1f\x7f]*", "one line of text", 1024)]
Lines = Annotated[tuple[Line, ...], AtMost(64)]
Count = Annotated[int, Range(0, 1000)]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Every recipe is built with every scheme ("none" as the recipe says) for every target."""

    recipes: Lines
    schemes: Lines = ("none",)
    targets: Annotated[tuple[Annotated[str, OneOf(("cpu", "cuda"))], ...], AtMost(2)] = ("cpu",)


@dataclasses.dataclass(frozen=True)
class Change:
    """What is different for the jobs whose name fits the pattern `jobs`: recipe keys, or a planted fault."""

    jobs: Line
    set: Lines = ()
    plant: Line = ""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Where the artifact in production of each job lies: `folder`/NAME. `trust` as after `ingot run --trust`."""

    folder: Line = ""
    trust: Lines = ()
    rounds: Annotated[int, Range(1, 100)] = 5
    prompt: Count = 0
    tokens: Count = 0


@dataclasses.dataclass(frozen=True)
class Budgets:
    """How an artifact may compare with its baseline. Shares of the baseline's figure; 0 turns one off.

    `decode` and `prefill` are least shares of tokens/s; `size`, `memory` and `mean_kl` are greatest ones; `top1` is
    how many points of top-1 agreement (0.01 is one) may be lost. `noise` is the share that two runs of the same
    artifact may differ by: speed fails only beyond the budget and this.
    """

    decode: float = 0.95
    prefill: float = 0.95
    size: float = 1.05
    memory: float = 1.05
    mean_kl: float = 1.5
    top1: float = 0.01
    noise: float = 0.03


@dataclasses.dataclass(frozen=True)
class Ship:
    """What happens with artifacts that pass, if all do: `key` signs them, `push` is HOST/NAME, the tag is the job's."""

    key: Line = ""
    push: Line = ""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A whole pipeline. `parallel` builds at a time, of which each may take `memory_gb` (0: not asked)."""

    name: Line
    matrix: Matrix
    output: Line = "ci"
    parallel: Annotated[int, Range(1, 64)] = 1
    memory_gb: float = 0.0
    change: Annotated[tuple[Change, ...], AtMost(64)] = ()
    baseline: Baseline = Baseline()
    budgets: Budgets = Budgets()
    ship: Ship = Ship()


@dataclasses.dataclass(frozen=True)
class Job:
    """One artifact of the matrix."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    plant: str


def load_pipeline(path: Path) -> Pipeline:
    """Read a pipeline file.

    Raises:
        UsageError: it is missing, no TOML, or a key is unknown or of another type.
    """
    try:
        value = tomllib.loads(read_small(path, _MAX_BYTES).decode("utf-8"))
    except VerificationError as error:
        raise UsageError(f"cannot read the pipeline {path}", error.why or error.what, "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML", str(error), "mend it") from error
    try:
        pipeline: Pipeline = strict.build(Pipeline, _complete(Pipeline, value), str(path))
    except VerificationError as error:
        raise UsageError(error.what, error.why, _FIX) from error
    if not pipeline.matrix.recipes:
        raise UsageError(f"{path}: matrix.recipes is empty", "there is nothing to build", _FIX)
    return pipeline


def jobs_of(pipeline: Pipeline, folder: Path) -> list[Job]:
    """The jobs in the order they are built: the first of each recipe before the others, which share its stages.

    Args:
        folder: of the pipeline file; recipes are named from there.

    Raises:
        UsageError: two jobs have one name, or a change fits none.
    """
    jobs = []
    matrix = pipeline.matrix
    for scheme, target, recipe in itertools.product(matrix.schemes, matrix.targets, matrix.recipes):
        name = f"{Path(recipe).stem}-{scheme}-{target}"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
            raise UsageError(f"{name!a} cannot be a folder and a tag", "a job is named after recipe and scheme", _FIX)
        fitting = [change for change in pipeline.change if fnmatch.fnmatchcase(name, change.jobs)]
        overrides = [f"target.device={target}"] if target != "cpu" else []
        overrides += [f"scheme={scheme}"] if scheme != "none" else []
        overrides += [item for change in fitting for item in change.set]
        plants = [change.plant for change in fitting if change.plant]
        jobs.append(Job(name, folder / recipe, tuple(overrides), plants[-1] if plants else ""))
    names = [job.name for job in jobs]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UsageError(f"two jobs are called {twice!r}", "recipes of one file name, or a scheme twice", "rename one")
    for change in pipeline.change:
        if not fnmatch.filter(names, change.jobs):
            raise UsageError(f"no job fits {change.jobs!r}", f"the jobs are {', '.join(names)}", "correct the pattern")
    return jobs


def _complete(kind: Any, value: Any) -> Any:
    """`value` with the defaults of the dataclass `kind` for all that is missing, ready for strict reading."""
    if not isinstance(value, dict):
        return value
    result = dict(value)
    for item in dataclasses.fields(kind):
        nested = _NESTED.get((kind, item.name))
        if nested is not None and item.name in result:
            given = result[item.name]
            many = [_complete(nested, entry) for entry in given] if isinstance(given, list) else None
            result[item.name] = _complete(nested, given) if many is None else many
        elif item.name not in result and item.default is not dataclasses.MISSING:
            result[item.name] = _plain(item.default)
        elif item.name in result and type(item.default) is float and type(result[item.name]) is int:
            result[item.name] = float(result[item.name])
    return result


_NESTED: dict[tuple[Any, str], Any] = {
    (Pipeline, "matrix"): Matrix, (Pipeline, "change"): Change, (Pipeline, "baseline"): Baseline,
    (Pipeline, "budgets"): Budgets, (Pipeline, "ship"): Ship,
}  # fmt: skip


def _plain(value: Any) -> Any:
    """A default as TOML would have it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(item) for name, item in vars(value).items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
