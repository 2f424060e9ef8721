"""Sampling on the host, for rows the engine's own sampler cannot serve (penalties, min_tokens), and logprobs.

The rule is the one compiled into the engines (runtime/ops/reference.py), with the same counter-based random numbers:
they depend on seed, position and token index alone, so a request gives the same tokens in any batch, and a row may
change between engine and host from one step to the next.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .outputs import Logprob
from .params import SamplingParams

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_BELOW_ONE = np.float32(1 - 2.0**-24)
# A top_p that float32 rounds to zero would keep no token at all; the most likely one always stays.
_SMALLEST_TOP_P = 1e-10


def graph_parameters(params: SamplingParams, vocab_size: int) -> tuple[float, int, float, float]:
    """temperature, top_k, top_p, min_p as an engine wants them: 0 for greedy and for "keep all", within float32."""
    if params.greedy:
        return 0.0, 0, 1.0, 0.0
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    return params.temperature, top_k, max(params.top_p, _SMALLEST_TOP_P), params.min_p


def wrap_seed(seed: int) -> int:
    """Any integer as the signed 64-bit number with the same low 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _mix(x: int) -> int:
    """The 32-bit finalizer "lowbias32" (Wellons 2018) on a Python integer."""
    x ^= x >> 16
    x = x * 0x7FEB352D & _MASK32
    x ^= x >> 15
    x = x * 0x846CA68B & _MASK32
    return x ^ x >> 16


def gumbel(seed: int, position: int, index: np.ndarray) -> np.ndarray:
    """Gumbel noise, float32 [len(index)], of tokens `index` (uint32) for this seed and position."""
    row = _mix((seed & _MASK32) + _GOLDEN & _MASK32)
    row = _mix(row ^ (seed >> 32 & _MASK32))
    row = _mix(row ^ (position & _MASK32))
    x = index * np.uint32(_GOLDEN) ^ np.uint32(row)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    u = ((x >> np.uint32(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)
    # float32 rounds the largest of these up to 1, whose noise is infinite: that token would win whatever its logit.
    u = np.minimum(u, _BELOW_ONE)
    return -np.log(-np.log(u))


def sample_row(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    """One token from logits [vocabulary] float32; parameters as `graph_parameters` gives them.

    Args:
        seed: signed 64 bits. position: of the token whose logits these are; the random counter.
    """
    if temperature == 0:
        return int(logits.argmax())
    z = logits / np.float32(temperature)
    # In float32, as the engines have it, where a tiny min_p is 0: off.
    floor = z.max() + np.log(np.float32(min_p)) if np.float32(min_p) > 0 else np.float32(-np.inf)
    if 0 < top_k < len(z):
        # Dropping by min_p and then taking the k-th largest is the same as the higher of the two thresholds.
        floor = max(floor, np.partition(z, len(z) - top_k)[len(z) - top_k])
    kept = np.flatnonzero(z >= floor)
    if top_p < 1:
        kept = kept[z[kept] >= _nucleus_floor(z[kept], np.float32(top_p))]
    noisy = z[kept] + gumbel(seed, position, kept.astype(np.uint32))
    return int(kept[noisy.argmax()])


def _nucleus_floor(z: np.ndarray, top_p: np.float32) -> np.float32:
    """The smallest z in the smallest set of most likely tokens whose probability reaches top_p (arXiv 1904.09751)."""
    order = np.sort(z)[::-1]
    mass = np.exp(order - order[0])
    mass /= mass.sum()
    # A token stays while the mass before it has not yet reached top_p; the first always does.
    needed = (np.cumsum(mass) - mass) < top_p
    return order[needed].min()


class Penalties:
    """Which tokens a sequence has seen and how often it has made them: all that penalties need, kept up to date."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int], vocab_size: int) -> None:
        self._params = params
        self._seen = np.zeros(vocab_size, bool)
        self._seen[list(prompt)] = True
        self._made = np.zeros(vocab_size, np.float32)

    def add(self, token: int) -> None:
        """Count one token of the output."""
        self._seen[token] = True
        self._made[token] += 1

    def apply(self, logits: np.ndarray) -> None:
        """Change logits [vocabulary] in place: repetition over all tokens, frequency and presence over the output."""
        if self._params.repetition_penalty != 1.0:
            penalty = np.float32(self._params.repetition_penalty)
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        logits -= np.float32(self._params.frequency_penalty) * self._made
        logits -= np.float32(self._params.presence_penalty) * (self._made > 0)


def top_logprobs(logits: np.ndarray, token: int, count: int) -> dict[int, Logprob]:
    """The sampled token's and the `count` most likely tokens' log-probabilities under the model's own logits.

    Args:
        logits: [vocabulary] float32, before temperature, penalties and cuts.

    Returns:
        By token id, the sampled one first, then by falling probability; rank 1 is the most likely.
    """
    shifted = logits - logits.max()
    # float64 for the sum: over 10^5 terms float32 loses the last digits that users compare.
    logprobs = shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    found = {token: Logprob(float(logprobs[token]), int((logits > logits[token]).sum()) + 1)}
    count = min(count, len(logits))
    if count:
        # All that tie with the last one come along, so that which of them is reported does not depend on the partition.
        top = np.flatnonzero(logits >= np.partition(logits, len(logits) - count)[len(logits) - count])
        for rank, index in enumerate(top[np.argsort(-logits[top], kind="stable")][:count].tolist(), 1):
            found.setdefault(index, Logprob(float(logprobs[index]), rank))
    return found
