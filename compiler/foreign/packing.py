"""How int32 words hold codes of 4 or 8 bits; nothing here rounds.

The lowest bits of a word come first, so that on a little-endian machine its bytes are its codes in order, and a row of
words along k is a row of the ops' own layout (runtime/ops/quantized.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.ops.quantized import unpack_nibbles

# AutoAWQ's order of eight columns in a word, from the lowest bits up, for kernels that unpack pairs of halves.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def word_bytes(words: Tensor) -> Tensor:
    """int32 [rows, m] as its bytes, uint8 [rows, 4m], the lowest of each word first."""
    return words.contiguous().view(torch.uint8)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """Codes of int32 [rows, m], uint8 [rows, 32 m / bits]."""
    raw = word_bytes(words)
    return raw if bits == 8 else unpack_nibbles(raw)


def awq_codes(words: Tensor) -> Tensor:
    """Codes of AutoAWQ's int32 [rows, m] with its columns in their true order, uint8 [rows, 8m]."""
    order = torch.tensor(AWQ_ORDER).argsort()
    return codes_of(words, 4).unflatten(-1, (-1, 8))[..., order].flatten(-2)
