"""What a request gives back, with vLLM's names: `RequestOutput`, its `CompletionOutput`s and their times."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Logprob:
    """Log-probability (natural) of one token under the model's own distribution; rank 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class RequestMetrics:
    """Times of one request in milliseconds; None where it has not come so far.

    queue_ms: arrival to first work. ttft_ms: arrival to first token. tpot_ms: mean time between tokens after the first.
    total_ms: arrival to the end. arrival_s: when it arrived, in seconds of `time.perf_counter`: what orders requests.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    queue_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    total_ms: float | None = None
    arrival_s: float | None = None


@dataclass
class CompletionOutput:
    """One completion, or in a stream what is new of it.

    finish_reason: None while it runs; "stop" (end of sequence, stop token or stop string), "length" (max_tokens or the
    artifact's length), "abort", or "error" (the engine gave logits that are not finite).
    stop_reason: the stop string or stop token id that ended it; None for the model's own end of sequence.
    logprobs: per token, by token id; None when not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """One request's prompt, its completions (n of them) and its times. `prompt` is None for token-id prompts."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
