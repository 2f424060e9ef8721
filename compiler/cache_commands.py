"""`ingot cache ls|verify|gc`, and the table of `ingot build --explain`."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from typing import Any

from ..artifacts.errors import UsageError, VerificationError
from .cache.evict import empty_quarantine, held, trim
from .cache.location import open_store
from .cache.session import DEFAULT_MAX_BYTES, Step
from .cache.store import CacheStore
from .console import print_table, size_text

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def cache(args: argparse.Namespace) -> int:
    """Look at the build cache, verify it, or make it smaller."""
    store = open_store(args.cache_dir)
    return {"ls": _list, "verify": _verify, "gc": _collect}[args.action](store, args)


def size_bytes(text: str) -> int:
    """Bytes of a size such as 20GB, 500MB or 0.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise UsageError(f"{text!a} is no size", "", "write a number and kB, MB, GB or TB: 20GB")
    return int(float(found[1]) * _UNITS[found[2]])


def print_steps(steps: Sequence[Step]) -> None:
    """How each stage of a build fared with the cache, and why it missed."""
    rows = []
    for step in steps:
        why = step.why or [""]
        rows.append((step.stage, step.item, step.outcome, f"{step.seconds:.2f}", why[0]))
        rows += [("", "", "", "", line) for line in why[1:]]
    print_table("cache", ("stage", "item", "outcome", "seconds", "why"), rows)


def _list(store: CacheStore, args: argparse.Namespace) -> int:
    entries = held(store)
    rows: list[dict[str, Any]] = []
    for entry in reversed(entries):
        with store.lock(entry.key, shared=True):
            record = store.read(entry.stage, entry.key)
        if record is not None:
            rows.append(
                {"stage": entry.stage, "item": record.item, "bytes": entry.size, "used": entry.used, "key": entry.key}
            )
    total = sum(row["bytes"] for row in rows)
    if args.json:
        print(json.dumps({"folder": str(store.folder), "bytes": total, "entries": rows}))
        return 0
    shown = [
        (r["stage"], r["item"], size_text(r["bytes"]), _ago(time.time() - r["used"]), r["key"][:16]) for r in rows
    ]  # fmt: skip
    print_table(f"build cache {store.folder}", ("stage", "item", "size", "last used", "key"), shown)
    print(f"{len(rows)} entries, {size_text(total)}")
    return 0


def _verify(store: CacheStore, args: argparse.Namespace) -> int:
    damaged, sound = [], 0
    for stage, key in store.entries():
        with store.lock(key):
            if not store.path(stage, key).exists():
                continue
            record = store.read(stage, key)
            if record is not None and store.verify(record):
                sound += 1
            else:
                damaged.append({"stage": stage, "key": key})
    if args.json:
        print(json.dumps({"folder": str(store.folder), "sound": sound, "damaged": damaged}))
    else:
        for entry in damaged:
            print(f"damaged: {entry['stage']} {entry['key'][:16]}, now in {store.folder / 'quarantine'}")
        print(f"{sound} entries are sound, {len(damaged)} were damaged")
    return VerificationError.exit_code if damaged else 0


def _collect(store: CacheStore, args: argparse.Namespace) -> int:
    limit = DEFAULT_MAX_BYTES if args.max_size is None else size_bytes(args.max_size)
    removed = trim(store, limit)
    quarantined = empty_quarantine(store)
    freed = sum(entry.size for entry in removed)
    left = sum(entry.size for entry in held(store))
    if args.json:
        print(json.dumps({"removed": len(removed), "bytes": freed, "quarantined": quarantined, "left_bytes": left}))
    else:
        more = f" and {quarantined} damaged ones" if quarantined else ""
        print(f"removed {len(removed)} entries ({size_text(freed)}){more}; {size_text(left)} are left")
    return 0


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
