"""An OCI layout folder as a place for blobs and manifests: the same as a registry, on a disk or a stick."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UsageError, VerificationError
from ..files import open_plain, os_errors, read_small, replace_file
from ..strict import read_json
from .image import ARTIFACT_TYPE, MANIFEST_TYPE, MAX_MANIFEST_BYTES, Blob, digest_of

_TAG_KEY = "org.opencontainers.image.ref.name"
_VERSION = b'{"imageLayoutVersion": "1.0.0"}\n'


class Layout:
    """One layout folder; `write` and `write_manifest` make it. Digests of what it holds are the caller's to compare."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def manifest(self, wanted: str) -> bytes:
        """The manifest under a tag or digest. Errors: as `Registry.manifest`."""
        digest = wanted if wanted.startswith("sha256:") else self._tagged(wanted)
        return read_small(self._place(digest), MAX_MANIFEST_BYTES)

    def read(self, blob: Blob, start: int) -> Iterator[bytes]:
        """The bytes of a blob from `start` on."""
        with open_plain(self._place(blob.digest)) as descriptor, os_errors(f"cannot read from {self.root}"):
            while piece := os.pread(descriptor, 1 << 20, start):
                yield piece
                start += len(piece)

    def has(self, blob: Blob) -> bool:
        """Whether the folder holds a file of that digest's name and of that size."""
        place = self._place(blob.digest)
        return place.is_file() and not place.is_symlink() and place.stat().st_size == blob.size

    def write(self, blob: Blob, file: BinaryIO) -> None:
        """Copy a blob in, aside first."""
        place = self._place(blob.digest)
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        with os_errors(f"cannot write to {self.root}"):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(aside, "wb") as target:
                    file.seek(0)
                    shutil.copyfileobj(file, target, 1 << 20)
                    target.flush()
                    os.fsync(target.fileno())
                os.replace(aside, place)
            finally:
                aside.unlink(missing_ok=True)

    def write_manifest(self, wanted: str, content: bytes) -> None:
        """Put a manifest under a tag, or under its digest alone; what had the tag loses it."""
        digest = digest_of(content)
        replace_file(self._place(digest), content)
        entries = [entry for entry in self._index() if entry.get("annotations", {}).get(_TAG_KEY) != wanted]
        entry: dict[str, Any] = {
            "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE, "digest": digest, "size": len(content),
        }  # fmt: skip
        if not wanted.startswith("sha256:"):
            entry["annotations"] = {_TAG_KEY: wanted}
        entries.append(entry)
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries}
        replace_file(self.root / "oci-layout", _VERSION)
        replace_file(self.root / "index.json", (json.dumps(index, indent=1) + "\n").encode())

    def _tagged(self, tag: str) -> str:
        found = [e.get("digest") for e in self._index() if e.get("annotations", {}).get(_TAG_KEY) == tag]
        if not found or not isinstance(found[0], str):
            raise UsageError(
                f"there is no {tag!a} in {self.root}", "its index names no such tag", "check folder and tag"
            )
        return found[0]

    def _index(self) -> list[dict[str, Any]]:
        source = self.root / "index.json"
        if not source.exists():
            return []
        value = read_json(read_small(source, MAX_MANIFEST_BYTES), str(source))
        entries = value.get("manifests") if isinstance(value, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and isinstance(e.get("annotations", {}), dict) for e in entries
        ):
            raise VerificationError(
                f"{source} is no index", "there is no list of manifests in it", "use another folder"
            )
        return entries

    def _place(self, digest: str) -> Path:
        kind, _, name = digest.partition(":")
        if kind != "sha256" or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
            raise VerificationError(
                f"{self.root} holds a bad digest", f"{digest[:80]!a} is not sha256", "use another one"
            )
        return self.root / "blobs" / "sha256" / name
