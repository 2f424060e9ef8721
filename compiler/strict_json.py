"""JSON from a model folder: bounded, without duplicate keys, and with one clear error for everything else.

Model folders come from anywhere, so their small files are read by this instead of `json.load`. Links are followed only
where Hugging Face's own cache uses them: from a snapshot into the blobs of the same repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..artifacts.errors import ResourceError, UsageError


def model_file(folder: Path, name: str) -> Path | None:
    """The plain file `name` of a model folder, links resolved; None if there is none.

    Raises:
        UsageError: it is a folder or a device, or a link that leaves the model folder.
    """
    try:
        base = folder.resolve()
        path = (base / name).resolve()
        if not path.exists() and not (base / name).is_symlink():
            return None
        blobs = base.parent.parent / "blobs" if base.parent.name == "snapshots" else None
        if not (path.is_relative_to(base) or (blobs is not None and path.is_relative_to(blobs))):
            raise UsageError(
                f"{base / name}: leaves the model folder",
                "it is a link to a file elsewhere, so the folder is not the model it seems to be",
                "put a copy of the file in its place",
            )
        if not path.is_file():
            raise UsageError(f"{base / name}: not a plain file", "it is a folder, device or dead link", "replace it")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{folder}: {name[:100]!r} cannot be opened", str(error), "check the model folder") from None
    return path


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. NaN and Infinity are left as floats to the caller.

    Raises:
        UsageError: too large, not UTF-8, no JSON object, a key twice, nested too deeply.
        ResourceError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read", str(error), "check the disk and the permissions") from error
    if len(raw) > limit:
        raise UsageError(f"{path}: too large", f"more than {limit} bytes", "check that it is the right file")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; `where` names it in errors. Raises UsageError as `read_json` does."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply", "no model file is", "fetch the file again") from None
    except ValueError as error:  # also JSON's, UTF-8's and those of integers of 4300 digits
        raise UsageError(f"{where}: not valid JSON", str(error)[:300], "fetch the file again") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: not a JSON object", f"it is a {type(value).__name__}", "fetch the file again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {ascii(key)[:80]} is there twice")
            seen.add(key)
    return result
