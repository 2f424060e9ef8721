"""Round-to-nearest: the values, scales and zero points of a weight from the weight alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.ops.quantized import FP8_MOST, INT8_MOST
from .int4_grid import Int4Grid

# Below this a group is all zeros: its scale would not be a normal float32.
_SMALLEST = 1e-30


@dataclass(frozen=True)
class RoundToNearest:
    """`rtn(weight)` gives "values", "scale" and, where a format has them, "zero" of a weight [n, k].

    No element is off by more than half of its group's scale (int8, int4) or half a step of e4m3 (fp8).

    Attributes:
        format: "int8" and "fp8" have one scale per row; "int4" one per `group_size` columns, which must divide k.
        symmetric: int4 without zero points, -8 to 7 steps; else with one that makes use of all 16 values.
    """

    format: str
    group_size: int = 0
    symmetric: bool = True

    def __call__(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts in the layout of runtime/ops/quantized.py: scales float32, of int4 float16."""
        wide = weight.float()
        if self.format == "int8":
            scale = _scale(wide, INT8_MOST)
            return {"values": torch.round(wide / scale).clamp(-INT8_MOST, INT8_MOST).to(torch.int8), "scale": scale}
        if self.format == "fp8":
            scale = _scale(wide, FP8_MOST)
            return {"values": (wide / scale).clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn), "scale": scale}
        if self.format == "int4":
            grid = Int4Grid(self.group_size, self.symmetric)
            return grid.parts(*grid.quantize(wide))
        raise ValueError(f"there is no rounding to {self.format!r}")


def _scale(wide: Tensor, most: float) -> Tensor:
    """[n, 1]: the largest magnitude of each row becomes `most`."""
    scale = wide.abs().amax(1, keepdim=True) / most
    return torch.where(scale > _SMALLEST, scale, 1.0)
