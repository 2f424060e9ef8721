"""Keeps the build cache within a size: the entries least recently used go first, and none that is in use."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .entry import NAME
from .store import CacheStore


@dataclass(frozen=True)
class Held:
    """An entry as it stands on disk: its size in bytes, and when it was last used (seconds since 1970)."""

    stage: str
    key: str
    size: int
    used: float


def held(store: CacheStore) -> list[Held]:
    """All entries, the least recently used first."""
    found = []
    for stage, key in store.entries():
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            folder = store.path(stage, key)
            size = sum(item.stat(follow_symlinks=False).st_size for item in os.scandir(folder))
            record = folder / NAME
            used = record.stat().st_mtime if record.exists() else 0.0
            found.append(Held(stage, key, size, used))
    return sorted(found, key=lambda entry: (entry.used, entry.key))


def trim(store: CacheStore, max_bytes: int) -> list[Held]:
    """Remove entries until at most `max_bytes` are left, and what killed builds left; returns the entries removed."""
    entries = held(store)
    total = sum(entry.size for entry in entries)
    removed = []
    for entry in entries:
        if total <= max_bytes:
            break
        with store.try_lock(entry.key) as free:
            if not free:
                continue
            # Renamed first: a removal that is cut short leaves no half of an entry under its name.
            grave = store.folder / "aside" / entry.key
            shutil.rmtree(grave, ignore_errors=True)
            try:
                os.rename(store.path(entry.stage, entry.key), grave)
            except FileNotFoundError:
                continue
            shutil.rmtree(grave, ignore_errors=True)
            total -= entry.size
            removed.append(entry)
    for leftover in _leftovers(store):
        with store.try_lock(leftover.name) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)
    return removed


def empty_quarantine(store: CacheStore) -> int:
    """Remove damaged entries for good; returns how many there were."""
    names = os.listdir(store.folder / "quarantine")
    for name in names:
        shutil.rmtree(store.folder / "quarantine" / name, ignore_errors=True)
    return len(names)


def _leftovers(store: CacheStore) -> Iterator[Path]:
    base = store.folder / "aside"
    yield from (base / name for name in sorted(os.listdir(base)))
