"""The folder in which a pull gathers files, beside its destination: kept between pulls, locked, and published whole.

.demo.ingot-pull/   lock   held while a pull lives
                    new/   what has arrived so far
                    old/   what it replaced, on its way out
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError
from ..folder import scan
from ..staging import swap, sync_folder

try:
    import fcntl
except ImportError:  # no locks on this system: two pulls to one folder are the user's to avoid
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def pull_folder(output: Path) -> Iterator[Path]:
    """The gathering folder of `output`, made or taken over, locked by this process inside the block.

    Raises:
        UsageError: another pull is at it, or what stands in its place is not ours.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.parent / f".{output.name}.ingot-pull"
    with contextlib.suppress(FileExistsError):
        work.mkdir(mode=0o700)
    status = os.lstat(work)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        why = "it is no folder of yours alone, so what lies in it cannot be believed"
        raise UsageError(f"cannot gather files in {work}", why, "remove it, or pull to another place")
    lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                why = "another pull writes there"
                raise UsageError(f"cannot pull to {output}", why, "wait for it, or choose another folder") from error
        if (work / "old").is_dir() and not os.path.lexists(output):  # killed between two renames
            os.rename(work / "old", output)
        yield work
    finally:
        os.close(lock)


def publish(work: Path, output: Path, replace: bool) -> None:
    """Put `new/` at `output`, in place of what is there if `replace`, and remove the gathering folder."""
    new = work / "new"
    for path, status in scan(new).items():
        if stat.S_ISDIR(status.st_mode):
            sync_folder(new / path)
    sync_folder(new)
    if replace:
        swap(new, output, work / "old")
    else:
        os.rename(new, output)
    sync_folder(output.parent)
    shutil.rmtree(work, ignore_errors=True)
