"""Requests to a registry: bounded answers, redirects without credentials, and the two kinds of authentication.

A registry is not trusted: answers are read up to a limit, redirects are followed a few times and never from TLS to
plain text, credentials go to the registry alone, and only over TLS or to this machine.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ResourceError, UsageError, VerificationError
from ..strict import quote
from .reference import Reference

TIMEOUT_S = 60
MAX_REDIRECTS = 5
_MAX_TOKEN_BYTES = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Status, headers by lower-case name, and the body to read from; close it."""

    status: int
    headers: Mapping[str, str]
    body: Any
    url: str

    def read(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            VerificationError: it is longer than `limit` bytes.
        """
        with self.body:
            content = reading(self.url, lambda: self.body.read(limit + 1))
        if len(content) > limit:
            why = f"more than {limit >> 20} MiB where a short answer belongs"
            raise VerificationError(f"{self.url} sends too much", why, "check the name of the registry")
        return bytes(content)

    def close(self) -> None:
        self.body.close()


class _Opener(urllib.request.OpenerDirector):
    """Every status is an answer, and no redirect is followed on its own. Proxies are the system's."""

    def __init__(self) -> None:
        super().__init__()
        for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
            self.add_handler(handler)


class Http:
    """Speaks to one registry.

    Args:
        place: its host and name.
        plain_http: speak without TLS to a host that is not this machine.
        credentials: (user, password), from `stored_credentials`; None for nobody.
    """

    def __init__(self, place: Reference, plain_http: bool, credentials: tuple[str, str] | None) -> None:
        self._scheme = "http" if plain_http or place.loopback else "https"
        self.base = f"{self._scheme}://{place.host}/v2/{place.name}/"
        self._credentials = credentials
        self._authorization = ""
        self._opener = _Opener()

    def request(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """One request, redirects followed and, when the registry asks for it, once more with authentication.

        Raises:
            ResourceError: the registry cannot be reached, or refuses us.
            VerificationError: it redirects without end, or to where nobody should follow.
        """
        answer = self._follow(method, url, headers or {}, body)
        challenge = answer.headers.get("www-authenticate", "")
        if answer.status == 401 and challenge:
            answer.close()
            self._authorization = self._answer(challenge)
            answer = self._follow(method, url, headers or {}, body)
        if answer.status in (401, 403):
            answer.close()
            why = f"{answer.status} for {method} {url}"
            fix = "log in (`docker login`, or an entry in ~/.docker/config.json) as somebody who may do this"
            raise ResourceError("the registry refuses", why, fix)
        return answer

    def _follow(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._send(method, url, headers, body)
            target = answer.headers.get("location", "")
            if answer.status not in _REDIRECTS or not target:
                return answer
            answer.close()
            target = urllib.parse.urljoin(url, target)
            self.check_url(target)
            url = target
        why = f"more than {MAX_REDIRECTS} redirects, the last one to {quote(url)}"
        raise VerificationError("the registry sends us in circles", why, "check the name of the registry")

    def check_url(self, url: str) -> None:
        """Refuse to go where a registry has no reason to send us: other schemes, or from TLS to plain text.

        Raises:
            VerificationError: with the address.
        """
        scheme = urllib.parse.urlsplit(url).scheme
        if scheme not in ("http", "https") or (self._scheme == "https" and scheme == "http"):
            raise VerificationError(f"the registry sends us to {quote(url)}", "only TLS is followed", "do not use it")

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        sent = {"User-Agent": "ingot", **headers}
        if self._authorization and _origin(url) == _origin(self.base):
            sent["Authorization"] = self._authorization
        request = urllib.request.Request(url, data=body, headers=sent, method=method)
        found = reading(url, lambda: self._opener.open(request, timeout=TIMEOUT_S))
        return Answer(found.status, {k.lower(): v for k, v in found.headers.items()}, found, url)

    def _answer(self, challenge: str) -> str:
        """The Authorization header that a registry asks for; empty if there is nothing to say."""
        kind, _, rest = challenge.partition(" ")
        basic = ""
        if self._credentials is not None:
            basic = "Basic " + base64.b64encode(":".join(self._credentials).encode()).decode()
        if kind.lower() == "basic":
            return basic
        given = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if kind.lower() != "bearer" or "realm" not in given:
            raise ResourceError("the registry asks for an unknown login", quote(challenge), "use another registry")
        self.check_url(given["realm"])
        query = {name: given[name] for name in ("service", "scope") if name in given}
        separator = "&" if urllib.parse.urlsplit(given["realm"]).query else "?"
        url = given["realm"] + separator + urllib.parse.urlencode(query)
        request = urllib.request.Request(
            url, headers={"User-Agent": "ingot"} | ({"Authorization": basic} if basic else {})
        )
        found = reading(url, lambda: self._opener.open(request, timeout=TIMEOUT_S))
        content = Answer(found.status, {}, found, url).read(_MAX_TOKEN_BYTES)
        try:
            value = json.loads(content)
            token = value.get("token") or value.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if found.status != 200 or not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,65536}", token):
            fix = "log in (`docker login`, or an entry in ~/.docker/config.json)"
            raise ResourceError("the registry gives no token", f"{found.status} from {quote(url)}", fix)
        return f"Bearer {token}"


def stored_credentials(host: str, config: Path | None = None) -> tuple[str, str] | None:
    """(user, password) for a registry out of Docker's configuration file; None if it has none.

    Raises:
        UsageError: the file is no JSON, or its entry is broken. Helpers that keep credentials elsewhere are not asked.
    """
    path = Path.home() / ".docker" / "config.json" if config is None else config
    try:
        content = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}", str(error), "mend it, or log in again") from error
    try:
        entry = json.loads(content).get("auths", {}).get(host, {})
        if not (auth := entry.get("auth")):
            return None
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"cannot read {path}", f"the entry for {host} is broken: {error}", "log in again") from error
    return (user, password) if colon else None


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def reading(url: str, action: Any) -> Any:
    """What a transfer gives; every way in which a network fails is one ResourceError."""
    try:
        return action()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        fix = "check the network and the registry's name, then try again: what has arrived is kept"
        raise ResourceError(f"{quote(url, 200)} cannot be reached", f"{type(error).__name__}: {reason}", fix) from error
