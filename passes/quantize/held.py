"""Weights that the checkpoint holds quantized, as passes know them: in the ops' layout, nothing of them read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..weights import Constant, Expression


@dataclass(frozen=True)
class QuantizedPart:
    """The values, scales or zero points of a weight."""

    expression: Expression
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class QuantizedWeight:
    """A Linear's weight [n, k] in the layout of runtime/ops/quantized.py.

    Attributes:
        format, group, activations: as `linear_quantized` takes them.
        columns: which of the input's columns stands at each place, int64 [k]; None for their own order.
        note: what the checkpoint asks for and is not done, "" if nothing.
    """

    format: str
    group: tuple[int, int]
    activations: str
    values: QuantizedPart
    scale: QuantizedPart
    zero: QuantizedPart | None = None
    columns: Constant | None = None
    note: str = ""

    @property
    def rows(self) -> int:
        """Rows of the weight, n."""
        return self.values.shape[0]

    @property
    def form(self) -> tuple[object, ...]:
        """What must be equal for two weights to be stacked and read by one product."""
        return self.format, self.group, self.activations, self.scale.dtype, self.zero is None, self.columns


def stackable(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether weights of one form can stand row under row: blocks of several rows must not be cut but at the end."""
    return all(weight.rows % weight.group[0] == 0 for weight in weights[:-1])
