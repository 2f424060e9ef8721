"""What a kernel plan may touch, compared with what there is: every argument's bounds, before anything is launched.

Pure arithmetic on plan, manifest and weights' headers: no device is needed to refuse a plan that lies.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import NoReturn

from ...artifacts.errors import VerificationError
from ...artifacts.kernel_plan import KernelPlan, PlanArgument
from ...artifacts.manifest import EngineEntry, Manifest
from ...artifacts.store import OpenArtifact
from ..weights import StoredTensor
from .buffers import check_buffers
from .plan_layout import buffer_bytes, is_cache

# Vector loads of 16 bytes are the widest there are.
_WEIGHT_ALIGNMENT = 16
_INTEGERS = {"int32": 31, "int64": 63}
_FIX = "build the artifact again"


def read_plans(artifact: OpenArtifact) -> dict[str, KernelPlan]:
    """The plans of all engines by name, from the bytes that were verified.

    Raises:
        VerificationError: one is not what was built, or no plan.
    """
    manifest = artifact.manifest
    return {e.name: KernelPlan.from_json(artifact.read(e.file), e.file) for e in manifest.engines}


def check_plans(manifest: Manifest, plans: Mapping[str, KernelPlan], weights: Mapping[str, StoredTensor]) -> int:
    """Check all plans of an artifact; returns how many bytes from the arena's start must be zero before a run.

    Raises:
        VerificationError: an argument reaches outside of what it names, or names what there is not; names the engine,
            the launch and the argument.
    """
    for entry in manifest.engines:
        check_buffers(entry, manifest)
        _check_plan(entry, plans[entry.name], manifest, weights)
    return _check_zeroed(plans)


def _check_plan(entry: EngineEntry, plan: KernelPlan, manifest: Manifest, weights: Mapping[str, StoredTensor]) -> None:
    name = entry.name
    if plan.arch not in manifest.target.isa:
        _refuse(name, f"is compiled for {plan.arch}", f"the artifact is for {', '.join(manifest.target.isa)}")
    if foreign := sorted(set(plan.files()) - set(entry.libraries)):
        _refuse(name, "takes kernels from elsewhere", f"the manifest does not list {foreign[0]} for it")
    named = {constant.weight for constant in entry.constants}
    if missing := sorted(weight for weight in named if weight not in weights):
        raise VerificationError(f"weights of engine {name} are missing", ", ".join(missing[:5]), _FIX)
    for weight in named:
        if weights[weight].start % _WEIGHT_ALIGNMENT:
            why = f"it starts at byte {weights[weight].start} of its file, no multiple of {_WEIGHT_ALIGNMENT}"
            raise VerificationError(f"weight {weight} of engine {name} is not aligned", why, _FIX)
    sizes: dict[tuple[str, str], int] = {("weight", weight): weights[weight].nbytes for weight in named}
    sizes |= {("cache" if is_cache(b.name) else "input", b.name): buffer_bytes(b) for b in entry.inputs}
    sizes |= {("output", b.name): buffer_bytes(b) for b in entry.outputs}
    used = set()
    for index, launch in enumerate(plan.launches):
        for position, argument in enumerate(launch.arguments):
            if why := _complaint(argument, sizes):
                where = f"argument {position} of launch {index} ({plan.kernels[launch.kernel].name})"
                _refuse(name, f"reaches outside of its memory in {where}", why)
            if argument.space == "weight":
                used.add(argument.name)
    if used != named:
        odd = ", ".join(sorted(used ^ named)[:5])
        _refuse(name, "and the manifest disagree about its weights", f"they differ in {odd}")


def _complaint(argument: PlanArgument, sizes: Mapping[tuple[str, str], int]) -> str:
    """What is wrong with an argument; empty if it is fine. The arena's bounds were checked with the plan itself."""
    if argument.space == "scalar":
        bits = _INTEGERS.get(argument.dtype)
        if bits is not None and not -(1 << bits) <= argument.integer < 1 << bits:
            return f"{argument.integer} is no {argument.dtype}"
        return ""
    if argument.space in ("arena", "null"):
        return ""
    size = sizes.get((argument.space, argument.name))
    if size is None:
        return f"the engine has no {argument.space} {argument.name!a}"
    end = argument.offset + argument.nbytes
    if argument.space == "cache" and argument.offset and end <= size:
        # How many blocks there are is settled later, by the memory that is left: kernels find them from the start.
        return f"it begins at byte {argument.offset} of {argument.name}, not at its start"
    return f"it ends at byte {end} of {argument.name}, which has {size}" if end > size else ""


def _check_zeroed(plans: Mapping[str, KernelPlan]) -> int:
    """The engines share one arena: what one of them needs to find zero, no other may use for anything else."""
    own = {name: _merged((r.offset, r.offset + r.nbytes) for r in plan.zeroed) for name, plan in plans.items()}
    everyone = _merged(region for regions in own.values() for region in regions)
    for name, plan in plans.items():
        for index, launch in enumerate(plan.launches):
            for argument in launch.arguments:
                span = (argument.offset, argument.offset + argument.nbytes)
                if argument.space != "arena" or not _overlaps(everyone, span) or _inside(own[name], span):
                    continue
                why = f"launch {index} uses bytes {span[0]} to {span[1]} of the arena, which an engine needs to be zero"
                _refuse(name, "may overwrite what must stay zero", why)
    return everyone[-1][1] if everyone else 0


def _merged(regions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Regions (start, end) in order, those that touch made one, empty ones left out."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(region for region in regions if region[0] < region[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _overlaps(regions: list[tuple[int, int]], span: tuple[int, int]) -> bool:
    """Whether any of the merged regions shares a byte with the span."""
    index = bisect.bisect_right(regions, span[0], key=lambda region: region[1])
    return index < len(regions) and span[0] < span[1] and regions[index][0] < span[1]


def _inside(regions: list[tuple[int, int]], span: tuple[int, int]) -> bool:
    """Whether one of the merged regions holds the whole span."""
    index = bisect.bisect_right(regions, span[0], key=lambda region: region[1])
    return index < len(regions) and regions[index][0] <= span[0] and span[1] <= regions[index][1]


def _refuse(engine: str, what: str, why: str) -> NoReturn:
    raise VerificationError(f"engine {engine} {what}", why, _FIX)
