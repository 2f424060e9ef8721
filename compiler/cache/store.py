"""The build cache on disk: entries by key, written aside and renamed, verified on read, quarantined when damaged.

    <folder>/ingot-cache                marker; without it nothing here is ever removed
             entries/<stage>/<key>/     see entry.py
             aside/<key>/               being written, by whoever holds the key's lock
             locks/<key>                see locks.py
             quarantine/                damaged entries, out of the way

What it holds becomes native code in artifacts, so a folder that somebody else could write to is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...artifacts.errors import UsageError, VerificationError
from ...artifacts.files import os_errors, read_small
from ...artifacts.fingerprint import digest_files
from ...artifacts.staging import sync_file, sync_folder
from .entry import NAME, Entry, Key, StoredFile
from .locks import locked, try_locked
from .place import place

MARKER = "ingot-cache"
_WORDS = b"Ingot keeps what builds made here, and removes it. Format 1.\n"
_MAX_RECORD_BYTES = 256 << 20
_KEY = re.compile(r"[0-9a-f]{64}")
_STAGE = re.compile(r"[a-z]+")
_SAFE = "choose a folder of your own with --cache-dir, or build with --no-cache"


class CacheStore:
    """The entries below one folder, which is made if it is missing.

    Raises:
        UsageError: the folder holds other things, or others can write to it.
        ResourceError: the system does not let us make or use it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        with os_errors(f"the build cache {self.folder} cannot be used"):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            _refuse_others(self.folder)
            self._mark()
            for name in ("entries", "aside", "locks", "quarantine"):
                with contextlib.suppress(FileExistsError):
                    (self.folder / name).mkdir(mode=0o700)

    def lock(self, key: str, shared: bool = False, waiting: Callable[[], None] = lambda: None) -> Any:
        """The lock of one key, as a context: see `locked`."""
        return locked(self.folder / "locks" / key, shared, waiting)

    def try_lock(self, key: str) -> Any:
        """The lock of one key if it is free, as a context that tells: see `try_locked`."""
        return try_locked(self.folder / "locks" / key)

    def path(self, stage: str, key: str) -> Path:
        """Where an entry stands, if there is one."""
        return self.folder / "entries" / stage / key

    def read(self, stage: str, key: str) -> Entry | None:
        """An entry's record; None if there is none. A damaged one is quarantined. Hold the key's lock."""
        folder = self.path(stage, key)
        if not os.path.lexists(folder / NAME):
            return None
        try:
            entry = Entry.from_bytes(read_small(folder / NAME, _MAX_RECORD_BYTES))
            if (entry.stage, entry.key) != (stage, key):
                raise ValueError("it stands under another key")
        except (ValueError, RecursionError, VerificationError):
            self.quarantine(stage, key)
            return None
        return entry

    def restore(self, entry: Entry, targets: Mapping[str, Path], share: bool = False) -> bool:
        """Put an entry's files at `targets` (file name -> path) and verify them; False if one is damaged.

        Args:
            share: the files may be hard links of the cache's own: for data that nobody writes to, never for code.

        Raises:
            OSError: the disk failed.
        """
        folder = self.path(entry.stage, entry.key)
        wanted = {targets[file.name]: file for file in entry.files if file.name in targets}
        try:
            for target, file in wanted.items():
                place(folder / file.name, target, share)
            digests = digest_files(wanted)
            sound = all(
                digests[path] == file.sha256 and path.stat().st_size == file.size for path, file in wanted.items()
            )
        except (FileNotFoundError, VerificationError):
            sound = False
        if not sound or len(wanted) != len(targets):
            for target in wanted:
                target.unlink(missing_ok=True)
            self.quarantine(entry.stage, entry.key)
            return False
        self.touch(entry)
        return True

    def touch(self, entry: Entry) -> None:
        """Note that an entry was used now; a cache that cannot be written to only forgets that."""
        with contextlib.suppress(OSError):
            os.utime(self.path(entry.stage, entry.key) / NAME)

    def keep(self, key: Key, value: Any, files: Mapping[str, Path], share: bool = False) -> Entry:
        """Store what a stage made. Hold the key's lock exclusively.

        Args:
            value: plain JSON; files: name in the entry -> where it stands now.

        Raises:
            OSError, VerificationError: the disk failed or a file changed; nothing is stored.
        """
        digest = key.digest()
        aside, target = self.folder / "aside" / digest, self.path(key.stage, digest)
        shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed while it wrote
        try:
            aside.mkdir(mode=0o700)
            for name, source in files.items():
                place(source, aside / name, share)
            digests = digest_files(aside / name for name in files)
            stored = tuple(StoredFile(n, (aside / n).stat().st_size, digests[aside / n]) for n in sorted(files))
            entry = Entry(digest, key.stage, key.item, dict(key.fields), value, stored)
            with open(aside / NAME, "xb") as file:
                file.write(entry.to_bytes())
            for name in (*files, NAME):
                sync_file(aside / name)
            sync_folder(aside)
            with contextlib.suppress(FileExistsError):
                target.parent.mkdir(mode=0o700)
                sync_folder(target.parent.parent)
            if os.path.lexists(target):  # without a record, or it would have been found
                self.quarantine(key.stage, digest)
            os.rename(aside, target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return entry

    def quarantine(self, stage: str, key: str) -> None:
        """Move a damaged entry out of the way; it stays for whoever wants to know, until `gc`."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path(stage, key), self.folder / "quarantine" / f"{stage}-{key}-{secrets.token_hex(4)}")

    def verify(self, entry: Entry) -> bool:
        """Whether an entry's files are what was stored; one that is not is quarantined. Hold the key's lock."""
        folder = self.path(entry.stage, entry.key)
        try:
            digests = digest_files(folder / file.name for file in entry.files)
        except VerificationError:
            digests = {}
        if all(digests.get(folder / file.name) == file.sha256 for file in entry.files):
            return True
        self.quarantine(entry.stage, entry.key)
        return False

    def entries(self, stage: str | None = None) -> Iterator[tuple[str, str]]:
        """(stage, key) of all entries, or those of one stage."""
        base = self.folder / "entries"
        for name in [stage] if stage is not None else sorted(n for n in os.listdir(base) if _STAGE.fullmatch(n)):
            with contextlib.suppress(FileNotFoundError):
                yield from ((name, key) for key in sorted(os.listdir(base / name)) if _KEY.fullmatch(key))

    def _mark(self) -> None:
        marker = self.folder / MARKER
        try:
            if read_small(marker, 4096) == _WORDS:
                return
            why = "its marker is of another format"
        except VerificationError:
            left = sorted(name for name in os.listdir(self.folder) if not name.startswith(f"{MARKER}."))
            if not left:
                aside = self.folder / f"{MARKER}.{secrets.token_hex(4)}"  # of its own: several may mark at once
                aside.write_bytes(_WORDS)
                sync_file(aside)
                os.replace(aside, marker)
                sync_folder(self.folder)
                return
            if _read_again(marker) == _WORDS:  # another process has marked it meanwhile
                return
            why = f"it holds {left[0]!a}, which is not of the build cache"
        raise UsageError(f"{self.folder} is no build cache", why, _SAFE)


def _read_again(marker: Path) -> bytes:
    """The marker's content, empty if there is still none."""
    with contextlib.suppress(VerificationError):
        return read_small(marker, 4096)
    return b""


def _refuse_others(folder: Path) -> None:
    """Raise UsageError unless only this user can change what stands in `folder`, or put another in its place."""
    status = os.lstat(folder)
    what = f"the build cache {folder} is refused"
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(what, "it is no folder", _SAFE)
    if status.st_uid != os.geteuid():
        raise UsageError(what, f"it belongs to another user (number {status.st_uid})", _SAFE)
    if status.st_mode & 0o022:
        why = "others can write to it, and what it holds becomes native code"
        raise UsageError(what, why, f"chmod go-w {folder}, or {_SAFE}")
    for parent in folder.resolve().parents:
        mode = os.stat(parent).st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            raise UsageError(what, f"everybody can put another folder in its place (in {parent})", _SAFE)
