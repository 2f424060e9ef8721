"""How far two sets of logits are apart, in the words of the field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in self.__dict__.items()}


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
