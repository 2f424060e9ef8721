"""What a build attests of itself beside the manifest: SLSA provenance, a bill of materials, and a log of its times.

None of it is in the artifact's digest, which it names: two builds that are equal differ in when and where they ran.
A signature covers all of it. Formats: https://slsa.dev/spec/v1.0/provenance, CycloneDX 1.6.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .. import __version__
from ..artifacts.manifest import PROVENANCE, SBOM, Manifest
from ..artifacts.signature import STATEMENT_TYPE
from .cache.session import Step
from .sbom import bill_of_materials

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:ingot:build:v1"
# The checkpoint's digest is of the tensors that the build read, by name: no plain sha256 of a file.
_WEIGHTS_ALGORITHM = "ingotTensorsSha256"


def attestations(
    manifest: Manifest,
    started: str,
    seconds: Mapping[str, float],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    steps: Sequence[Step] = (),
    speed: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The unlisted files of a build by path.

    Args:
        manifest: finished, so that its digest is the artifact's.
        started: the time the build began, in ISO 8601.
        seconds: per stage.
        records: of the passes, per engine; steps: what came out of the build cache; speed: what one look at the
            finished artifact measured.
    """
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    times = {engine: {r["name"]: round(r["time_ms"], 3) for r in passes} for engine, passes in records.items()}
    stages = {name: round(value, 3) for name, value in seconds.items()}
    cache = [{"stage": s.stage, "item": s.item, "outcome": s.outcome, "key": s.key} for s in steps]
    statement = _statement(
        manifest, started, finished, {"stage_s": stages, "pass_ms": times, "cache": cache, "speed": dict(speed or {})}
    )
    files = {PROVENANCE: _json(statement), "report/build.log": _log(manifest.name, started, seconds, steps)}
    if (sbom := bill_of_materials(manifest)) is not None:
        files[SBOM] = sbom
    return files


def _statement(manifest: Manifest, started: str, finished: str, times: dict[str, Any]) -> dict[str, Any]:
    recipe = dict(manifest.recipe)
    weights = str(recipe.pop("weights_digest", ""))
    model = recipe.get("model", {})
    source = next((str(model[key]) for key in ("hub", "path") if model.get(key)), manifest.name)
    tools = [{"uri": f"pkg:pypi/{name}@{version}"} for name, version in manifest.toolchain.items() if _is_package(name)]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": manifest.name, "digest": {"sha256": manifest.digest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": recipe},
                "internalParameters": {"toolchain": manifest.toolchain},
                "resolvedDependencies": [{"name": source, "digest": {_WEIGHTS_ALGORITHM: weights}}, *tools],
            },
            "runDetails": {
                "builder": {"id": f"urn:ingot:host:{platform.node()}", "version": {"ingot": __version__}},
                "metadata": {
                    "invocationId": secrets.token_hex(16), "startedOn": started, "finishedOn": finished,
                    "ingot_system": platform.platform(), "ingot_python": platform.python_version(),
                },
                "byproducts": [{"name": "times", "annotations": times}],
            },
        },
    }  # fmt: skip


def _is_package(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _log(name: str, started: str, seconds: Mapping[str, float], steps: Sequence[Step]) -> bytes:
    lines = [f"{started} build of {name}", *(f"{value:8.2f} s  {stage}" for stage, value in seconds.items())]
    lines += [f"{step.seconds:8.2f} s  {step.stage} {step.item}: {step.outcome}" for step in steps]
    return ("\n".join(lines) + "\n").encode()
