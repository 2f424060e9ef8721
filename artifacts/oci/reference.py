"""Where an artifact is pushed to or pulled from: a registry, an OCI layout folder, or a plain folder."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ..errors import UsageError

_HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_NAME = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_DIGEST = r"sha256:[0-9a-f]{64}"
_REFERENCE = re.compile(rf"({_HOST})/({_NAME})(?::({_TAG}))?(?:@({_DIGEST}))?")
_FORMS = "HOST[:PORT]/NAME:TAG, HOST/NAME@sha256:HEX, oci:FOLDER:TAG or dir:FOLDER"
_LOOPBACK = re.compile(r"(localhost|127(\.[0-9]+){3}|\[::1\])(:[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A place in a registry (`host`, `name`), in an OCI layout folder (`layout`), or a plain folder (`folder`).

    `digest` ("sha256:…") pins the manifest: then the tag decides nothing.
    """

    host: str = ""
    name: str = ""
    tag: str = ""
    digest: str = ""
    layout: Path | None = None
    folder: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as a user writes it; without tag and digest the tag is `latest`.

        Raises:
            UsageError: it is none.
        """
        if text.startswith("dir:") and len(text) > 4:
            return cls(folder=Path(text[4:]))
        if text.startswith("oci:") and (found := re.fullmatch(rf"oci:(.+?)(?::({_TAG}))?(?:@({_DIGEST}))?", text)):
            tag = found[2] or ("" if found[3] else "latest")
            return cls(tag=tag, digest=found[3] or "", layout=Path(found[1]))
        found = _REFERENCE.fullmatch(text)
        if found is None or len(found[2]) > 255 or not _looks_like_a_host(found[1]):
            raise UsageError(f"cannot push to or pull from {text[:200]!a}", f"a reference is {_FORMS}", "correct it")
        tag = found[3] or ("" if found[4] else "latest")
        return cls(found[1], found[2], tag, found[4] or "")

    @property
    def wanted(self) -> str:
        """What to ask for: the digest if there is one, else the tag."""
        return self.digest or self.tag

    @property
    def loopback(self) -> bool:
        """Whether the registry is on this machine, so that it may be asked without TLS."""
        return _LOOPBACK.fullmatch(self.host) is not None

    def __str__(self) -> str:
        if self.folder is not None:
            return f"dir:{self.folder}"
        place = f"oci:{self.layout}" if self.layout is not None else f"{self.host}/{self.name}"
        return place + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def _looks_like_a_host(host: str) -> bool:
    """As everywhere in this field: a first part without a dot or a port, other than localhost, is no registry."""
    return host == "localhost" or "." in host or ":" in host
