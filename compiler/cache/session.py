"""One build's dealings with the cache: look a stage up, or make it under its lock and keep it.

A cache is time saved and nothing else: where it cannot be read or written, the stage is made as if there were none, and
the record says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.errors import VerificationError
from .entry import Entry, Key
from .evict import trim
from .explain import differences
from .store import CacheStore

DEFAULT_MAX_BYTES = 50_000_000_000


@dataclass
class Step:
    """How one stage of a build went, for `--explain` and the provenance.

    Attributes:
        outcome: "hit", "miss", or "off" where it was not looked up; why: the reasons for a miss.
    """

    stage: str
    item: str
    key: str
    outcome: str
    why: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Session:
    """The cache as one build uses it.

    Args:
        store: None builds everything anew and keeps nothing.
        explain: find out why a stage misses, which reads earlier entries.
        log: told what the user should know.
    """

    def __init__(
        self,
        store: CacheStore | None,
        explain: bool = False,
        log: Callable[[str], None] = lambda text: None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self.store, self.explain, self.log, self.max_bytes = store, explain, log, max_bytes
        self.steps: list[Step] = []

    def run(
        self,
        key: Key | None,
        make: Callable[[], Any],
        files: Mapping[str, Path] | Callable[[Any], Mapping[str, Path]] | None = None,
        *,
        name: tuple[str, str] | None = None,
        share: bool = False,
    ) -> Any:
        """A stage's value: from the cache, its files put in place, or from `make`, kept for the next time.

        Args:
            key: None if the stage cannot be told apart from others, so it is always made; `name` is then its stage and
                item, and the reason why is logged by the caller.
            make: does the work, writes the files, returns plain JSON.
            files: name in the cache -> path in the artifact; of the value, where that says which there are.
            share: the files are data, which may be hard links of the cache's.
        """
        begin = time.perf_counter()
        stage, item = (key.stage, key.item) if key is not None else name or ("", "")
        step = Step(stage, item, key.digest() if key is not None else "", "off")
        paths = files if callable(files) else lambda value: files or {}
        try:
            if key is None or self.store is None:
                return make()
            return self._run(self.store, key, make, paths, share, step)
        finally:
            step.seconds = time.perf_counter() - begin
            self.steps.append(step)

    def _run(
        self,
        store: CacheStore,
        key: Key,
        make: Callable[[], Any],
        paths: Callable[[Any], Mapping[str, Path]],
        share: bool,
        step: Step,
    ) -> Any:
        with self._locked(store, step, shared=True):
            found = self._look_up(store, step, paths, share)
        if found is None:
            with self._locked(store, step, shared=False):
                found = self._look_up(store, step, paths, share)  # another build may have made it meanwhile
                if found is None:
                    step.outcome = "miss"
                    if self.explain:
                        step.why += differences(store, key)
                    value = make()
                    try:
                        store.keep(key, value, paths(value), share)
                    except (OSError, VerificationError) as error:
                        self.log(f"{_shown(step)} is not kept in the cache: {error}")
                    return value
        step.outcome = "hit"
        return found.value

    def _look_up(
        self, store: CacheStore, step: Step, paths: Callable[[Any], Mapping[str, Path]], share: bool
    ) -> Entry | None:
        try:
            entry = store.read(step.stage, step.key)
            if entry is None:
                return None
            if store.restore(entry, paths(entry.value), share):
                return entry
            step.why.append("the entry was damaged, and was put in quarantine")
            self.log(f"{_shown(step)}: the cache's entry was damaged; it is made anew")
        except OSError as error:
            step.why.append(f"the cache could not be read: {error}")
        return None

    @contextlib.contextmanager
    def _locked(self, store: CacheStore, step: Step, shared: bool) -> Iterator[None]:
        """The key's lock; where there are no locks the stage is still made, perhaps by several at once."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(
                    store.lock(step.key, shared, lambda: self.log(f"{_shown(step)}: another build makes it, waiting"))
                )
            except OSError as error:
                self.log(f"the cache's lock cannot be had: {error}")
            yield

    def close(self) -> None:
        """Keep the cache within its size."""
        if self.store is not None:
            with contextlib.suppress(OSError):
                trim(self.store, self.max_bytes)


def _shown(step: Step) -> str:
    return f"{step.stage} {step.item}".strip()
