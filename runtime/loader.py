"""From a folder to running engines: the one place that knows which kind of engine needs which library.

It also knows who compares which digest: weights that are copied to a device are digested on the way there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from ..artifacts.errors import UsageError, VerificationError
from ..artifacts.store import OpenArtifact, open_artifact
from ..artifacts.target import require_target
from ..artifacts.trust import Trust
from .engines.base import EngineGroup
from .phases import Phases
from .trust import require_trust


def open_verified(path: str | Path, verify: Literal["full", "sizes"], trust: Trust | None = None) -> OpenArtifact:
    """Open the artifact in a folder for `load_engines`.

    Args:
        verify: "full" compares every file's digest, those of weights that go to a device while they do. "sizes" leaves
            out the weights' digests: code and what steers it is small, and weights can execute nothing.
        trust: whose code is accepted; None for what was built on this host or is signed by a configured key.

    Raises:
        UsageError: no such folder, or another word for `verify`. VerificationError: it is not what its manifest says,
            or not of anybody who is trusted.
    """
    if verify not in ("full", "sizes"):
        raise UsageError(f"cannot verify {verify!r}", "verify is one of: full, sizes", "open the artifact with 'full'")
    artifact = open_artifact(path, "sizes")
    manifest = artifact.manifest
    require_trust(artifact, Trust.parse(None) if trust is None else trust)
    streamed = any(engine.kind == "plan" for engine in manifest.engines)
    left = manifest.weights if streamed or verify == "sizes" else ()
    artifact.verify(file.path for file in manifest.files if file.path not in left)
    return dataclasses.replace(artifact, unread=frozenset(left if verify == "full" else ()))


def load_engines(
    artifact: OpenArtifact, gpu_memory_utilization: float = 0.9, phases: Phases | None = None
) -> EngineGroup:
    """Load all engines of an artifact that has been opened by `open_verified`, or built just now.

    Args:
        gpu_memory_utilization: on a GPU, the share of its memory that may be in use once the KV cache has been taken.
        phases: told where the time went.

    Raises:
        VerificationError: it does not fit this machine, or holds engines of a kind this runtime does not know.
        ResourceError: out of memory.
    """
    manifest = artifact.manifest
    require_target(manifest.target, f"The artifact {artifact.root}")
    phases = phases or Phases()
    kinds = sorted({engine.kind for engine in manifest.engines})
    if kinds == ["aoti"] and manifest.target.device == "cpu":
        from .engines import aoti

        group = aoti.load(artifact)
        phases.mark("engines")
        return group
    if kinds == ["plan"] and manifest.target.device == "cuda":
        from .engines import plan

        return plan.load(artifact, gpu_memory_utilization, phases)
    raise VerificationError(
        f"The artifact {artifact.root} holds engines of kind {', '.join(kinds) or 'none'} ({manifest.target.device}).",
        "This runtime runs engines that are all of kind aoti on the CPU, or all of kind plan on a GPU.",
        "Upgrade ingot, or build the artifact again with this version.",
    )
