"""What stands in an artifact's folder, against what its manifest lists: kinds, links, sizes, digests.

Shared by opening (store.py) and writing (writer.py). Differences are collected as findings, so that a user sees all
of them at once. Nothing is opened that is not a plain file, and no symlink is followed below the root.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from .errors import VerificationError
from .files import kind_of, os_errors
from .fingerprint import digest_files
from .manifest import FILE_NAME, UNLISTED, FileEntry, Manifest

MAX_ENTRIES = 1 << 17
_INTACT = "fetch an intact copy of the artifact, or build it again with `ingot build`"
_CLEAN = "remove it, or fetch an intact copy of the artifact"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing wrong with an artifact: where (a path inside it, or empty), what, and what to do."""

    path: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


def scan(root: Path, folders: Iterable[str] | None = None) -> dict[str, os.stat_result]:
    """Every entry below `root` by its path with '/', folders included, as `lstat` sees it.

    Only `folders` are looked into (all, if None): what lies in a foreign folder does not matter, that it is there does.

    Raises:
        VerificationError: so many entries that this cannot be an artifact.
        ResourceError: the system does not let us look.
    """
    wanted = None if folders is None else set(folders)
    entries: dict[str, os.stat_result] = {}
    waiting = [""]
    with os_errors(f"cannot look into {root}"):
        while waiting:
            prefix = waiting.pop()
            with os.scandir(root / prefix) as listing:
                for item in listing:
                    path = f"{prefix}/{item.name}" if prefix else item.name
                    entries[path] = item.stat(follow_symlinks=False)
                    if len(entries) > MAX_ENTRIES:
                        why = f"it holds more than {MAX_ENTRIES} files"
                        raise VerificationError(f"{root} is not an Ingot artifact", why, _INTACT)
                    if stat.S_ISDIR(entries[path].st_mode) and (wanted is None or path in wanted):
                        waiting.append(path)
    return entries


def compare_entries(root: Path, manifest: Manifest) -> list[Finding]:
    """Missing, extra, linked, foreign and wrongly sized entries of the folder `root`, in the order of their paths.

    Hard links are refused for native code only: through its other name a file that was verified can be written
    without touching this folder. Data is digested and never executed, and stores that deduplicate link it with reason.
    """
    expected = {entry.path: entry for entry in manifest.files}
    folders = _folders([*expected, *UNLISTED])
    entries = scan(root, folders)
    native = manifest.native_code()
    findings = [Finding(path, "missing", _INTACT) for path in expected if path not in entries]
    for path, status in entries.items():
        shown = path if path.isascii() and path.isprintable() else ascii(path)
        if path in folders:
            if not stat.S_ISDIR(status.st_mode):
                findings.append(Finding(shown, f"not a folder but {kind_of(status.st_mode)}", _INTACT))
        elif path not in expected and path not in (FILE_NAME, *UNLISTED):
            findings.append(Finding(shown, f"extra: {kind_of(status.st_mode)} that the manifest does not list", _CLEAN))
        elif not stat.S_ISREG(status.st_mode):
            findings.append(Finding(shown, f"not a plain file but {kind_of(status.st_mode)}", _INTACT))
        elif path in expected and status.st_size != (size := expected[path].size):
            findings.append(Finding(shown, f"wrong size: {status.st_size} bytes instead of {size}", _INTACT))
        elif path in native and status.st_nlink > 1:
            problem = f"native code with {status.st_nlink} hard links: it could be changed through another name"
            findings.append(Finding(shown, problem, "copy the artifact (`cp -r`), without hard links"))
    return sorted(findings, key=lambda finding: finding.path)


def compare_digests(root: Path, entries: Iterable[FileEntry]) -> list[Finding]:
    """The files whose digest is not the manifest's, in the order of `entries`.

    Raises:
        VerificationError, ResourceError: as `digest_files`.
    """
    expected = {root / entry.path: entry for entry in entries}
    digests = digest_files(expected)
    wrong = [entry for path, entry in expected.items() if digests[path] != entry.sha256]
    return [Finding(entry.path, "wrong digest: its content is not what was built", _INTACT) for entry in wrong]


def _folders(paths: Iterable[str]) -> set[str]:
    return {parent.as_posix() for path in paths for parent in Path(path).parents} - {"."}
