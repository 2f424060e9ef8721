"""Puts a file of the cache into an artifact, or the other way: shared where the file system can, copied elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from ...artifacts.files import open_plain

_FICLONE = 0x40049409  # ioctl of Linux: both files share their blocks until one is written to
_LINK_FROM_BYTES = 1 << 20


def place(source: Path, target: Path, share: bool) -> None:
    """Make `target`, which does not exist, a file with the content of `source`.

    Args:
        share: it may be the same file under a second name (a hard link), if it is not small.

    Raises:
        OSError: the disk failed; no part of `target` is left. VerificationError: the source is no plain file.
    """
    with open_plain(source) as descriptor:
        _place(source, descriptor, target, share)


def _place(source: Path, descriptor: int, target: Path, share: bool) -> None:
    status = os.fstat(descriptor)
    if share and status.st_size >= _LINK_FROM_BYTES and status.st_mode & 0o777 == 0o666 & ~_umask():
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target, follow_symlinks=False)
            return
    with open(descriptor, "rb", closefd=False) as old, open(target, "xb") as new:
        try:
            with contextlib.suppress(OSError):
                fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
                return
            shutil.copyfileobj(old, new, 1 << 20)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _umask() -> int:
    """This process's umask, which can be asked for without setting it in Linux alone."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0o777
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o777)
