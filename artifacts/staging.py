"""The staging folder of a build, the swap that publishes it, and the sweeping up after builds that were killed.

A staging folder belongs to a live build as long as its marker is locked: the lock (flock) ends with the process, also
by SIGKILL, and unlike a process number it is never somebody else's. Folders without our marker are never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from pathlib import Path

from .errors import VerificationError
from .files import read_small

try:
    import fcntl
except ImportError:  # no locks on this system: leftovers stay, nothing is swept
    fcntl = None  # type: ignore[assignment]

MARKER = "ingot-staging"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Staging:
    """A build's own folder next to its destination. `new` is written to; `old` takes what was replaced."""

    def __init__(self, folder: Path, destination: Path, lock: int) -> None:
        self.folder, self.new, self.old = folder, folder / "new", folder / "old"
        self._destination, self._lock = destination, lock

    @classmethod
    def create(cls, destination: Path) -> Staging:
        """Make a staging folder for `destination` (whose parent exists), locked by this process."""
        try:
            return cls._create(destination)
        except FileNotFoundError:  # swept away by another build while it was still empty
            return cls._create(destination)

    @classmethod
    def _create(cls, destination: Path) -> Staging:
        folder = destination.parent / f".{destination.name}.ingot-{os.getpid()}-{secrets.token_hex(4)}"
        lock = -1
        try:
            folder.mkdir()
            # Locked before it is written: a sweeper finds an incomplete marker, which it leaves alone, or a locked one.
            lock = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            _try_lock(lock)
            os.write(lock, _mark(destination))
            staging = cls(folder, destination, lock)
            staging.new.mkdir()
        except FileExistsError:  # somebody else's
            raise
        except BaseException:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return staging

    def remove(self) -> None:
        """Remove the folder and all in it. What cannot be removed stays for the next build to sweep."""
        try:
            if os.path.lexists(self._destination) or not os.path.lexists(self.old):
                _remove(self.folder)
            # Otherwise the old artifact could not be moved back, and stays safe here until `sweep` can.
        finally:
            os.close(self._lock)

    def rival(self) -> int | None:
        """The process number of a build of this destination that lives and began before; None if there is none."""
        own = (self.folder / MARKER).stat().st_mtime_ns, self.folder.name
        for folder in _folders(self._destination):
            marker = folder / MARKER
            try:
                if folder == self.folder or (marker.lstat().st_mtime_ns, folder.name) > own:
                    continue
                lock = os.open(marker, os.O_RDONLY | os.O_NOFOLLOW)
            except OSError:  # not ours, or gone meanwhile
                continue
            try:
                if fcntl is not None and not _try_lock(lock):
                    return int(folder.name.rpartition("-")[0].rpartition("-")[2])
            finally:
                os.close(lock)
        return None

    @staticmethod
    def sweep(destination: Path) -> None:
        """Remove the staging folders that dead builds of `destination` left, and mend a swap cut in two."""
        if fcntl is None:
            return
        for folder in _folders(destination):
            _sweep_one(folder, destination)
            with contextlib.suppress(OSError):  # empty: what a kill left before or after the marker
                os.rmdir(folder)


def _folders(destination: Path) -> list[Path]:
    """What stands beside `destination` and is called like a staging folder of it."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.ingot-[0-9]+-[0-9a-f]{{8}}")
    names = sorted(name for name in os.listdir(destination.parent) if pattern.fullmatch(name))
    return [destination.parent / name for name in names]


def _sweep_one(folder: Path, destination: Path) -> None:
    marker = folder / MARKER
    if folder.is_symlink():
        return
    try:
        if read_small(marker, 4096) != _mark(destination):
            return
        lock = os.open(marker, os.O_RDWR | os.O_NOFOLLOW)
    except (VerificationError, OSError):  # no marker: not ours; or gone meanwhile
        return
    try:
        if not _try_lock(lock):  # its build lives
            return
        if not os.path.lexists(destination) and (folder / "old").is_dir():
            os.rename(folder / "old", destination)
        _remove(folder)
    finally:
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Lock without waiting; False if another process holds it, or the file system (some network ones) has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):
        return False
    return True


def _mark(destination: Path) -> bytes:
    return b"Ingot builds here and removes this folder. Destination: " + os.fsencode(destination.name) + b"\n"


def _remove(folder: Path) -> None:
    # The marker goes last, so that a removal cut short is still recognized as ours.
    for name in ("new", "old"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def swap(new: Path, destination: Path, old: Path) -> None:
    """Put `new` at `destination`, which exists; what stood there ends up under `new` or `old`, in the staging folder.

    One step where the system can exchange two names. Elsewhere two renames: an error or Ctrl-C between them is undone
    here, a kill between them by `Staging.sweep` of the next build.
    """
    if exchange(new, destination):
        return
    try:
        os.rename(destination, old)
        os.rename(new, destination)
    except BaseException:
        if not os.path.lexists(destination) and os.path.lexists(old):
            os.rename(old, destination)
        raise


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (Linux renameat2); False where the system or the file system cannot.

    Raises:
        OSError: it can, but failed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(second))


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make a folder's entries survive a power cut; some file systems have nothing to sync there."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
