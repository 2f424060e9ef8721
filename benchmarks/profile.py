"""Where the time of a step goes: `python -m ingot.benchmarks.profile ARTIFACT [--engine decode-b1] [--context 1024]`.

The kernels of a plan engine, the costliest first, with time, bytes that must be read, and share of the read ceiling.
Each kind is timed alone (step_timer.py); what overlap and gaps make of the sum is seen in the last lines, the time of
the whole graph. No torch takes part, but for the ceiling, in a process of its own (`--ceiling` gives it instead).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from ..artifacts.errors import IngotError, UsageError
from ..artifacts.kernel_plan import KernelPlan, PlanLaunch
from ..artifacts.manifest import EngineEntry, Manifest
from ..artifacts.target import require_target
from ..runtime.engines.base import Engine
from ..runtime.engines.cuda import Driver
from ..runtime.engines.plan import PlanGroup
from ..runtime.loader import open_verified
from .gpu_ceilings import gpu_ceilings
from .step_timer import MOST_STEPS, Recorder, StepTimer
from .table import markdown


@dataclass
class Kind:
    """Launches that differ in their memory alone: one kernel, grid and label."""

    label: str
    places: list[int] = field(default_factory=list)
    read_bytes: int = 0  # of all of them
    seconds: float = 0.0  # of all of them, alone


@dataclass(frozen=True)
class Profile:
    """One engine's step: its kinds of launches, the costliest first, and the seconds of the whole graph."""

    engine: str
    rows: int
    context: int
    kinds: list[Kind]
    seconds: float

    @property
    def read_bytes(self) -> int:
        """What the whole step must read."""
        return sum(kind.read_bytes for kind in self.kinds)


def profile(folder: Path, engine_name: str, context: int, make_driver: Callable[[], Driver] = Driver) -> Profile:
    """Load an artifact and time one of its engines.

    Args:
        context: tokens in the cache of each row before the step; a prefill engine begins behind them.

    Raises:
        UsageError: there is no such engine, or it is none of kernels; the context is too long.
        IngotError: as `PlanGroup`.
    """
    artifact = open_verified(folder, "sizes")
    manifest = artifact.manifest
    entry = next((e for e in manifest.engines if e.name == engine_name and e.kind == "plan"), None)
    if entry is None:
        names = ", ".join(e.name for e in manifest.engines if e.kind == "plan") or "none: it is built for the CPU"
        raise UsageError(f"{folder} has no kernel plan {engine_name!r}", "", f"its plans: {names}")
    longest = manifest.model.max_length - MOST_STEPS - entry.length
    if not 0 <= context <= longest:
        why = f"the artifact holds {manifest.model.max_length} tokens, and timing moves on by up to {MOST_STEPS}"
        raise UsageError(f"--context {context} is too long", why, f"give at most {max(longest, 0)}")
    require_target(manifest.target, f"The artifact {folder}")
    plan = KernelPlan.from_json(artifact.read(entry.file), entry.file)
    made: list[Recorder] = []

    def make() -> Driver:
        made.append(Recorder(make_driver()))
        return cast(Driver, made[0])

    group = PlanGroup(artifact, make_driver=make)
    try:
        engine = group.engines[engine_name]
        # A decode engine has recorded two, which differ in where their results go.
        recorded = next(recorded for recorded in made[0].graphs if recorded.graph is engine.graph)

        def reset() -> None:
            fill(engine, manifest, group.num_blocks, context)
            engine.run()
            engine.next_tokens()

        kinds = sort_out(plan, entry, manifest, context)
        with StepTimer(made[0].driver, recorded, reset) as timer:
            whole = timer.whole()
            for kind in kinds:
                kind.seconds = timer.alone(kind.places)
        kinds.sort(key=lambda kind: kind.seconds, reverse=True)
        return Profile(engine_name, entry.batch, context, kinds, whole)
    finally:
        group.close()


def fill(engine: Engine, manifest: Manifest, num_blocks: int, context: int) -> None:
    """Inputs of a greedy step in which every row holds `context` tokens before it, in blocks of its own.

    Raises:
        UsageError: the cache has too few blocks.
    """
    entry, inputs, cache = engine.entry, engine.inputs, manifest.kv_cache
    blocks = -(-(context + entry.length + MOST_STEPS) // cache.block_size)
    if entry.batch * blocks > num_blocks - 1:
        why = f"{entry.batch} rows need {entry.batch * blocks} blocks, the cache has {num_blocks - 1}"
        raise UsageError(f"--context {context} is too long for engine {entry.name}", why, "give a shorter one")
    vocabulary = manifest.model.vocab_size
    inputs["tokens"][:] = np.arange(entry.batch * entry.length).reshape(entry.batch, entry.length) % vocabulary
    inputs["positions"][:] = np.arange(context, context + entry.length)
    inputs["block_tables"][:] = 0
    inputs["block_tables"][:, :blocks] = 1 + np.arange(entry.batch * blocks).reshape(entry.batch, blocks)
    for name, value in (("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("seeds", 0)):
        inputs[name][:] = value
    if "last_index" in inputs:
        inputs["last_index"][:] = entry.length - 1


def sort_out(plan: KernelPlan, entry: EngineEntry, manifest: Manifest, context: int) -> list[Kind]:
    """The launches of a plan by kind, in the order of their first."""
    found: dict[tuple[int, tuple[int, int, int], str], Kind] = {}
    for place, launch in enumerate(plan.launches):
        key = (launch.kernel, launch.grid, launch.label)
        kind = found.setdefault(key, Kind(launch.label or plan.kernels[launch.kernel].name))
        kind.places.append(place)
        kind.read_bytes += launch.read_bytes or cache_read_bytes(launch, entry, manifest, context)
    return list(found.values())


def cache_read_bytes(launch: PlanLaunch, entry: EngineEntry, manifest: Manifest, context: int) -> int:
    """What an attention reads of the cache, which its plan cannot know: it depends on the context."""
    names = {a.name for a in launch.arguments if a.space == "cache"}
    if "attention" not in launch.label or len(names) < 2:
        return 0
    layer = manifest.kv_cache.layers[int(next(iter(names)).rpartition("_")[2])]
    seen = context + entry.length
    seen = min(seen, layer.window + entry.length - 1) if layer.window else seen
    return entry.batch * seen * manifest.kv_cache.token_bytes(layer)


def render(found: Profile, ceiling: float, l2_bytes: int) -> str:
    """The profile as a table; `ceiling` in GB/s, 0 if unknown."""
    total = sum(kind.seconds for kind in found.kinds)

    def rates(nbytes: int, seconds: float) -> list[str]:
        if not nbytes or seconds <= 0:
            return ["", "", ""]
        gb_s = nbytes / seconds / 1e9
        share = f"{gb_s / ceiling:.0%}" if ceiling else ""
        return [f"{nbytes / 1e6:.2f}", f"{gb_s:.0f}", share]

    rows = []
    for kind in found.kinds:
        count = len(kind.places)
        mb, gb_s, share = rates(kind.read_bytes, kind.seconds)
        cached = 0 < kind.read_bytes <= l2_bytes
        rows.append([
            kind.label, str(count), f"{kind.seconds / count * 1e6:.2f}", f"{kind.seconds * 1e6:.1f}",
            f"{kind.seconds / total:.1%}" if total else "", mb, gb_s, "in cache" if cached else share,
        ])  # fmt: skip
    rows.append(["sum, each alone", str(sum(len(k.places) for k in found.kinds)), "", f"{total * 1e6:.1f}", "100.0%",
                 *rates(found.read_bytes, total)])  # fmt: skip
    over = f"{found.seconds / total:.1%}" if total else ""
    rows.append(["whole graph", "", "", f"{found.seconds * 1e6:.1f}", over, *rates(found.read_bytes, found.seconds)])
    names = ("kernel", "launches", "µs each", "µs", "of sum", "MB read", "GB/s", "of read")
    limit = f"; read ceiling {ceiling:.0f} GB/s" if ceiling else ""
    head = f"{found.engine}, {found.rows} rows behind {found.context} tokens{limit}"
    return f"{head}\n\n{markdown(names, rows, 'lrrrrrrr')}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print; the exit code is 0, or the error's."""
    parser = argparse.ArgumentParser(prog="python -m ingot.benchmarks.profile", allow_abbrev=False)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engine", default="decode-b1", help="default: decode-b1")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS", help="default: 1024")
    parser.add_argument("--ceiling", type=float, metavar="GB_S", help="default: measured first, where torch is there")
    args = parser.parse_args(argv)
    ceiling, l2_bytes = args.ceiling or 0.0, 0
    if args.ceiling is None:
        measured = gpu_ceilings(timeout=120)
        ceiling, l2_bytes = max((r.gb_s for r in measured.reads), default=0.0), measured.l2_bytes
        if measured.problem:
            print(f"the read ceiling: {measured.problem}", file=sys.stderr)
    try:
        found = profile(args.artifact, args.engine, args.context)
    except IngotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(render(found, ceiling, l2_bytes), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
