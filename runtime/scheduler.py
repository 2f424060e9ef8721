"""Who runs next: first come, first served, joining and leaving between steps (schedule -> run -> settle, as nano-vllm).

A sequence is admitted when a decode row is free and the KV cache has blocks for all it can ever need, so a running
sequence never has to be thrown out and its block table never changes. It knows tokens and blocks, not engines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from .kv_cache import BlockAllocator
from .sequence import Sampled, Sequence, Status


@dataclass(frozen=True, eq=False)
class Prefill:
    """Run `count` prompt tokens of one sequence on the prefill engine of this `length`; `last` if none remain."""

    sequence: Sequence
    length: int
    count: int

    @property
    def last(self) -> bool:
        """Whether this chunk ends the prompt, so that its sampled token counts."""
        return self.sequence.computed + self.count == len(self.sequence.prompt)


@dataclass(frozen=True, eq=False)
class Decode:
    """Run one token of each sequence on the decode engine of this `batch`; row i is sequence i."""

    sequences: tuple[Sequence, ...]
    batch: int


Plan = Prefill | Decode


class Scheduler:
    """Holds every unfinished sequence and the block allocator.

    Args:
        decode_batches, prefill_lengths: of the engines there are. max_blocks: width of a block table.
    """

    def __init__(
        self, blocks: BlockAllocator, decode_batches: Items[int], prefill_lengths: Items[int], max_blocks: int
    ) -> None:
        self.blocks = blocks
        self._batches = sorted(set(decode_batches))
        self._lengths = sorted(set(prefill_lengths))
        self._max_blocks = max_blocks
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []
        self._plan: Decode | None = None  # kept while nobody joins or leaves: the runner knows it by identity

    @property
    def unfinished(self) -> int:
        """Sequences waiting or running."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; its prompt and max_new must fit a block table."""
        self._waiting.append(sequence)

    def schedule(self) -> Plan | None:
        """The next step; None when there is nothing to do. Prompts go first: each makes the decode steps fuller."""
        self._admit()
        if self._prefilling:
            sequence = self._prefilling[0]
            remaining = len(sequence.prompt) - sequence.computed
            length = next((length for length in self._lengths if length >= remaining), self._lengths[-1])
            return Prefill(sequence, length, min(length, remaining))
        if not self._decoding:
            return None
        if self._plan is None:
            batch = next(batch for batch in self._batches if batch >= len(self._decoding))
            self._plan = Decode(tuple(self._decoding), batch)
        return self._plan

    def settle(self, plan: Plan, results: Items[Sampled]) -> None:
        """Take a step's results: one per sequence, none for a prefill that has not reached its prompt's end."""
        if isinstance(plan, Prefill):
            last = plan.last
            plan.sequence.computed += plan.count
            if last:
                self._prefilling.remove(plan.sequence)
                self._decoding.append(plan.sequence)
                self._plan = None
        sequences = plan.sequences if isinstance(plan, Decode) else (plan.sequence,) if results else ()
        for sequence, sampled in zip(sequences, results, strict=True):
            sequence.accept(sampled)
            if sequence.finished:
                self._leave(sequence)

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """End a sequence wherever it is; its row and blocks come back. Nothing happens to a finished one."""
        if not sequence.finished:
            try:
                sequence.finish(reason)
            finally:
                self._leave(sequence)

    def abort_all(self) -> None:
        """End every sequence."""
        for sequence in [*self._waiting, *self._prefilling, *self._decoding]:
            self.abort(sequence)

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._decoding) < self._batches[-1]:
            sequence = self._waiting[0]
            blocks = self.blocks.allocate(self.blocks.blocks_for(len(sequence.prompt) + sequence.max_new))
            if blocks is None:
                return  # first come, first served: a smaller one behind must not starve this one
            self._waiting.popleft()
            sequence.blocks = blocks
            sequence.block_table = np.zeros(self._max_blocks, np.int32)
            sequence.block_table[: len(blocks)] = blocks
            sequence.status, sequence.started = Status.RUNNING, time.perf_counter()
            self._prefilling.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self._decoding:
            # The last row moves into the hole, so that no other row has to be written anew.
            row = self._decoding.index(sequence)
            last = self._decoding.pop()
            if last is not sequence:
                self._decoding[row] = last
            self._plan = None
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.block_table = [], None
