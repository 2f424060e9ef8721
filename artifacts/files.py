"""Opening files of unknown origin: only plain files, never through a symlink, never blocking on a FIFO.

Also where an OSError becomes a ResourceError that says what to do about a full disk or a missing permission.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import ResourceError, VerificationError

FIXES = {
    errno.ENOSPC: "free some space on that disk, or write to another one",
    errno.EDQUOT: "your disk quota is used up: free some space, or write to another disk",
    errno.EACCES: "check the permissions of the folder, or choose another one",
    errno.EPERM: "check the permissions of the folder, or choose another one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EMFILE: "too many open files: raise the limit (`ulimit -n 4096`) and try again",
    errno.ENFILE: "the system has too many open files: close some programs and try again",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EIO: "the disk reports an error: check it, and write to another one",
}


def resource_error(what: str, error: OSError) -> ResourceError:
    """The ResourceError for an OSError: `what` says what could not be done."""
    fix = FIXES.get(error.errno or 0, "check the disk and the folder's permissions, then try again")
    return ResourceError(what, str(error), fix)


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Inside, an OSError becomes a ResourceError; `what` says what could not be done."""
    try:
        yield
    except OSError as error:
        raise resource_error(what, error) from error


def kind_of(mode: int) -> str:
    """What `st_mode` is, in words."""
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device or socket")


@contextlib.contextmanager
def open_plain(path: str | Path) -> Iterator[int]:
    """Open a plain file for reading; yields the descriptor and closes it.

    Raises:
        VerificationError: missing, or not a plain file (a FIFO is not waited for, a symlink not followed).
        ResourceError: the system does not let us open it.
    """
    # O_NONBLOCK: opening a FIFO without a writer returns at once; it changes nothing for a plain file.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VerificationError(f"{path} is missing", str(error), "check the path") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
            raise _not_plain(path, "a symbolic link, device or socket") from error
        raise resource_error(f"cannot read {path}", error) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise _not_plain(path, kind_of(mode))
        yield descriptor
    finally:
        os.close(descriptor)


def _not_plain(path: str | Path, kind: str) -> VerificationError:
    return VerificationError(f"{path} is not a plain file", f"it is {kind}", "copy the file itself to that place")


def read_small(path: str | Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes.

    Raises:
        VerificationError: missing, no plain file, or larger than `limit`.
        ResourceError: the system does not let us read it.
    """
    with open_plain(path) as descriptor, os_errors(f"cannot read {path}"):
        content = bytearray()
        while len(content) <= limit:
            piece = os.read(descriptor, min(1 << 20, limit + 1 - len(content)))
            if not piece:
                return bytes(content)
            content += piece
    raise VerificationError(f"{path} is too large", f"more than {limit >> 20} MiB", "check that it is the right file")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside, sync it and rename it into place: the old content or the new, never less.

    The file is made in the folder above, where it cannot be mistaken for a part of an artifact.

    Raises:
        ResourceError: the disk is full or fails, or permission is missing.
    """
    aside = path.parent.parent / f".{path.parent.name}.{path.name}.{os.getpid()}"
    with os_errors(f"cannot write {path}"):
        try:
            with open(aside, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
