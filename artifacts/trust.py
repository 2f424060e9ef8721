"""Whose native code a loader accepts: built on this host, signed by a key, or with a digest that is named.

A build writes its artifact's digest down in the user's own state folder, so that what is built here runs here. The
record cannot travel with the artifact, and nobody else can write it: a folder that others may write to is not believed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError
from .files import os_errors

_WORDS = "local, signed, signed:PUBLIC_KEY or digest:sha256:HEX"


@dataclasses.dataclass(frozen=True)
class Trust:
    """What is accepted: an artifact that meets any one of these.

    `local`: built on this host by this user. `keys`: signed by one of these public keys; `configured` adds those in
    the user's configuration. `digests`: an artifact's digest, as `ingot inspect` shows it. `explicit` says that the
    user chose, so that artifacts without native code are asked too.
    """

    local: bool = False
    configured: bool = False
    keys: tuple[Path, ...] = ()
    digests: frozenset[str] = frozenset()
    explicit: bool = True

    @classmethod
    def parse(cls, words: str | Iterable[str] | None) -> Trust:
        """A policy from its words: `local`, `signed`, `signed:PATH`, `digest:sha256:HEX`; several are alternatives.

        None is the default: what was built here, or is signed by a configured key.

        Raises:
            UsageError: another word.
        """
        if words is None:
            return cls(local=True, configured=True, explicit=False)
        trust = cls()
        for word in [words] if isinstance(words, str) else words:
            kind, _, rest = word.partition(":")
            if word == "local":
                trust = dataclasses.replace(trust, local=True)
            elif word == "signed":
                trust = dataclasses.replace(trust, configured=True)
            elif kind == "signed" and rest:
                trust = dataclasses.replace(trust, keys=(*trust.keys, Path(rest)))
            elif kind == "digest" and (found := re.fullmatch(r"sha256:([0-9a-f]{64})", rest)):
                trust = dataclasses.replace(trust, digests=trust.digests | {found[1]})
            else:
                raise UsageError(f"cannot trust {word!a}", f"a policy is {_WORDS}", "correct the word after --trust")
        if trust == cls():
            raise UsageError("the trust policy is empty", f"a policy is {_WORDS}", "name at least one")
        return trust

    def public_keys(self) -> tuple[Path, ...]:
        """The files of all public keys that this policy accepts.

        Raises:
            UsageError: others than the user may write to the folder of configured keys.
        """
        folder = key_folder()
        if not self.configured or not folder.is_dir():
            return self.keys
        if why := _open_to_others(folder, os.stat(folder)):
            raise UsageError(f"the keys in {folder} cannot be trusted", why, f"chmod go-w {folder}")
        return (*self.keys, *sorted(path for path in folder.iterdir() if path.suffix in (".pub", ".pem")))


def key_folder() -> Path:
    """Where the user keeps the public keys (*.pub, *.pem) that `signed` accepts."""
    return _base("XDG_CONFIG_HOME", ".config") / "ingot" / "trusted-keys"


def state_folder() -> Path:
    """Where this host remembers what it has built: one file per artifact, named by its digest."""
    return _base("XDG_STATE_HOME", ".local/state") / "ingot" / "built"


def record_build(digest: str, folder: Path | None = None) -> None:
    """Remember that this user built the artifact with this digest on this host.

    Raises:
        ResourceError: the state folder cannot be written.
    """
    folder = state_folder() if folder is None else folder
    with os_errors(f"cannot remember this build in {folder}"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / digest, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.close(descriptor)


def was_built_here(digest: str, folder: Path | None = None) -> str:
    """Why an artifact does not count as built on this host; empty if it does."""
    folder = state_folder() if folder is None else folder
    try:
        place, entry = os.lstat(folder), os.lstat(folder / digest)
    except (FileNotFoundError, NotADirectoryError):
        return "it was not built here by this user"
    except OSError as error:
        return f"the record of builds cannot be read: {error}"
    for path, status in ((folder, place), (folder / digest, entry)):
        if why := _open_to_others(path, status):
            return why
    return "" if stat.S_ISREG(entry.st_mode) else f"{folder / digest} is no plain file"


def _open_to_others(path: Path, status: os.stat_result) -> str:
    """Why a file or folder of the user's proves nothing; empty if only the user, or root, can have written it."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user"
    return f"{path} can be written by others" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _base(variable: str, default: str) -> Path:
    """A base folder of the XDG specification: an absolute path out of the environment, or its default."""
    given = os.environ.get(variable, "")
    if given.startswith("/"):
        return Path(given)
    try:
        return Path.home() / default
    except RuntimeError:  # a user without a home, as in some containers: a folder there never is
        return Path("/nonexistent") / default
