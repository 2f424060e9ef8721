"""Where the build cache lies, and opening it for one build."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ...artifacts.errors import ResourceError
from .session import DEFAULT_MAX_BYTES, Session
from .store import CacheStore


def default_folder() -> Path:
    """The user's cache folder for Ingot: $XDG_CACHE_HOME/ingot, or ~/.cache/ingot."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ingot"


def open_store(folder: Path | None = None) -> CacheStore:
    """The build cache below a cache folder, or below the user's own.

    Raises:
        UsageError: it is not safe to use. ResourceError: the system does not let us.
    """
    return CacheStore((default_folder() if folder is None else folder) / "build")


def open_session(
    folder: Path | None = None,
    use: bool = True,
    explain: bool = False,
    log: Callable[[str], None] = lambda text: None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Session:
    """The cache for one build.

    Args:
        folder: the cache folder; None is the user's own, and where that cannot be written the build does without.
        use: False for a build that neither looks up nor keeps anything.

    Raises:
        UsageError: the folder is not safe to use. ResourceError: a folder that was named cannot be used.
    """
    if not use:
        return Session(None, explain, log)
    try:
        return Session(open_store(folder), explain, log, max_bytes)
    except ResourceError as error:
        if folder is not None:
            raise
        log(f"built without a cache: {error.what}: {error.why}")
        return Session(None, explain, log)
