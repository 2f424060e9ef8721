"""Opening an artifact: nothing in the folder is trusted until manifest, file list, sizes and digests agree.

The order is fixed: manifest (JSON, schema version, types), the folder's entries (links, kinds, missing, extra, sizes),
digests; then the caller asks `require_target`, and only then may native code be loaded. `ArtifactWriter`, the way in,
lives in writer.py. Once open, the folder must stay as it is: whoever may write to it may also replace verified code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from .errors import UsageError, VerificationError
from .files import os_errors, read_small
from .fingerprint import digest_bytes
from .folder import Finding, compare_digests, compare_entries
from .manifest import FILE_NAME, Manifest, load_manifest
from .target import check_target
from .writer import ArtifactWriter

__all__ = ["ArtifactWriter", "Finding", "OpenArtifact", "check", "open_artifact"]

_SHOWN = 20  # findings named in one error


@dataclasses.dataclass(frozen=True)
class OpenArtifact:
    """An artifact whose manifest, entries and sizes were checked, and its digests too if opened with "full".

    `unread` names files whose digests were left to whoever reads them: weights that are digested on their way to a
    device. Nothing of an artifact may run before these are compared too.
    """

    root: Path
    manifest: Manifest
    unread: frozenset[str] = frozenset()

    def path(self, relative: str) -> Path:
        """The place of a file the manifest lists.

        Raises:
            VerificationError: the manifest does not list it, so nothing is known about its content.
        """
        if all(entry.path != relative for entry in self.manifest.files):
            why = "the manifest does not list it"
            raise VerificationError(f"{self.root}: no file {relative!a} in this artifact", why, "check the name")
        return self.root / relative

    def read(self, relative: str) -> bytes:
        """The content of a file the manifest lists, from the very bytes whose digest was compared.

        Raises:
            VerificationError: it is not listed, or not what was built.
        """
        size, sha256 = next(((f.size, f.sha256) for f in self.manifest.files if f.path == relative), (0, ""))
        content = read_small(self.path(relative), size)
        if digest_bytes(content) != sha256:
            raise VerificationError(
                f"{relative} is not what was built", "its digest differs", "build the artifact again"
            )
        return content

    def verify(self, relatives: Iterable[str]) -> None:
        """Digest these listed files now: after opening with "sizes", or once more right before use.

        Raises:
            VerificationError: one is not listed, missing, or its content is not what was built; names all of these.
        """
        wanted = {self.path(relative).relative_to(self.root).as_posix() for relative in relatives}
        entries = [entry for entry in self.manifest.files if entry.path in wanted]
        _refuse(self.root, compare_digests(self.root, entries))


def open_artifact(path: str | Path, verify: Literal["full", "sizes"] = "full") -> OpenArtifact:
    """Open the artifact in the folder `path`; runs nothing and does not ask whether it fits this machine.

    Args:
        path: the artifact's folder (itself possibly reached through a symlink).
        verify: "full" digests every file. "sizes" leaves the digests out: for looking at an artifact, or for a caller
            that digests what it uses (`OpenArtifact.verify`, or chunk by chunk while streaming).

    Raises:
        UsageError: `path` is no folder.
        VerificationError: something is wrong; names everything found at the first stage that fails.
        ResourceError: the system does not let us read it.
    """
    if verify not in ("full", "sizes"):
        raise UsageError(f"cannot verify {verify!r}", "verify is one of: full, sizes", "open the artifact with 'full'")
    root = _find(path)
    manifest = load_manifest(root / FILE_NAME)
    _refuse(root, compare_entries(root, manifest))
    if verify == "full":
        _refuse(root, compare_digests(root, manifest.files))
    return OpenArtifact(root, manifest)


def check(path: str | Path) -> list[Finding]:
    """Everything wrong with the artifact in the folder `path`, its fit to this machine included; empty when it is fine.

    Stops early only where going on makes no sense: without a valid manifest nothing is known about the files.

    Raises:
        UsageError: `path` is no folder.
        ResourceError: the system does not let us read it.
    """
    root = _find(path)
    try:
        manifest = load_manifest(root / FILE_NAME)
        findings = compare_entries(root, manifest)
    except VerificationError as error:
        return [Finding(FILE_NAME, error.why or error.what, error.fix)]
    wrong = {finding.path for finding in findings}
    # Only entries found sound are opened; those under a linked folder count as missing already.
    try:
        findings += compare_digests(root, [entry for entry in manifest.files if entry.path not in wrong])
    except VerificationError as error:  # changed between the two looks
        findings.append(Finding("", error.what, error.fix))
    findings += [
        Finding("", f"does not fit this machine: {reason}", "run it on one that fits, or build it again here")
        for reason in check_target(manifest.target)
    ]
    return findings


def _find(path: str | Path) -> Path:
    """The artifact's folder as an absolute path without symlinks."""
    fix = "name the folder that `ingot build -o` wrote"
    with os_errors(f"cannot look at {path}"):
        try:
            root = Path(path).resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError, RuntimeError, ValueError) as error:  # a loop; a NUL in the path
            raise UsageError(f"there is no artifact at {str(path)!a}", str(error), fix) from error
        if not root.is_dir():
            raise UsageError(f"{path} is not an artifact", "an artifact is a folder", fix)
        if not (root / FILE_NAME).exists() and not (root / FILE_NAME).is_symlink():
            raise VerificationError(f"{path} is not an Ingot artifact", f"there is no {FILE_NAME} in it", fix)
    return root


def _refuse(root: Path, findings: list[Finding]) -> None:
    """Raise one VerificationError for all findings, if there are any."""
    if not findings:
        return
    lines = [str(finding) for finding in findings[:_SHOWN]]
    if len(findings) > _SHOWN:
        lines.append(f"and {len(findings) - _SHOWN} more; `ingot verify` lists all")
    what = f"{root} is not intact: {findings[0]}" if len(findings) == 1 else f"{root}: {len(findings)} files are wrong"
    fixes = list(dict.fromkeys(finding.fix for finding in findings))
    raise VerificationError(what, "; ".join(lines), "; ".join(fixes))
