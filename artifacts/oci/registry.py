"""A registry as a place for blobs and manifests: of the OCI distribution specification 1.1 what artifacts need."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import ResourceError, UsageError, VerificationError
from ..strict import quote
from .http import Answer, Http, reading
from .image import MANIFEST_TYPE, MAX_MANIFEST_BYTES, Blob, digest_of

CHUNK_BYTES = 16 << 20
PIECE_BYTES = 1 << 20
_RETRIES = 3


class Registry:
    """One repository of a registry. Digests of what it sends are the caller's to compare."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def manifest(self, wanted: str) -> bytes:
        """The manifest under a tag or digest, not compared with anything yet.

        Raises:
            UsageError: there is none. ResourceError: the registry fails. VerificationError: it sends too much.
        """
        answer = self._http.request("GET", f"{self._http.base}manifests/{wanted}", {"Accept": MANIFEST_TYPE})
        content = answer.read(MAX_MANIFEST_BYTES)
        if answer.status == 404:
            where = f"{self._http.base}manifests/{wanted}"
            raise UsageError("there is no such artifact in the registry", where, "check name, tag and digest")
        _expect(answer, 200)
        said = answer.headers.get("docker-content-digest", digest_of(content))
        if said.startswith("sha256:") and said != digest_of(content):
            why = f"it says {quote(said)}, and sends {digest_of(content)}"
            raise VerificationError("the registry's manifest is not the one it names", why, "try again, or elsewhere")
        return content

    def read(self, blob: Blob, start: int) -> Iterator[bytes]:
        """The bytes of a blob from `start` on; from 0 if the registry cannot begin elsewhere, after an empty piece.

        Raises:
            ResourceError: the registry has no such blob, or the connection breaks.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        answer = self._http.request("GET", f"{self._http.base}blobs/{blob.digest}", headers)
        with answer.body:
            if answer.status == 206 and start:
                begins = answer.headers.get("content-range", "")
                if not begins.startswith(f"bytes {start}-"):
                    raise ResourceError("the registry sends another part than asked for", quote(begins), "try again")
            else:
                _expect(answer, 200)
                if start:
                    yield b""
            while piece := reading(answer.url, lambda: answer.body.read(PIECE_BYTES)):
                yield piece

    def has(self, blob: Blob) -> bool:
        """Whether the registry says that it holds this blob."""
        answer = self._http.request("HEAD", f"{self._http.base}blobs/{blob.digest}")
        answer.close()
        return answer.status == 200

    def write(self, blob: Blob, file: BinaryIO) -> None:
        """Upload a blob in chunks; after a broken connection the registry is asked where to go on.

        Raises:
            ResourceError: the registry refuses, or keeps failing.
        """
        answer = self._http.request("POST", f"{self._http.base}blobs/uploads/", body=b"")
        answer.close()
        _expect(answer, 202)
        place, position, failures = self._location(answer), 0, 0
        while position < blob.size:
            file.seek(position)
            chunk = file.read(CHUNK_BYTES)
            if not chunk:
                raise VerificationError(f"{blob.path} changed while it was read", "it became shorter", "push again")
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Range": f"{position}-{position + len(chunk) - 1}",
            }
            try:
                answer = self._http.request("PATCH", place, headers, chunk)
                answer.close()
                _expect(answer, 202)
                place, position = self._location(answer), position + len(chunk)
            except ResourceError:
                failures += 1
                if failures > _RETRIES:
                    raise
                place, position = self._ask_again(place)
        separator = "&" if urllib.parse.urlsplit(place).query else "?"
        answer = self._http.request("PUT", f"{place}{separator}digest={urllib.parse.quote(blob.digest)}", body=b"")
        answer.close()
        _expect(answer, 201)

    def write_manifest(self, wanted: str, content: bytes) -> None:
        """Put a manifest under a tag or its digest: the last step of a push."""
        url = f"{self._http.base}manifests/{wanted}"
        answer = self._http.request("PUT", url, {"Content-Type": MANIFEST_TYPE}, content)
        answer.close()
        _expect(answer, 201)

    def _ask_again(self, place: str) -> tuple[str, int]:
        """Where an upload stands, by the registry's account: (address, bytes it has)."""
        answer = self._http.request("GET", place)
        answer.close()
        _expect(answer, 204)
        last = answer.headers.get("range", "").rpartition("-")[2]
        if not last.isdecimal() or len(last) > 18:
            raise ResourceError("the registry lost an upload", f"it says {quote(last)}", "push again")
        return self._location(answer, place), int(last) + 1 if int(last) else 0

    def _location(self, answer: Answer, default: str = "") -> str:
        place = answer.headers.get("location", default)
        if not place:
            raise ResourceError("the registry does not say where to upload", answer.url, "use another registry")
        place = urllib.parse.urljoin(answer.url, place)
        self._http.check_url(place)
        return place


def _expect(answer: Answer, status: int) -> None:
    if answer.status == status:
        return
    said = b"" if answer.body.closed else reading(answer.url, lambda: answer.body.read(500))
    answer.close()
    text = quote(said.decode("utf-8", "replace"), 300)
    why = f"{answer.status} where {status} belongs, for {quote(answer.url, 200)} {text}"
    raise ResourceError("the registry does not do what was asked", why, "try again; it goes on where it stopped")
