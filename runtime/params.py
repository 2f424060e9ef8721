"""What a request may ask of the sampler: `SamplingParams`, with vLLM's names and defaults.

Everything is checked here, once, when the object is made: code behind it may rely on finite numbers in range, and no
engine ever sees a value that its kernels were not written for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifacts.errors import UsageError

MAX_SEQUENCES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 256
# Below this a division by the temperature only overflows: such requests mean greedy (the same bound as vLLM's).
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request.

    Args:
        n: completions per prompt; completion i uses seed + i.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one; 0 is off.
        seed: any 64-bit integer; the same seed gives the same tokens in any batch. None draws one per request.
        max_tokens: at most so many new tokens; what the artifact's length leaves may be less.
        min_tokens: no end-of-sequence and no stop token before so many new tokens, and no stop string is acted on.
        stop: up to 64 strings that end the text; they may lie across tokens.
        stop_token_ids: tokens that end the text.
        ignore_eos: generate past the model's own end-of-sequence tokens.
        logprobs: None, or how many of the most likely tokens to report beside the sampled one (up to 20).
        repetition_penalty: over prompt and output; 1 is off (HF's rule). presence_penalty, frequency_penalty: over the
            output, subtracted from the logits (OpenAI's rule).
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: end the text behind the stop string, not before it.
        detokenize: False gives token ids only; the tokenizer is then never loaded for token-id prompts.

    Raises:
        UsageError: naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_SEQUENCES)
        _number("temperature", self.temperature, 0.0, float(np.finfo(np.float32).max))
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", self.min_tokens, f"must not exceed max_tokens ({self.max_tokens})")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "must be True or False")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        if self.stop and not self.detokenize:
            raise _refusal("stop", list(self.stops), "needs detokenize=True: stop strings are looked for in the text")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return self.stop  # type: ignore[return-value]  # __post_init__ made it a tuple of str

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop token ids."""
        return self.stop_token_ids  # type: ignore[return-value]  # __post_init__ made it a tuple of int

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether any penalty changes the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _refusal(name: str, value: object, rule: str) -> UsageError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return UsageError(
        f"Sampling parameter {name} is {shown}.", f"{name} {rule}.", f"Give {name} such a value, or leave it out."
    )


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal(name, value, f"must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        # An integer of a million digits must not be turned into text: Python itself refuses that with a ValueError.
        shown = value if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
        raise _refusal(name, shown, f"must be from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refusal(name, value, f"must be a number, not {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > 128:
        raise _refusal(name, f"an integer of {value.bit_length()} bits", f"must be from {low:g} to {high:g}")
    if not math.isfinite(value):
        raise _refusal(name, value, "must be a finite number")
    if not low <= value <= high or (open_low and value == low):
        raise _refusal(name, value, f"must be {'above' if open_low else 'at least'} {low:g} and at most {high:g}")


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(s, str) for s in value):
        raise _refusal("stop", value, "must be a string or a list of strings")
    if len(value) > MAX_STOPS:
        raise _refusal("stop", f"a list of {len(value)} strings", f"may hold at most {MAX_STOPS} strings")
    for stop in value:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise _refusal("stop", stop, f"may hold no empty string and none over {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(value))


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise _refusal("stop_token_ids", value, "must be a list of token ids")
    if len(value) > MAX_STOPS:
        raise _refusal("stop_token_ids", f"a list of {len(value)} ids", f"may hold at most {MAX_STOPS} ids")
    for token in value:
        _integer("stop_token_ids", token, 0, 2**31 - 1)
    return tuple(dict.fromkeys(value))
