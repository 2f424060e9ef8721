"""Weights for a config without a checkpoint: each tensor made on demand from (seed, name), the same on any machine.

For speed measurements and tests no real weights are needed, only their shapes. The values come from integer arithmetic
and one rounding, so they depend neither on the CPU's vector width nor on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..artifacts.errors import UsageError
from .safetensors_header import TensorInfo

STD = 0.02
_CHUNK = 1 << 18  # values made at once: small enough for the caches
_PAIR_STD = math.sqrt(2 * (65536**2 - 1) / 12)  # of the sum of two uniform 16-bit integers


class RandomCheckpoint:
    """A `Checkpoint` of random weights.

    Matrices have mean 0 and standard deviation 0.02 (triangular, the sum of two uniform numbers); so do vectors named
    `…bias`. Every other vector scales something (a norm's weight) and lies around 1.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        self.tensors: dict[str, TensorInfo] = {name: TensorInfo(tuple(s), dtype) for name, s in expected.items()}
        self.seed = seed

    def load(self, name: str) -> torch.Tensor:
        """The tensor `name`, a fresh copy. Raises UsageError if the model has no such weight."""
        if name not in self.tensors:
            raise UsageError(f"the model has no weight {name!r}", "it was not among the names expected", "")
        shape, dtype = self.tensors[name]
        flat = torch.empty(math.prod(shape), dtype=dtype)
        centre = 1.0 if len(shape) < 2 and not name.endswith("bias") else 0.0
        starts = range(0, len(flat), _CHUNK)

        def fill(start: int) -> None:
            part = flat[start : start + _CHUNK]
            part.copy_(torch.from_numpy(_values(f"{self.seed}/{name}/{start}", len(part)) + np.float32(centre)))

        if len(starts) <= 1:
            for start in starts:
                fill(start)
        else:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(fill, starts))
        return flat.view(shape)

    def digest(self) -> str:
        """Hex sha256 of what determines every value: seed, names, shapes and dtypes."""
        facts = {name: [list(info.shape), str(info.dtype)] for name, info in self.tensors.items()}
        return hashlib.sha256(json.dumps(["random", 1, self.seed, facts], sort_keys=True).encode()).hexdigest()


def _values(key: str, count: int) -> np.ndarray:
    """`count` float32 values of mean 0 and standard deviation STD, determined by `key`."""
    generator = np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    words = generator.random_raw((count + 1) // 2).astype("<u8", copy=False)  # four 16-bit numbers each
    halves = words.view("<i2")
    values = halves[:count].astype(np.float32)
    values += halves[len(halves) // 2 :][:count]
    values += np.float32(1)  # the mean of each half is -1/2
    values *= np.float32(STD / _PAIR_STD)
    return values
