"""Runs a graph eagerly, at any stage of the pipeline, with real weights: the oracle of tests and of bisection.

Values are bound to placeholders by name, so the same call works before and after passes that add inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..passes.graph import TracedGraph
from ..passes.weights import Load
from ..runtime.ops import schema as _schema  # noqa: F401 - registers the ops the graph calls


class Evaluator:
    """A graph with its weights in memory and, once it has a cache, the cache.

    Args:
        traced: the graph; `load` gives stored weights by name.
    """

    def __init__(self, traced: TracedGraph, load: Load) -> None:
        self.traced, self.load = traced, load
        self.weights = {name: traced.weights.evaluate(name, load) for name in traced.weights.entries}
        self.caches: dict[str, Tensor] = {}

    def share_cache(self, other: Evaluator) -> None:
        """Use another engine's cache (prefill writes, decode reads)."""
        self.caches = other.caches

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The graph's output for the inputs it names; caches start as zeros and are kept between runs."""
        env: dict[torch.fx.Node, Any] = {}
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                name = str(node.target)
                if name in inputs:
                    env[node] = inputs[name]
                else:
                    value = node.meta["val"]
                    env[node] = self.caches.setdefault(name, torch.zeros(value.shape, dtype=value.dtype))
            elif node.op == "get_attr":
                env[node] = self.weights[str(node.target)]
            elif node.op == "call_function":
                args = torch.fx.node.map_arg(node.args, env.__getitem__)
                kwargs = torch.fx.node.map_arg(node.kwargs, env.__getitem__)
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": torch.device("cpu")}
                env[node] = self.call(node, *args, **kwargs)
            else:
                return torch.fx.node.map_arg(node.args[0], env.__getitem__)
        raise ValueError("the graph has no output")

    def call(self, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
        """The value of a call; for those who want to look on."""
        target: Any = node.target
        return target(*args, **kwargs)


def step_inputs(
    tokens: Sequence[Sequence[int]], starts: Sequence[int], length: int, max_blocks: int, block_size: int
) -> dict[str, Tensor]:
    """Inputs of one step: row r holds `tokens[r]` at positions from `starts[r]` on, padded to `length`, greedy.

    Row r owns the blocks r * max_blocks + 1 and following.
    """
    batch = len(tokens)
    ids = torch.zeros(batch, length, dtype=torch.int64)
    positions = torch.full((batch, length), -1, dtype=torch.int64)
    tables = torch.zeros(batch, max_blocks, dtype=torch.int32)
    for row, (piece, start) in enumerate(zip(tokens, starts)):
        ids[row, : len(piece)] = torch.tensor(piece)
        positions[row, : len(piece)] = torch.arange(start, start + len(piece))
        if piece:
            tables[row] = torch.arange(max_blocks, dtype=torch.int32) + 1 + row * max_blocks
    return {
        "tokens": ids,
        "positions": positions,
        "last_index": torch.tensor([max(len(p) - 1, 0) for p in tokens]),
        "block_tables": tables,
        "temperature": torch.zeros(batch),
        "top_k": torch.zeros(batch, dtype=torch.int32),
        "top_p": torch.ones(batch),
        "min_p": torch.zeros(batch),
        "seeds": torch.zeros(batch, dtype=torch.int64),
    }
