"""Planned graphs served as engines without compiling them: the same protocol, run eagerly by PyTorch.

Bisection uses it to tell a pass's error from the back end's, tests to exercise runtime and passes together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..artifacts.manifest import EngineEntry
from ..passes.graph import TracedGraph
from ..passes.weights import Load
from ..runtime.engines.base import logits_of
from .backends.aoti import input_buffers, output_buffers
from .evaluate import Evaluator


class EagerEngine:
    """One graph; see `ingot.runtime.engines.base.Engine`."""

    def __init__(self, entry: EngineEntry, evaluator: Evaluator) -> None:
        self.entry, self.asynchronous = entry, False
        self._evaluator = evaluator
        self._inputs = {b.name: np.zeros(b.shape, b.dtype) for b in entry.inputs if "_cache_" not in b.name}
        self._tensors = {name: torch.from_numpy(array) for name, array in self._inputs.items()}
        self._tokens = np.zeros(entry.batch, np.int64)
        self._logits = np.zeros(entry.outputs[1].shape, np.float32)

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """See `Engine.inputs`."""
        return self._inputs

    def run(self) -> None:
        """See `Engine.run`."""
        with torch.no_grad():
            tokens, logits, *_ = self._evaluator.run(self._tensors)
        self._tokens, self._logits = tokens.numpy(), logits.numpy()

    def advance(self) -> None:
        """See `Engine.advance`."""
        self._inputs["tokens"][:, 0] = self._tokens
        positions = self._inputs["positions"]
        np.add(positions, 1, out=positions, where=positions >= 0)
        self.run()

    def next_tokens(self) -> np.ndarray:
        """See `Engine.next_tokens`."""
        return self._tokens

    def sampled_logits(self) -> np.ndarray:
        """See `Engine.sampled_logits`."""
        return logits_of(self._logits, self._tokens)

    def logits(self) -> np.ndarray:
        """See `Engine.logits`."""
        return self._logits


class EagerGroup:
    """Graphs of one plan by engine name, sharing one cache; see `EngineGroup`."""

    def __init__(self, graphs: Mapping[str, TracedGraph], load: Load) -> None:
        self._engines: dict[str, EagerEngine] = {}
        self.num_blocks = 0
        first: Evaluator | None = None
        for name, traced in graphs.items():
            evaluator = Evaluator(traced, load)
            if first is None:
                first = evaluator
            else:
                evaluator.share_cache(first)
            inputs, outputs = input_buffers(traced), output_buffers(traced)
            batch, length = next(b.shape for b in inputs if b.name == "tokens")
            self.num_blocks = next(b.shape[0] for b in inputs if "_cache_" in b.name)
            phase = "decode" if name.startswith("decode") else "prefill"
            entry = EngineEntry(name, "aoti", phase, batch, length, "", inputs, outputs, (), (), 0)
            self._engines[name] = EagerEngine(entry, evaluator)

    @property
    def engines(self) -> Mapping[str, EagerEngine]:
        """Engines by name."""
        return self._engines

    def close(self) -> None:
        """Drop the graphs and their weights."""
        self._engines = {}
