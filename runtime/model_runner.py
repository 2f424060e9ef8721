"""From a step's plan to engine buffers and back: writes what changed, runs one engine, reads one token per row.

When a decode step follows another with the same rows and every row took the engine's own token, nothing is written at
all: `advance()` feeds the tokens back on the device. An asynchronous engine is then given step n + 1 before the tokens
of step n are read, so that the device never waits for the host. Should step n end a row, or another join, step n + 1 is
dropped: what it wrote is written again, or lies in blocks whose next owner comes behind it on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from typing import cast

import numpy as np

from ..artifacts.errors import VerificationError
from .engines.base import AsyncEngine, Engine, EngineGroup
from .sampling import graph_parameters, sample_row, top_logprobs
from .scheduler import Decode, Plan, Prefill
from .sequence import Sampled, Sequence


class ModelRunner:
    """Runs plans on the engines of one group.

    Raises:
        VerificationError: there is no decode or no prefill engine.
    """

    def __init__(self, group: EngineGroup, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        engines = list(group.engines.values())
        self._decode = {e.entry.batch: e for e in engines if e.entry.phase == "decode"}
        self._prefill = {e.entry.length: e for e in engines if e.entry.phase == "prefill"}
        if not self._decode or not self._prefill:
            missing = "decode" if not self._decode else "prefill"
            raise VerificationError(
                f"The artifact has no {missing} engine.",
                "Generating text takes at least one prefill and one decode engine.",
                "Build it with at least one prefill length and one decode batch size.",
            )
        # Which sequence's table and parameters each row of a decode engine holds.
        self._rows: dict[int, list[Sequence | None]] = {b: [None] * b for b in self._decode}
        # The plan whose next step an asynchronous engine has been given already.
        self._ahead: Decode | None = None
        # The last run, if a decode step of the same plan may be advanced from it.
        self._advances: Decode | None = None
        for engine in self._decode.values():
            for row in range(engine.entry.batch):
                _clear_row(engine, row)

    @property
    def decode_batches(self) -> list[int]:
        """Batch sizes there are engines for."""
        return sorted(self._decode)

    @property
    def prefill_lengths(self) -> list[int]:
        """Chunk lengths there are engines for."""
        return sorted(self._prefill)

    def run(self, plan: Plan) -> list[Sampled]:
        """Run one step; one result per sequence, none for a prefill that has not reached its prompt's end."""
        # Taken back first: should the engine fail, nothing may be built on its state.
        advances, self._advances = self._advances, None
        ahead, self._ahead = self._ahead, None
        if isinstance(plan, Prefill):
            return self._run_prefill(plan)
        engine = self._decode[plan.batch]
        if ahead is not plan:
            if advances is plan:
                engine.advance()
            else:
                self._write_rows(engine, plan.sequences)
                engine.run()
        own = not any(sequence.host_sampled for sequence in plan.sequences)
        if own and engine.asynchronous and all(map(_goes_on, plan.sequences)):
            engine.advance()
            results = self._read(engine, plan.sequences, cast(AsyncEngine, engine).earlier())
            self._ahead = plan
        else:
            results = self._read(engine, plan.sequences)
        if own:
            self._advances = plan
        return results

    def _run_prefill(self, plan: Prefill) -> list[Sampled]:
        sequence, count = plan.sequence, plan.count
        engine = self._prefill[plan.length]
        inputs, start = engine.inputs, plan.sequence.computed
        inputs["tokens"][0, :count] = sequence.prompt[start : start + count]
        inputs["tokens"][0, count:] = 0
        inputs["positions"][0, :count] = np.arange(start, start + count)
        inputs["positions"][0, count:] = -1
        inputs["block_tables"][0] = sequence.block_table
        inputs["last_index"][0] = count - 1
        _write_sampling(engine, 0, sequence, self._vocab_size, greedy=not plan.last)
        engine.run()
        return self._read(engine, (sequence,)) if plan.last else []

    def _write_rows(self, engine: Engine, sequences: tuple[Sequence, ...]) -> None:
        inputs, rows = engine.inputs, self._rows[engine.entry.batch]
        tokens, positions = inputs["tokens"], inputs["positions"]
        for row, sequence in enumerate(sequences):
            tokens[row, 0] = sequence.output[-1]
            positions[row, 0] = sequence.position
            if rows[row] is not sequence:
                inputs["block_tables"][row] = sequence.block_table
                rows[row] = sequence
                _write_sampling(engine, row, sequence, self._vocab_size, greedy=sequence.penalties is not None)
        for row in range(len(sequences), len(rows)):
            if rows[row] is not None:
                _clear_row(engine, row)
                rows[row] = None

    def _read(
        self, engine: Engine, sequences: Items[Sequence], found: tuple[np.ndarray, np.ndarray] | None = None
    ) -> list[Sampled]:
        """The sampled token of each row, from the engine or, for rows that need it, from the logits.

        `found` holds tokens and their logits where these are not the engine's last, whose logits are gone then.

        Non-finite logits are looked for at the sampled token alone, one number per row: a NaN anywhere in the hidden
        state makes every logit of the row NaN, an argmax stops at NaN or +inf, and it is -inf only if all are. An
        engine may also say so itself with a token id outside of the vocabulary.
        """
        tokens, picked = (engine.next_tokens(), engine.sampled_logits()) if found is None else found
        wanted = found is None and any(s.host_sampled or s.params.logprobs is not None for s in sequences)
        logits = engine.logits() if wanted else None
        results = []
        for row, (sequence, token, logit) in enumerate(zip(sequences, tokens.tolist(), picked.tolist())):
            if not (0 <= token < self._vocab_size and math.isfinite(logit)):
                results.append(Sampled(0, None, False))
                continue
            if logits is None:
                results.append(Sampled(token))
                continue
            if sequence.host_sampled:
                token = self._sample(sequence, logits[row])
            count = sequence.params.logprobs
            results.append(Sampled(token, None if count is None else top_logprobs(logits[row], token, count)))
        return results

    def _sample(self, sequence: Sequence, logits: np.ndarray) -> int:
        logits = logits.copy()
        logits[sequence.forbidden] = -np.inf
        if sequence.penalties is not None:
            sequence.penalties.apply(logits)
        return sample_row(
            logits, *graph_parameters(sequence.params, self._vocab_size), sequence.seed, sequence.position
        )


def _goes_on(sequence: Sequence) -> bool:
    """Whether nothing known yet stands against a step beyond the one whose token is awaited.

    That token must leave room for one more (else the step is surely dropped; with room for it the sequence has a block
    for it too), and no logits may be wanted, since the next step overwrites them.
    """
    return len(sequence.output) + 1 < sequence.max_new and sequence.params.logprobs is None


def _write_sampling(engine: Engine, row: int, sequence: Sequence, vocab_size: int, greedy: bool) -> None:
    """greedy: the engine's token will not be used, so let it take the cheapest way to one."""
    inputs = engine.inputs
    temperature, top_k, top_p, min_p = graph_parameters(sequence.params, vocab_size)
    inputs["temperature"][row] = 0.0 if greedy else temperature
    inputs["top_k"][row], inputs["top_p"][row], inputs["min_p"][row] = top_k, top_p, min_p
    inputs["seeds"][row] = sequence.seed


def _clear_row(engine: Engine, row: int) -> None:
    """Make a row one that nobody owns: no position, the null block, greedy."""
    inputs = engine.inputs
    inputs["tokens"][row, 0], inputs["positions"][row, 0] = 0, -1
    inputs["block_tables"][row] = 0
    inputs["temperature"][row], inputs["top_k"][row], inputs["top_p"][row], inputs["min_p"][row] = 0.0, 0, 1.0, 0.0
    inputs["seeds"][row] = 0
