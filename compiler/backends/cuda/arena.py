"""Places every buffer of an engine in one arena: buffers whose lives overlap never share a byte, others may."""

from __future__ import annotations

from collections.abc import Sequence

from .buffers import Buffer


def zeroed_bytes(buffers: Sequence[Buffer]) -> int:
    """Size of the part in front that must be zero before the first run."""
    return sum(b.padded for b in buffers if b.zeroed)


def place(buffers: Sequence[Buffer], reserved: int) -> int:
    """Set each buffer's offset and return the arena's size in bytes.

    Zeroed buffers lie in front and are shared with nobody, since they must be zero at the next run too; `reserved` is
    the size of that front, the same for all engines that will use the arena. The others are placed from the largest on,
    each in the first gap among those alive at the same time; an exclusive one counts as alive all the time.
    """
    front = 0
    for buffer in buffers:
        if buffer.zeroed:
            buffer.offset = front
            front += buffer.padded
    if front > reserved:
        raise ValueError(f"{front} bytes must be zero, {reserved} are reserved")
    placed: list[Buffer] = []
    size = reserved
    alive = [b for b in buffers if not b.zeroed and b.first >= 0]
    for buffer in sorted(alive, key=lambda b: (-b.padded, b.first)):
        offset = reserved
        for other in sorted((p for p in placed if _overlap(p, buffer)), key=lambda p: p.offset):
            if offset + buffer.padded <= other.offset:
                break
            offset = max(offset, other.offset + other.padded)
        buffer.offset = offset
        placed.append(buffer)
        size = max(size, offset + buffer.padded)
    return size


def _overlap(a: Buffer, b: Buffer) -> bool:
    return a.exclusive or b.exclusive or (a.first <= b.last and b.first <= a.last)
