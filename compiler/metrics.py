"""How far two sets of logits are apart, in the words of the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 1 << 20  # logits that are worked on at once


@dataclass(frozen=True)
class Distance:
    """Logits of an engine against a reference over `tokens` positions.

    Attributes:
        max_relative_error: max |Δlogit| over the reference's logit range, per position, the largest.
        mean_kl, max_kl: KL(reference || engine) in nats.
        top1: share of positions where both have the same most likely token.
        finite: whether every logit of both is; nothing can be said of a reference that is not.
    """

    tokens: int
    max_relative_error: float
    mean_kl: float
    max_kl: float
    top1: float
    finite: bool

    def to_dict(self) -> dict[str, object]:
        """For the reports; numbers that are no longer finite become None, JSON knows no NaN."""
        return _plain(self)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def compare(reference: list[np.ndarray], other: list[np.ndarray]) -> Distance:
    """Distance over all positions of all sequences, [positions, vocabulary] each.

    Raises:
        ValueError: the shapes differ.
    """
    errors, divergences, same = [], [], []
    finite = True
    for a, b in zip(reference, other, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"logits of shape {b.shape} against {a.shape}")
        for want, have in zip(a, b):
            if not (np.isfinite(have).all() and np.isfinite(want).all()):
                finite = False
                errors.append(np.inf)
                divergences.append(np.inf)
                same.append(False)
                continue
            spread = float(want.max() - want.min()) or 1.0
            errors.append(float(np.abs(want.astype(np.float64) - have).max()) / spread)
            p, q = _log_softmax(want), _log_softmax(have)
            divergences.append(max(float((np.exp(p) * (p - q)).sum()), 0.0))
            same.append(int(want.argmax()) == int(have.argmax()))
    return Distance(
        len(errors), max(errors), float(np.mean(divergences)), max(divergences), float(np.mean(same)), finite
    )


@dataclass(frozen=True)
class Fidelity:
    """How well an engine predicts a text, next to its reference, over `tokens` positions.

    Names and formulas are those of llama.cpp's `llama-perplexity --kl-divergence`; errors are standard errors.

    Attributes:
        mean_kl … max_kl: KL(reference || engine) in nats, its mean and percentiles (linear interpolation).
        top1: share of positions where both have the same most likely token.
        perplexity, reference_perplexity: exp of the mean negative log-likelihood of the text's next tokens.
        perplexity_ratio: perplexity / reference_perplexity. Its error takes in that both are measured on one text.
        rms_delta_p: root mean square of the difference of the next token's probability.
    """

    tokens: int
    mean_kl: float
    mean_kl_error: float
    median_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    top1: float
    top1_error: float
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    rms_delta_p: float
    rms_delta_p_error: float
    finite: bool

    def to_dict(self) -> dict[str, object]:
        """For the reports; numbers that are no longer finite become None, JSON knows no NaN."""
        return _plain(self)


class FidelityMeter:
    """Takes in logits piece by piece, of which only a few numbers per position are kept: see `Fidelity`."""

    def __init__(self) -> None:
        self._found: list[np.ndarray] = []

    def add(self, reference: np.ndarray, other: np.ndarray, following: Sequence[int]) -> None:
        """Logits [positions, vocabulary] of both, and the token that follows in the text at each position.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != other.shape or len(reference) != len(following):
            raise ValueError(f"logits of shape {other.shape} against {reference.shape}, {len(following)} tokens")
        step = max(1, _BLOCK // reference.shape[1])
        for start in range(0, len(following), step):
            part = slice(start, start + step)
            self._found.append(_per_position(reference[part], other[part], np.asarray(following[part])))

    @property
    def kl(self) -> np.ndarray:
        """KL of each position so far, in the order they came; infinite where logits are not finite."""
        return np.concatenate(self._found)[:, 0]

    def result(self) -> Fidelity:
        """The figures of all that came in.

        Raises:
            ValueError: nothing did.
        """
        kl, same, reference, other, delta = np.concatenate(self._found).T
        with np.errstate(invalid="ignore"):  # infinities of logits that are not finite
            top1, squares = float(same.mean()), delta**2
            rms = float(np.sqrt(squares.mean()))
            ratio = float(np.exp((other - reference).mean()))
            median, p99, p999 = (float(np.quantile(kl, q)) for q in (0.5, 0.99, 0.999))
            return Fidelity(
                len(kl), float(kl.mean()), _error(kl), median, p99, p999, float(kl.max()), top1, _error(same),
                float(np.exp(other.mean())), float(np.exp(reference.mean())), ratio, ratio * _error(other - reference),
                rms, 0.5 / rms * _error(squares) if rms else 0.0, bool(np.isfinite(kl).all()),
            )  # fmt: skip


def _per_position(reference: np.ndarray, other: np.ndarray, following: np.ndarray) -> np.ndarray:
    """[positions, 5]: KL, same top token, both negative log-likelihoods, difference of the next token's probability."""
    rows = np.arange(len(following))
    with np.errstate(invalid="ignore"):
        p, q = _log_softmax(reference), _log_softmax(other)
        kl = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
    same = reference.argmax(-1) == other.argmax(-1)
    want, have = p[rows, following], q[rows, following]
    found = np.stack([kl, same, -want, -have, np.exp(have) - np.exp(want)], -1)
    bad = ~(np.isfinite(reference).all(-1) & np.isfinite(other).all(-1))
    found[bad] = (np.inf, 0.0, np.inf, np.inf, np.inf)
    return found


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(np.sqrt(values.var() / (len(values) - 1))) if len(values) > 1 else 0.0


def _plain(record: Distance | Fidelity) -> dict[str, object]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.__dict__.items()}
