"""Quantization schemes by the names llm-compressor gives them: the weights' format and what becomes of activations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is computed.

    Attributes:
        format: of the weight, a name of runtime/ops/quantized.py; bits: of a value.
        activations: "" as they are, else "int8" or "fp8", each token by its own scale.
        grouped: whether a scale belongs to `group_size` columns of a row, not to the whole row.
    """

    name: str
    format: str
    bits: int
    activations: str = ""
    grouped: bool = False


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("W8A16", "int8", 8),
        Scheme("W4A16", "int4", 4, grouped=True),
        Scheme("FP8", "fp8", 8, activations="fp8"),
        Scheme("FP8-W8A16", "fp8", 8),
        Scheme("W8A8", "int8", 8, activations="int8"),
    )
}
