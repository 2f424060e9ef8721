"""A request and its sequences: what is known of them while they wait, run and finish.

A `Sequence` decides alone, token by token, whether it is over; scheduler and runner only ask. A `Request` is one
prompt with `n` sequences and turns into a `RequestOutput`.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .detokenizer import Detokenizer, StopMatcher
from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from .params import SamplingParams
from .sampling import Penalties


class Status(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sampled(NamedTuple):
    """What one step found for one sequence; `finite` is False when its logits were not all numbers."""

    token: int
    logprobs: dict[int, Logprob] | None = None
    finite: bool = True


@dataclass(eq=False)
class Sequence:
    """One completion in the making.

    Args:
        seed: signed 64 bits. max_new: most new tokens, at least 1. detokenizer: None for token ids only.
        end_ids: the model's own ends of sequence; empty with ignore_eos.
    """

    prompt: list[int]
    params: SamplingParams
    seed: int
    max_new: int
    end_ids: frozenset[int] = frozenset()
    detokenizer: Detokenizer | None = None
    penalties: Penalties | None = None
    status: Status = Status.WAITING
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens of the prompt in the KV cache
    blocks: list[int] = field(default_factory=list)
    block_table: np.ndarray | None = None  # [max_blocks] int32 while it owns blocks
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        self._stops = StopMatcher(self.params.stops, self.params.include_stop_str_in_output)

    @property
    def position(self) -> int:
        """Position of the newest token: the next decode step's input."""
        return len(self.prompt) + len(self.output) - 1

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.status is Status.FINISHED

    @property
    def too_early(self) -> bool:
        """Whether min_tokens forbids the next token to end the sequence."""
        return len(self.output) < self.params.min_tokens

    @property
    def forbidden(self) -> list[int]:
        """The tokens that may not be sampled next."""
        return [*self.end_ids, *self.params.stop_ids] if self.too_early else []

    @property
    def host_sampled(self) -> bool:
        """Whether the next token needs logits changed on the host; else the engine's own token is taken."""
        return self.penalties is not None or bool(self.forbidden)

    def accept(self, sampled: Sampled) -> None:
        """Take one sampled token and decide whether the sequence is over."""
        self.last_token = time.perf_counter()
        if not sampled.finite:
            return self.finish("error")
        if self.first_token is None:
            self.first_token = self.last_token
        early = self.too_early
        token = sampled.token
        self.output.append(token)
        if self.penalties is not None:
            self.penalties.add(token)
        if sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
            if self.detokenizer is not None:
                for index, entry in sampled.logprobs.items():
                    entry.decoded_token = self.detokenizer.alone(index)
            self.cumulative_logprob += sampled.logprobs[token].logprob
        if not early and (token in self.end_ids or token in self.params.stop_ids):
            if self.params.include_stop_str_in_output:
                self._write(token, early)
            return self.finish("stop", None if token in self.end_ids else token)
        stop = self._write(token, early)
        if stop is not None:
            return self.finish("stop", stop)
        if len(self.output) >= self.max_new:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """End it; the text held back is given out unless a stop string ended it."""
        self.status, self.finish_reason, self.stop_reason = Status.FINISHED, reason, stop_reason
        # After an error or an abort nobody waits for held-back text, and the detokenizer may be what failed.
        if isinstance(stop_reason, str) or self.detokenizer is None or reason in ("error", "abort"):
            return
        shown, stop = self._stops.add(self.detokenizer.flush())
        self.text += shown
        if stop is None:
            self.text += self._stops.flush()
        elif reason != "error":
            self.finish_reason, self.stop_reason = "stop", stop

    def _write(self, token: int, early: bool) -> str | None:
        """Add the token's text; the stop string that it completes."""
        if self.detokenizer is None:
            return None
        piece = self.detokenizer.add(token)
        if early:
            # Before min_tokens a stop string is text like any other, also as the beginning of a later one.
            self.text += piece
            return None
        shown, stop = self._stops.add(piece)
        self.text += shown
        return stop


@dataclass(eq=False)
class Request:
    """One prompt and its n sequences. `arrived` is on time.perf_counter's clock, in seconds."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[Sequence]
    arrived: float

    @property
    def finished(self) -> bool:
        """Whether all sequences are."""
        return all(sequence.finished for sequence in self.sequences)

    def output(self, since: Items[Mark] = ()) -> RequestOutput:
        """The request's present state, or with `since` (one mark per sequence) only what came after the marks."""
        marks = since or [Mark()] * len(self.sequences)
        outputs = [_completion(i, s, mark) for i, (s, mark) in enumerate(zip(self.sequences, marks, strict=True))]
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, outputs, self.finished, self._metrics()
        )

    def marks(self) -> list[Mark]:
        """How far each sequence has come, for `output(since=...)`."""
        return [Mark(len(s.text), len(s.output), s.finished) for s in self.sequences]

    def _metrics(self) -> RequestMetrics:
        every = self.sequences
        starts = [s.started for s in every if s.started is not None]
        firsts = [s.first_token for s in every if s.first_token is not None]
        lasts = [s.last_token for s in every if s.last_token is not None]
        gaps = sum(len(s.output) - 1 for s in every if s.output)
        between = sum(s.last_token - s.first_token for s in every if s.last_token and s.first_token)
        return RequestMetrics(
            prompt_tokens=len(self.prompt_token_ids),
            output_tokens=sum(len(s.output) for s in every),
            queue_ms=(min(starts) - self.arrived) * 1e3 if starts else None,
            ttft_ms=(min(firsts) - self.arrived) * 1e3 if firsts else None,
            tpot_ms=between * 1e3 / gaps if gaps else None,
            total_ms=(max(lasts) - self.arrived) * 1e3 if lasts and self.finished else None,
            arrival_s=self.arrived,
        )


class Mark(NamedTuple):
    """How much of a sequence has been given out."""

    text: int = 0
    tokens: int = 0
    finished: bool = False


def _completion(index: int, sequence: Sequence, mark: Mark) -> CompletionOutput:
    wanted = sequence.params.logprobs is not None
    return CompletionOutput(
        index,
        sequence.text[mark.text :],
        sequence.output[mark.tokens :],
        sequence.cumulative_logprob if wanted else None,
        sequence.logprobs[mark.tokens :] if wanted else None,
        sequence.finish_reason,
        sequence.stop_reason,
    )
