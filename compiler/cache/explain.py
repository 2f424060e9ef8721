"""Why a stage was not found: the earlier entry that is nearest, and the fields in which the new key differs from it."""

from __future__ import annotations

from typing import Any

from ...artifacts.errors import VerificationError
from ...artifacts.files import read_small
from .entry import NAME, Entry, Key, flatten
from .store import CacheStore

_CANDIDATES = 64
_LIMIT_BYTES = 256 << 20


def differences(store: CacheStore, key: Key) -> list[str]:
    """What differs from the nearest of the latest entries of the same stage, a sentence each.

    Entries are only read here, not locked: one that goes away meanwhile is left out.
    """
    found: list[tuple[float, Entry]] = []
    for stage, name in store.entries(key.stage):
        try:
            path = store.path(stage, name) / NAME
            found.append((path.stat().st_mtime, Entry.from_bytes(read_small(path, _LIMIT_BYTES))))
        except (OSError, ValueError, VerificationError):
            continue
    found.sort(key=lambda pair: -pair[0])
    fields = key.flat()
    best: tuple[tuple[int, int], Entry, dict[str, Any]] | None = None
    for number, (_, entry) in enumerate(found[:_CANDIDATES]):
        other = flatten(entry.fields)
        apart = sum(fields.get(name) != other.get(name) for name in {*fields, *other})
        rank = (apart + (entry.item != key.item), number)
        if best is None or rank < best[0]:
            best = (rank, entry, other)
    if best is None:
        return [f"nothing of the stage {key.stage!r} is in the cache"]
    _, entry, other = best
    lines = [f"nearest is {entry.item}"] if entry.item != key.item else []
    for name in sorted({*fields, *other}):
        if fields.get(name) != other.get(name):
            lines.append(f"{name}: {_short(other.get(name))} → {_short(fields.get(name))}")
    return lines or ["the entry is gone"]


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:8]
    return text if len(text) <= 60 else text[:57] + "…"
