"""One entry of the build cache: what a stage made, and the fields its key is the digest of.

    entries/<stage>/<key>/entry.json    first line: sha256 of the rest; then fields, value, files with digests
                          <files>       as the stage wrote them

The value is plain JSON and the files are bytes: nothing that is read back can run on the way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 1
NAME = "entry.json"


@dataclasses.dataclass(frozen=True)
class Key:
    """What identifies an entry: the stage, the item it was for (an engine's name), and everything it depends on."""

    stage: str
    item: str
    fields: Mapping[str, Any]

    def digest(self) -> str:
        """Hexadecimal sha256 of the canonical JSON of format, stage and fields."""
        return hashlib.sha256(_canonical([FORMAT, self.stage, self.item, self.fields])).hexdigest()

    def flat(self) -> dict[str, Any]:
        """The fields by dotted name, for comparing two keys."""
        return flatten(self.fields)


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of an entry: name in its folder, size in bytes, chunked digest (artifacts/fingerprint.py)."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry's record, as `entry.json` holds it."""

    key: str
    stage: str
    item: str
    fields: dict[str, Any]
    value: Any
    files: tuple[StoredFile, ...]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """The content of `entry.json`."""
        body = _canonical({"format": FORMAT, **dataclasses.asdict(self)})
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, raw: bytes) -> Entry:
        """Read `entry.json`.

        Raises:
            ValueError: it is not what was written, or of another format.
        """
        head, _, body = raw.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != head:
            raise ValueError("its record's digest differs")
        data = json.loads(body)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError("it is of another format")
        try:
            files = tuple(StoredFile(**file) for file in data.pop("files"))
            return cls(files=files, **data)
        except (TypeError, KeyError) as error:
            raise ValueError(f"its record lacks a part: {error}") from error


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted name."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= flatten(item, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = list(item) if isinstance(item, tuple) else item
    return found


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
