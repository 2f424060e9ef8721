"""fp8 weights with a scale per block of 128 x 128, as DeepSeek and Qwen ship them, or one per matrix.

A Linear is quantized where its weight is stored as float8_e4m3fn; beside it stands weight_scale_inv (in spite of its
name the factor that the values are multiplied by) or, one for the matrix, weight_scale.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts.errors import UnsupportedModelError, UsageError
from ...passes.weights import Load
from .fields import FETCH, FIX, Fields, names_module
from .layer import FLOATS, Layer, Stored

_BLOCK = 128
_EXACT = "activations stay as they are, which is more exact"


@dataclass(frozen=True)
class FP8Layer(Layer):
    """float8_e4m3fn values and their scale, stored as the ops take them."""

    scale_name: str = "weight_scale_inv"

    def values(self, load: Load) -> Tensor:
        """As they are."""
        return load(f"{self.prefix}.weight")

    def scale(self, load: Load) -> Tensor:
        """One per block; one for the matrix is repeated for each row."""
        scale = load(f"{self.prefix}.{self.scale_name}")
        return self.checked_scale(scale if scale.dim() == 2 else scale.reshape(1, 1))


class FP8Reader:
    """`quant_method: fp8`."""

    method = "fp8"

    def __init__(self, fields: Fields) -> None:
        block = fields.integers("weight_block_size")
        if block not in (None, [_BLOCK, _BLOCK]):
            raise UnsupportedModelError(
                f"{fields.where}.weight_block_size = {block} is not supported", f"what is: {[_BLOCK, _BLOCK]}", FIX
            )
        self.blocks = block is not None
        self.static = fields.one_of("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
        fields.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        # Rounded to powers of two or not, the scales are stored as floats.
        fields.one_of("scale_fmt", ("float", "ue8m0"), "float")
        fields.one_of("expert_dtype", ("fp8",), "fp8")
        fields.absent("modules_to_convert", "only Linear modules are loaded quantized")
        fields.absent("kv_cache_scheme", "the KV cache's scales are made while it is written: shapes.kv_cache_dtype")
        self.skipped = fields.strings("modules_to_not_convert") + fields.strings("ignored_layers")
        fields.finish("dequantize")

    def layer(
        self, module: str, kinds: Collection[str], prefix: str, shape: tuple[int, int], stored: Stored
    ) -> Layer | None:
        """A layer is quantized where fp8 is stored; the config only says where it must not be."""
        info = stored.tensors.get(f"{prefix}.weight")
        if info is None or info.dtype != torch.float8_e4m3fn:
            return None
        if any(names_module(name, module) for name in self.skipped):
            raise UsageError(
                f"{prefix}.weight holds fp8",
                "quantization_config leaves this module as it is",
                FETCH,
            )
        (n, k), scale = shape, "weight_scale_inv"
        if not self.blocks and not stored.has(f"{prefix}.{scale}"):
            scale = "weight_scale"
        why = f"fp8 {'in blocks of 128 x 128' if self.blocks else 'with one scale'} for [{n}, {k}]"
        shapes: list[tuple[int, ...]] = [(-(-n // _BLOCK), -(-k // _BLOCK))] if self.blocks else [(), (1,), (1, 1)]
        stored.need(f"{prefix}.weight", [shape], [torch.float8_e4m3fn], why)
        stored.need(f"{prefix}.{scale}", shapes, FLOATS, why)
        beside = [f"{prefix}.{part}" for part in ("input_scale", "activation_scale")]
        names = (f"{prefix}.weight", f"{prefix}.{scale}", *(name for name in beside if name in stored.tensors))
        group, activations, note = (1, k), "fp8", ""
        if self.blocks:
            group, activations = (_BLOCK, _BLOCK), ""
            note = f"dynamic fp8 activations in groups of {_BLOCK} are asked for; {_EXACT}"
        elif self.static:
            note = "static fp8 activations are asked for; they are quantized per token, which is more exact"
        return FP8Layer(
            prefix, shape, "fp8", group, torch.float32, names, activations, note=note, scale_name=scale
        )  # fmt: skip
