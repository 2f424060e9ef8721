"""The int4 grid of a group of weights: sixteen values, a scale and a zero point, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.ops.quantized import pack_nibbles


@dataclass(frozen=True)
class Int4Grid:
    """Scales for `group_size` columns of a row each (0: for the whole row), float16; no zero points if symmetric."""

    group_size: int
    symmetric: bool = True

    def columns(self, k: int) -> int:
        """Columns of a group where a row has `k`."""
        return self.group_size or k

    def fit(self, groups: Tensor, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero point [...] that span weights [..., group], both float32 of what is stored.

        Args:
            shrink: share of the span that is kept, the rest is clipped: a number, or one per group [...].
        """
        if self.symmetric:
            scale = _half(groups.abs().amax(-1) * shrink / 7.5)
            return scale, torch.full_like(scale, 8.0)
        low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
        scale = _half((high - low) / 15)
        return scale, torch.round(-low / scale).clamp(0, 15)

    def parts(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """What is stored: codes [n, k] packed, scale and zero [n, k / group] in their dtypes."""
        parts = {"values": pack_nibbles(codes), "scale": scale.half()}
        return parts if self.symmetric else {**parts, "zero": zero.to(torch.uint8)}

    def quantize(self, weight: Tensor, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [n, k], scale and zero point [n, k / group] of a float32 weight [n, k], each value to the nearest."""
        groups = weight.unflatten(1, (-1, self.columns(weight.shape[1])))
        scale, zero = self.fit(groups, shrink)
        return encode(groups, scale[..., None], zero[..., None]).flatten(1), scale, zero


def encode(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of the sixteen values, as float32."""
    return (torch.round(weight / scale) + zero).clamp_(0, 15)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Float32 weights [n, k] of codes [n, k] and scale and zero [n, groups]."""
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    return ((groups - zero[..., None]) * scale[..., None]).flatten(1)


def _half(scale: Tensor) -> Tensor:
    """Scales as float16 holds them, in float32; of a group too small to tell from zeros, 1."""
    scale = scale.half().float()
    return torch.where(scale == 0, 1.0, scale)
