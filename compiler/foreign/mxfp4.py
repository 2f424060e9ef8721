"""MXFP4 experts, as gpt-oss ships them: e2m1 codes in blocks of 32 along k, one power of two for each.

All experts of a layer are one tensor. No engine holds experts quantized, so they are made dense: in bfloat16 without
any rounding, since a code has one bit of mantissa and its scale has none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts.errors import UsageError
from ...passes.weights import Load
from ...runtime.ops.quantized import e2m1_values, unpack_nibbles
from .fields import Fields
from .layer import Layer, Stored

_LARGEST_EXPONENT = 252  # 6 * 2^(252 - 127) is the last that bfloat16 holds


@dataclass(frozen=True)
class Experts:
    """The experts of one layer, [experts, k, n] in the model, stored [experts, n, k / 32, 16]."""

    name: str
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors it is made of."""
        return f"{self.name}_blocks", f"{self.name}_scales"

    def dense(self, load: Load) -> Tensor:
        """bfloat16 [experts, k, n], exactly. Raises UsageError for scales that no number can have."""
        blocks, scales = (load(name) for name in self.names)
        if int(scales.max()) > _LARGEST_EXPONENT:
            raise UsageError(
                f"{self.names[1]}: a scale is 2^{int(scales.max()) - 127} or NaN",
                "bfloat16 cannot hold such weights",
                "fetch the model again, or take another checkpoint of it",
            )
        experts, k, n = self.shape
        dense = torch.empty(experts, k, n, dtype=torch.bfloat16)
        for expert in range(experts):
            values = e2m1_values(unpack_nibbles(blocks[expert])).bfloat16()
            wide = torch.ldexp(values, scales[expert].int()[..., None] - 127)
            dense[expert] = wide.reshape(n, k).t()
        return dense


class MXFP4Reader:
    """`quant_method: mxfp4`."""

    method = "mxfp4"

    def __init__(self, fields: Fields) -> None:
        fields.strings("modules_to_not_convert")  # all but the experts, whose tensors tell for themselves
        fields.finish("dequantize")

    def layer(
        self, module: str, kinds: Collection[str], prefix: str, shape: tuple[int, int], stored: Stored
    ) -> Layer | None:
        """No Linear is quantized."""
        return None

    def experts(self, parameter: str, stored_name: str, shape: tuple[int, ...], stored: Stored) -> Experts | None:
        """The experts of a layer, if they are stored quantized.

        Args:
            parameter: its name in the model; stored_name: in the checkpoint; shape: [experts, k, n].
        """
        found = Experts(stored_name, shape)
        if not stored.has(*found.names) or len(shape) != 3:
            return None
        experts, k, n = shape
        why = f"MXFP4 for {list(shape)}"
        if k % 32:
            raise UsageError(f"{parameter}: {k} columns are no blocks of 32", why, "fetch the model again")
        stored.need(found.names[0], [(experts, n, k // 32, 16)], [torch.uint8], why)
        stored.need(found.names[1], [(experts, n, k // 32)], [torch.uint8], why)
        return found
