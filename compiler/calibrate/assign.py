"""Mixed precision: for every unit of weights the form that costs the fewest bits within a budget of KL divergence.

Losses of units are taken to add up. Rounding errors are small and independent, KL is quadratic in small changes of the
logits, and what is left of the mixed terms averages out; the sum is measured afterwards, all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BINS = 2048


@dataclass(frozen=True)
class Form:
    """How a unit can be stored: a scheme ("none" for its own dtype), the columns of a scale, and bits per weight."""

    scheme: str
    group_size: int
    bits: float


@dataclass(frozen=True)
class Unit:
    """Weights that are stored alike since they are read together, and what each form of them costs.

    Attributes:
        weights: their names; elements: how many numbers they are.
        losses: KL divergence of the model with this unit alone in each form, in nats.
    """

    weights: tuple[str, ...]
    elements: int
    losses: dict[Form, float]


def assign(units: Sequence[Unit], budget: float) -> list[Form]:
    """The form of each unit with the fewest bits in all whose losses add up to no more than `budget`.

    A knapsack, solved exactly but for losses being rounded up to a 2,048th of the budget. Every unit needs one form of
    loss 0, so that there is an answer.
    """
    step = budget / _BINS or 1.0
    best = np.zeros(_BINS + 1)  # fewest bits of the units so far, by the bins that are left to spend
    choices: list[tuple[list[Form], np.ndarray]] = []
    for unit in units:
        forms = list(unit.losses)
        costs = np.full((len(forms), _BINS + 1), np.inf)
        for row, form in enumerate(forms):
            bins = int(np.ceil(max(unit.losses[form], 0.0) / step))
            if bins <= _BINS:
                costs[row, bins:] = best[: _BINS + 1 - bins] + form.bits * unit.elements
        choices.append((forms, costs.argmin(0)))
        best = costs.min(0)
    if not np.isfinite(best[-1]):
        raise ValueError("a unit has no form without loss")
    found: list[Form] = []
    left = _BINS
    for unit, (forms, chosen) in zip(reversed(units), reversed(choices)):
        form = forms[chosen[left]]
        found.append(form)
        left -= int(np.ceil(max(unit.losses[form], 0.0) / step))
    return found[::-1]


def average_bits(units: Sequence[Unit], forms: Sequence[Form]) -> float:
    """Bits per weight, scales included."""
    return sum(f.bits * u.elements for u, f in zip(units, forms)) / sum(u.elements for u in units)
