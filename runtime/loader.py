"""From an opened artifact to running engines: the one place that knows which kind of engine needs which library."""

from __future__ import annotations

from ..artifacts.errors import VerificationError
from ..artifacts.store import OpenArtifact
from ..artifacts.target import require_target
from .engines.base import EngineGroup


def load_engines(artifact: OpenArtifact) -> EngineGroup:
    """Load all engines of an artifact that has been verified.

    Raises:
        VerificationError: it does not fit this machine, or holds engines of a kind this runtime does not know.
    """
    manifest = artifact.manifest
    require_target(manifest.target, f"The artifact {artifact.root}")
    kinds = sorted({engine.kind for engine in manifest.engines})
    if kinds == ["aoti"]:
        from .engines.aoti import load

        return load(artifact)
    raise VerificationError(
        f"The artifact {artifact.root} holds engines of kind {', '.join(kinds) or 'none'}.",
        "This runtime runs artifacts whose engines are all of kind aoti.",
        "Upgrade ingot, or build the artifact again with this version.",
    )
