"""The protocol every kind of engine serves: numpy at its edge, device state kept to itself.

An `EngineGroup` holds all engines of one artifact on one device: they share one set of weights and one paged KV
cache. The runner writes an engine's input buffers, calls `run`, and reads the sampled tokens behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ...artifacts.manifest import EngineEntry


def logits_of(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The logit of each row's token, [batch]; NaN where the token is outside of the vocabulary."""
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    picked = logits[np.arange(len(tokens)), np.where(inside, tokens, 0)]
    return np.where(inside, picked, np.float32(np.nan))


class Engine(Protocol):
    """One compiled graph for one fixed shape: `batch` rows of `length` tokens."""

    @property
    def entry(self) -> EngineEntry:
        """What the manifest says of this engine: name, phase, batch, length."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether `run` and `advance` return while the device still works; such an engine is an `AsyncEngine`."""
        ...

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """Host buffers to write before `run`; they keep their values and their addresses between runs.

        After `advance`, tokens and positions may be stale: write both before the next `run`.

        tokens [batch, length] int64; positions [batch, length] int64, -1 where there is no token (padding);
        block_tables [batch, max_blocks] int32, 0 is the null block that no sequence owns;
        temperature, top_p, min_p [batch] float32; top_k [batch] int32 (0 keeps all); seeds [batch] int64;
        for prefill also last_index [batch] int64, the column whose logits are wanted.
        """
        ...

    def run(self) -> None:
        """Run once on the present inputs: writes the KV cache in place and samples one token per row."""
        ...

    def advance(self) -> None:
        """Decode only: take each row's sampled token as its next input, move active rows one position on, and run."""
        ...

    def next_tokens(self) -> np.ndarray:
        """The sampled tokens of the last run, [batch] int64; waits for the device. Valid until the next run."""
        ...

    def sampled_logits(self) -> np.ndarray:
        """The logit of each sampled token, [batch] float32; waits for the device. Valid until the next run."""
        ...

    def logits(self) -> np.ndarray:
        """The logits of the last run, [batch, vocabulary] float32; waits for the device. Valid until the next run."""
        ...


class AsyncEngine(Engine, Protocol):
    """An engine whose next step can be given to the device before the results of the last one are read."""

    def earlier(self) -> tuple[np.ndarray, np.ndarray]:
        """Next tokens and their logits of the run before the last, as `next_tokens` and `sampled_logits`."""
        ...


class EngineGroup(Protocol):
    """All engines of one artifact on one device."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Engines by name."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache, the null block among them: what was compiled, or what the device has room for."""
        ...

    def close(self) -> None:
        """Give weights, cache and engines back. Calling it twice is harmless."""
        ...
