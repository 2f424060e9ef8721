"""Push and pull: whole artifacts between a folder and a registry, an OCI layout folder, or another folder.

A pull writes beside its destination, digests what streams past, and publishes only an artifact that is intact. What has
arrived stays there when it breaks off, so that the next pull asks for the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import ResourceError, UsageError, VerificationError
from ..files import open_plain, os_errors
from ..folder import scan
from ..manifest import Manifest
from ..staging import sync_file
from ..store import OpenArtifact, open_artifact
from ..writer import check_destination
from .http import Http, stored_credentials
from .image import Blob, Image, digest_of, make_image, read_image
from .layout import Layout
from .reference import Reference
from .registry import Registry
from .work import publish, pull_folder

Told = Callable[[str, int], None]  # a file's path, and how many bytes of it have come since the last call
_RETRIES = 3


class Place(Protocol):
    """What a registry and a layout folder both are."""

    def manifest(self, wanted: str) -> bytes: ...

    def read(self, blob: Blob, start: int) -> Iterator[bytes]: ...

    def has(self, blob: Blob) -> bool: ...

    def write(self, blob: Blob, file: BinaryIO) -> None: ...

    def write_manifest(self, wanted: str, content: bytes) -> None: ...


class Folder:
    """An artifact's own folder as a place to pull from."""

    def __init__(self, root: Path) -> None:
        self._artifact = open_artifact(root, "sizes")

    def manifest(self, wanted: str) -> bytes:
        return make_image(self._artifact.root, self._artifact.manifest)[0].content

    def read(self, blob: Blob, start: int) -> Iterator[bytes]:
        with open_plain(self._artifact.root / blob.path) as descriptor, os_errors(f"cannot read {blob.path}"):
            while piece := os.pread(descriptor, 1 << 20, start):
                yield piece
                start += len(piece)

    def has(self, blob: Blob) -> bool:
        return True

    def write(self, blob: Blob, file: BinaryIO) -> None:
        raise UsageError("a folder is copied as a whole", "", "use `ingot push DIR dir:FOLDER`")

    def write_manifest(self, wanted: str, content: bytes) -> None:
        raise UsageError("a folder is copied as a whole", "", "use `ingot push DIR dir:FOLDER`")


def open_place(reference: Reference, plain_http: bool = False) -> Place:
    """The place that a reference names."""
    if reference.folder is not None:
        return Folder(reference.folder)
    if reference.layout is not None:
        return Layout(reference.layout)
    return Registry(Http(reference, plain_http, stored_credentials(reference.host)))


def push(root: Path, reference: Reference, told: Told, plain_http: bool = False) -> Image:
    """Push an intact artifact; what the place holds already is not sent again, and the manifest comes last.

    Args:
        reference: with a digest, nothing is pushed unless the artifact gives just that image.

    Raises:
        UsageError, VerificationError, ResourceError: no artifact there, not intact, or the place refuses.
    """
    artifact = open_artifact(root)
    image, config = make_image(artifact.root, artifact.manifest)
    if reference.digest and reference.digest != image.digest:
        why = f"this artifact is {image.digest}"
        raise UsageError(f"{root} is not what {reference} pins", why, "leave the digest out, or push another artifact")
    if reference.folder is not None:
        pull(Reference(folder=artifact.root), reference.folder, told)
        return image
    place = open_place(reference, plain_http)
    if not place.has(image.config):
        with _memory_file(config) as file:
            place.write(image.config, file)
    for layer in image.layers:
        if not place.has(layer):
            with open_plain(artifact.root / layer.path) as descriptor, open(descriptor, "rb", closefd=False) as file:
                place.write(layer, file)
        told(layer.path, layer.size)
    place.write_manifest(reference.tag or image.digest, image.content)
    return image


def pull(
    reference: Reference,
    output: Path,
    told: Told,
    *,
    force: bool = False,
    plain_http: bool = False,
    accept: Callable[[OpenArtifact], None] = lambda artifact: None,
) -> tuple[Image, Manifest]:
    """Fetch an artifact into the folder `output`, which is as before until all of it is there and intact.

    Args:
        reference: with a digest, whatever a tag says by now counts for nothing.
        told: how far it is.
        force: replace an artifact there that is damaged.
        accept: raises to refuse an artifact that is whole, for example for its signature.

    Raises:
        UsageError: no such artifact, or `output` is not ours to write. VerificationError: what came is not what was
            named, or no intact artifact. ResourceError: the network or the disk fails; the next pull goes on.
    """
    output = Path(os.path.abspath(output))
    check_destination(output, force)
    place = open_place(reference, plain_http)
    content = place.manifest(reference.wanted)
    if reference.digest and digest_of(content) != reference.digest:
        why = f"what came is {digest_of(content)}"
        raise VerificationError(
            f"{reference} is not what it pins", why, "do not use this registry, or check the digest"
        )
    image = read_image(content, f"the manifest of {reference}")
    with os_errors(f"cannot write beside {output}"), pull_folder(output) as work:
        root = work / "new"
        root.mkdir(exist_ok=True)
        _tidy(root, image)
        _check_space(root, image)
        for layer in image.layers:
            fetch(place, layer, root / layer.path, told)
        artifact = open_artifact(root)
        accept(artifact)
        publish(work, output, replace=check_destination(output, force))
    return image, artifact.manifest


def fetch(place: Place, blob: Blob, path: Path, told: Told) -> None:
    """Bring one file to `path`, or the rest of it where a part is there already; its digest is compared on the way.

    Raises:
        VerificationError: too many bytes, or other ones than the digest names; what came is removed.
        ResourceError: it broke off several times without getting on; what came is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        try:
            _stream(place, blob, path, told)
            return
        except ResourceError:
            moved = path.exists() and path.stat().st_size > before
            failures = 0 if moved else failures + 1
            if failures > _RETRIES or not isinstance(place, Registry):
                raise


def _stream(place: Place, blob: Blob, path: Path, told: Told) -> None:
    with open(path, "a+b") as file:
        digest, position = _digest_part(file, blob)
        if position < blob.size:
            for piece in place.read(blob, position):
                if not piece:  # the place cannot begin in the middle
                    file.truncate(0)
                    digest, position = hashlib.sha256(), 0
                    continue
                position += len(piece)
                if position > blob.size:
                    break
                file.write(piece)
                digest.update(piece)
                told(blob.path, len(piece))
        if position < blob.size:
            file.flush()
            why = f"{position} of {blob.size} bytes came"
            raise ResourceError(f"{blob.path} broke off", why, "pull again: it goes on where it stopped")
        if position > blob.size or f"sha256:{digest.hexdigest()}" != blob.digest:
            file.truncate(0)
            why = "more bytes came than it has" if position > blob.size else "its digest is another one"
            raise VerificationError(f"{blob.path} is not what its digest names", why, "pull again, or from elsewhere")
    sync_file(path)


def _digest_part(file: BinaryIO, blob: Blob) -> tuple[hashlib._Hash, int]:
    """The digest and length of what an earlier pull left; nothing if that is too long, or whole and wrong."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(1 << 20):
        digest.update(piece)
    position = file.tell()
    if position > blob.size or (position == blob.size and f"sha256:{digest.hexdigest()}" != blob.digest):
        file.truncate(0)
        return hashlib.sha256(), 0
    return digest, position


def _tidy(root: Path, image: Image) -> None:
    """Remove what an earlier pull of another artifact left; only plain files of this one stay."""
    wanted = {layer.path for layer in image.layers}
    folders = {parent.as_posix() for path in wanted for parent in Path(path).parents}
    for path, status in sorted(scan(root).items(), reverse=True):
        place = root / path
        if stat.S_ISDIR(status.st_mode):
            if path not in folders:
                shutil.rmtree(place, ignore_errors=True)
        elif path not in wanted or not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            with contextlib.suppress(FileNotFoundError):
                place.unlink()


def _check_space(root: Path, image: Image) -> None:
    have = sum(status.st_size for status in scan(root).values())
    missing = sum(layer.size for layer in image.layers) - have
    free = shutil.disk_usage(root).free
    if missing > free:
        why = f"{missing} bytes are to come, {free} are free"
        raise ResourceError(f"there is no room beside {root.parent}", why, "free some space, or pull to another disk")


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[BinaryIO]:
    yield io.BytesIO(content)
