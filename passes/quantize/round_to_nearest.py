"""Round-to-nearest: the values, scales and zero points of a weight from the weight alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.ops.quantized import FP8_MOST, INT8_MOST, pack_nibbles

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
            return self._int4(wide)
        raise ValueError(f"there is no rounding to {self.format!r}")

    def _int4(self, wide: Tensor) -> dict[str, Tensor]:
        groups = wide.unflatten(1, (-1, self.group_size or wide.shape[1]))
        if self.symmetric:
            # Values are rounded by the scale that is stored, so that its own rounding costs nothing.
            scale = _half(groups.abs().amax(-1) / 7.5)
            values = torch.round(groups / scale.float()[..., None]).clamp(-8, 7) + 8
            return {"values": pack_nibbles(values.flatten(1)), "scale": scale}
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = _half((high - low) / 15)
        zero = torch.round(-low / scale.float()).clamp(0, 15)
        values = (torch.round(groups / scale.float()[..., None]) + zero[..., None]).clamp(0, 15)
        return {"values": pack_nibbles(values.flatten(1)), "scale": scale, "zero": zero.to(torch.uint8)}


def _scale(wide: Tensor, most: float) -> Tensor:
    """[n, 1]: the largest magnitude of each row becomes `most`."""
    scale = wide.abs().amax(1, keepdim=True) / most
    return torch.where(scale > _SMALLEST, scale, 1.0)


def _half(scale: Tensor) -> Tensor:
    """Scales as float16; of a group of zeros, or of numbers too small to tell from them, 1."""
    scale = scale.half()
    return torch.where(scale == 0, 1.0, scale)
