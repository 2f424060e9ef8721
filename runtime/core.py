"""The loop behind every way to generate: submit requests, step until they are done, abort those nobody wants any more.

Schedule, run, settle. Offline calls, streams and a server can share one core: whoever waits for a request steps it,
and all requests in it move on together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ..artifacts.errors import UsageError
from ..artifacts.manifest import Manifest
from .engines.base import EngineGroup
from .kv_cache import BlockAllocator
from .model_runner import ModelRunner
from .scheduler import Decode, Scheduler
from .sequence import Request


class Core:
    """Scheduler, KV-cache bookkeeping and runner over one engine group. Calls from several threads take turns."""

    def __init__(self, group: EngineGroup, manifest: Manifest) -> None:
        cache = manifest.kv_cache
        self.blocks = BlockAllocator(group.num_blocks, cache.block_size)
        self._runner = ModelRunner(group, manifest.model.vocab_size)
        self._scheduler = Scheduler(
            self.blocks, self._runner.decode_batches, self._runner.prefill_lengths, cache.max_blocks
        )
        # Reentrant: a stream dropped by the garbage collector aborts its request from within any call.
        self._lock = threading.RLock()
        self._closed = False

    @property
    def unfinished(self) -> int:
        """Sequences waiting or running."""
        return self._scheduler.unfinished

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests that have been checked."""
        with self._lock:
            if self._closed:
                raise UsageError("the LLM is closed", "close() was called", "open it again")
            for request in requests:
                for sequence in request.sequences:
                    self._scheduler.add(sequence)

    def step(self) -> bool:
        """Run one engine once; False when there was nothing to do.

        Whatever goes wrong ends the sequences of the step with "error", since nobody knows what their cache holds, and
        is raised to the caller; other requests can go on.
        """
        with self._lock:
            plan = None if self._closed else self._scheduler.schedule()
            if plan is None:
                return False
            try:
                results = self._runner.run(plan)
                self._scheduler.settle(plan, results)
            except BaseException:
                for sequence in plan.sequences if isinstance(plan, Decode) else (plan.sequence,):
                    self._scheduler.abort(sequence, "error")
                raise
            return True

    def abort(self, requests: Iterable[Request]) -> None:
        """End what is unfinished of these requests; their rows and blocks come back at once."""
        with self._lock:
            for request in requests:
                for sequence in request.sequences:
                    self._scheduler.abort(sequence)

    def close(self) -> None:
        """End everything that is unfinished; no engine is run any more."""
        with self._lock:
            self._closed = True
            self._scheduler.abort_all()
