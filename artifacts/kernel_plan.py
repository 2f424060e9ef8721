"""The kernel plan: one CUDA engine as data. A list of launches over an arena, weights, inputs, outputs and the cache.

The compiler writes `plan.json` next to its cubins; the runtime checks every argument's bounds and interprets it. A plan
holds no host code: what it ships runs on the GPU alone. Parsing is strict, as the manifest's is.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

from . import strict
from .errors import VerificationError
from .manifest import RelativePath, Size, Text
from .strict import AtMost, Matches, OneOf, Range

PLAN_VERSION = 2
SPACES = ("arena", "weight", "input", "output", "cache", "scalar", "null")
SCALARS = ("", "int32", "int64", "float32", "float64")
# Every buffer of the arena, and every pointer the compiler promises is aligned, starts at a multiple of this.
ALIGNMENT = 256

_Grid = Annotated[int, Range(1, (1 << 31) - 1)]
_Index = Annotated[int, Range(0, 1 << 20)]


@dataclasses.dataclass(frozen=True)
class PlanKernel:
    """A compiled kernel: `symbol` in the cubin `file` (a path in the artifact), its block size and shared memory.

    `carveout`: percent of a multiprocessor's shared memory and L1 cache that it prefers as shared memory; 0 is the
    least that holds a block, -1 the driver's choice.
    """

    name: Text
    file: RelativePath
    symbol: Annotated[str, Matches(r"[A-Za-z_][A-Za-z0-9_]*", "a C identifier", 512)]
    threads: Annotated[int, Range(1, 1024)]
    shared_bytes: Annotated[int, Range(0, 232_448)]
    carveout: Annotated[int, Range(-1, 100)]


@dataclasses.dataclass(frozen=True)
class PlanArgument:
    """One kernel parameter.

    A pointer is `offset` bytes into a space: the engine's arena, or what `name` calls in the weights, the engine's
    inputs or outputs, or the cache. The kernel touches nothing outside [offset, offset + nbytes). "scalar" passes
    `integer` or `real` as `dtype`; "null" a null pointer.
    """

    space: Annotated[str, OneOf(SPACES)]
    name: Text
    offset: Size
    nbytes: Size
    dtype: Annotated[str, OneOf(SCALARS)]
    integer: int
    real: float


@dataclasses.dataclass(frozen=True)
class PlanLaunch:
    """One launch.

    `dependent`: it may start before the launch before it has ended, since the kernel itself waits (griddepcontrol)
    before it reads or writes anything that a launch before it may write or read. `label` and `read_bytes` (bytes that
    must be read for it: weights, keys and values) are for people: the profile.
    """

    kernel: _Index
    grid: tuple[_Grid, _Grid, _Grid]
    arguments: Annotated[tuple[PlanArgument, ...], AtMost(64)]
    dependent: bool
    label: Text
    read_bytes: Size


@dataclasses.dataclass(frozen=True)
class ZeroRegion:
    """Part of the arena that must be zero before the first run; the kernels leave it zero behind them."""

    offset: Size
    nbytes: Size


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """An engine. `arch` is the compute capability it was compiled for, such as "sm_90"."""

    plan_version: int
    arch: Annotated[str, Matches(r"sm_[0-9]{2,3}a?", "a compute capability such as sm_90", 16)]
    arena_bytes: Size
    zeroed: Annotated[tuple[ZeroRegion, ...], AtMost(1 << 16)]
    kernels: Annotated[tuple[PlanKernel, ...], AtMost(1 << 16)]
    launches: Annotated[tuple[PlanLaunch, ...], AtMost(1 << 18)]

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> KernelPlan:
        """Parse and check a plan; `source` is its name in messages.

        Raises:
            VerificationError: anything is wrong in itself. Bounds within weights, inputs, outputs and cache, whose
                sizes the plan does not know, are the loader's to check.
        """
        value = strict.read_json(text, source)
        if type(value) is not dict:
            strict.refuse(source, "", "expected a JSON object")
        version = value.get("plan_version")
        if version != PLAN_VERSION or type(version) is not int:
            raise VerificationError(
                f"{source}: a kernel plan of another version",
                f"plan_version is {strict.quote(version)}; this Ingot reads {PLAN_VERSION}",
                "upgrade Ingot, or build the artifact again with this version",
            )
        plan: KernelPlan = strict.build(cls, value, source)
        _check(plan, source)
        return plan

    def to_json(self) -> str:
        """The canonical form: keys sorted, ASCII, one newline at the end."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"

    def summary(self) -> list[dict[str, str | int]]:
        """What it launches, for people: label, launches and bytes read of each, in the order of their first launch."""
        found: dict[str, tuple[int, int]] = {}
        for launch in self.launches:
            count, read = found.get(launch.label, (0, 0))
            found[launch.label] = (count + 1, read + launch.read_bytes)
        return [{"label": k, "launches": count, "read_bytes": read} for k, (count, read) in found.items()]

    def files(self) -> tuple[str, ...]:
        """The cubins it needs, each once, in the order of their first use."""
        return tuple(dict.fromkeys(kernel.file for kernel in self.kernels))


def _check(plan: KernelPlan, source: str) -> None:
    for index, region in enumerate(plan.zeroed):
        if region.offset + region.nbytes > plan.arena_bytes:
            strict.refuse(source, f"zeroed[{index}]", f"it ends outside of the arena of {plan.arena_bytes} bytes")
    for index, launch in enumerate(plan.launches):
        if launch.kernel >= len(plan.kernels):
            strict.refuse(source, f"launches[{index}].kernel", f"there is no kernel {launch.kernel}")
        for position, argument in enumerate(launch.arguments):
            where = f"launches[{index}].arguments[{position}]"
            if argument.space == "arena" and argument.offset + argument.nbytes > plan.arena_bytes:
                strict.refuse(source, where, f"it ends outside of the arena of {plan.arena_bytes} bytes")
            if (argument.space == "scalar") != bool(argument.dtype):
                strict.refuse(source, where, "a scalar has a dtype, a pointer has none")
            if (argument.space in ("weight", "input", "output", "cache")) != bool(argument.name):
                strict.refuse(source, where, "a name goes with weights, inputs, outputs and caches alone")
