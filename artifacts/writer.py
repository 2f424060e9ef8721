"""Writing an artifact: aside, synced, manifest last, published by one rename. The old one or the new one, never less.

The staging folder stands next to the destination (a rename works within one file system only):

    .demo.ingot-<pid>-<random>/   ingot-staging   marker, locked while its process lives; without it nothing is removed
                                  new/            the artifact being written
                                  old/            the artifact it replaced, on its way out

A finished artifact is swapped with an old one in a single step (renameat2 with RENAME_EXCHANGE); where the system has
no such call, the old one moves to old/ and the new one in, and the next build mends a kill between the two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from . import strict
from .errors import ResourceError, UsageError, VerificationError
from .files import FIXES, os_errors, read_small, resource_error
from .fingerprint import digest_files
from .folder import compare_entries, scan
from .manifest import FILE_NAME, UNLISTED, FileEntry, Manifest, load_manifest
from .staging import Staging, swap, sync_file, sync_folder

_ELSEWHERE = "choose another output folder, or move this one away"


class ArtifactWriter:
    """Writes one artifact: fill `root`, then `commit`. Leaving the block without a commit leaves no trace.

        with ArtifactWriter("artifacts/built/demo") as writer:
            (writer.root / "tokenizer.json").write_text(...)
            manifest = writer.commit(manifest_without_files)

    Args:
        destination: the artifact's folder. Absent or empty: filled. An intact artifact of Ingot: replaced. Anything
            else with content is never touched.
        force: replace also an artifact that is damaged, of another schema version, or holds files added to it.
        alone: refuse to start while another process writes to the same destination. Without it the last one wins.

    Raises:
        UsageError: the destination is not ours to write to; on entering, and again on commit.
        ResourceError: the disk is full, read-only or fails, or permission is missing, in the block too.
    """

    def __init__(self, destination: str | Path, force: bool = False, alone: bool = False) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.force, self.alone = force, alone
        self._staging: Staging | None = None
        self._published = False
        self._made: list[Path] = []  # parent folders that were not there before

    @property
    def root(self) -> Path:
        """The staging folder to write into, an absolute path, on the destination's file system."""
        if self._staging is None:
            raise UsageError("the artifact writer is not open", "root is known inside its `with` block only")
        return self._staging.new

    def __enter__(self) -> Self:
        with os_errors(f"cannot prepare the output folder {self.destination}"):
            try:
                check_destination(self.destination, self.force)
                parent = self.destination.parent
                self._made = [folder for folder in (parent, *parent.parents) if not os.path.lexists(folder)]
                parent.mkdir(parents=True, exist_ok=True)
                Staging.sweep(self.destination)
                self._staging = Staging.create(self.destination)
                if self.alone and (process := self._staging.rival()) is not None:
                    raise ResourceError(
                        f"another build is writing to {self.destination}", f"it is process {process}",
                        "wait until it has ended, or choose another output folder",
                    )  # fmt: skip
            except BaseException:
                self._clean_up()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._clean_up()
        if isinstance(error, OSError) and error.errno in FIXES:
            raise resource_error(f"the build of {self.destination} failed", error) from error

    def commit(self, manifest: Manifest, attest: Callable[[Manifest], Mapping[str, bytes]] | None = None) -> Manifest:
        """Digest, sync and publish what stands in `root`; returns the manifest with its list of files.

        Args:
            attest: given the finished manifest, returns the content of unlisted files by path: what can only be said
                of an artifact whose digest is known.

        Raises:
            VerificationError: the manifest or the folder's content would not pass opening; nothing is published.
            UsageError: the destination became something that is not ours; or a second commit.
            ResourceError: the disk failed. The destination is as before, unless only the last sync failed.
        """
        root = self.root
        if self._published:
            raise UsageError("this artifact is committed already", "a writer publishes once", "open another writer")
        with os_errors(f"cannot write the artifact {self.destination}"):
            manifest = dataclasses.replace(manifest, files=_list_files(root))
            text = manifest.to_json()
            Manifest.from_json(text, source="the manifest of this build")
            for path, content in (attest(manifest) if attest else {}).items():
                (root / path).parent.mkdir(exist_ok=True)
                (root / path).write_bytes(content)
            if findings := compare_entries(root, manifest):
                why = "; ".join(map(str, findings))
                raise VerificationError("the build wrote what no artifact may hold", why, "report this as a bug")
            for path in (*(entry.path for entry in manifest.files), *UNLISTED):
                if (root / path).exists():
                    sync_file(root / path)
            with open(root / FILE_NAME, "x", encoding="ascii", newline="\n") as file:
                file.write(text)
            sync_file(root / FILE_NAME)
            for path, status in scan(root).items():
                if stat.S_ISDIR(status.st_mode):
                    sync_folder(root / path)
            sync_folder(root)
            self._publish()
            sync_folder(self.destination.parent)
        return manifest

    def _publish(self) -> None:
        staging = self._staging
        if staging is None:  # `root` has answered already
            return
        for last in (False, False, True):
            try:
                if check_destination(self.destination, self.force):
                    swap(staging.new, self.destination, staging.old)
                else:
                    os.rename(staging.new, self.destination)  # takes the place of an empty folder too
                break
            except OSError as error:
                # Another build of this destination published, or moved its old one aside, since the check: look again.
                if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise
        self._published = True

    def _clean_up(self) -> None:
        if self._staging is not None:
            self._staging.remove()
            self._staging = None
        if not self._published:
            for folder in self._made:
                with contextlib.suppress(OSError):  # someone else uses it by now
                    folder.rmdir()


def check_destination(destination: Path, force: bool) -> bool:
    """Whether an artifact stands at `destination` that may be replaced (True), or nothing at all (False).

    Raises:
        UsageError: what stands there is not ours to replace.
    """
    try:
        mode = os.lstat(destination).st_mode
    except FileNotFoundError:
        return False
    except (NotADirectoryError, ValueError) as error:
        raise UsageError(f"cannot write to {destination}", str(error), "choose another output folder") from error
    if stat.S_ISLNK(mode):
        fix = "name the folder it points to"
        raise UsageError(f"the output {destination} is a symbolic link", "a build replaces whole folders", fix)
    if not stat.S_ISDIR(mode):
        raise UsageError(f"the output {destination} exists and is no folder", "it is not replaced", _ELSEWHERE)
    if not os.listdir(destination):
        return False
    if not _is_artifact(destination):
        why = "it is not empty and holds no manifest of Ingot, so a build never touches it, with --force neither"
        raise UsageError(f"the output folder {destination} is no artifact", why, _ELSEWHERE)
    if not force and (why := _why_not_replace(destination)):
        fix = "pass --force to replace it all the same, or choose another output folder"
        raise UsageError(f"the artifact {destination} is not replaced", why, fix)
    return True


def _is_artifact(folder: Path) -> bool:
    """Whether a manifest of ours stands there, of whatever version, intact or not in the rest."""
    try:
        value = strict.read_json(read_small(folder / FILE_NAME, strict.MAX_BYTES), FILE_NAME)
    except VerificationError:
        return False
    return isinstance(value, dict) and {"schema_version", "ingot_version", "engines", "files"} <= value.keys()


def _why_not_replace(folder: Path) -> str:
    """What would be lost besides an artifact that Ingot made; empty when nothing would."""
    try:
        findings = compare_entries(folder, load_manifest(folder))
    except VerificationError as error:
        return error.why or error.what
    return "; ".join(str(finding) for finding in findings)


def _list_files(root: Path) -> tuple[FileEntry, ...]:
    """Every file in the staging folder but the unlisted ones, with size and digest; empty folders are removed."""
    entries = scan(root)
    for path in sorted((path for path, status in entries.items() if stat.S_ISDIR(status.st_mode)), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(root / path)
    paths = [path for path, status in entries.items() if not stat.S_ISDIR(status.st_mode) and path not in UNLISTED]
    digests = digest_files(root / path for path in paths)
    return tuple(FileEntry(path, entries[path].st_size, digests[root / path]) for path in sorted(paths))
