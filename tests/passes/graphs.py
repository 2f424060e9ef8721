"""Small graphs written by hand, their text, and their results: what the tests of single passes are made of.

b = Builder()
x = b.input("x", 2, 1, 8)
b.call(aten.mul.Tensor, x, b.weight("w", 8))
traced = b.done(…)
assert text(traced) == "%0 = aten.mul(x, w)\\nreturn %0"
"""

from __future__ import annotations

import hashlib
import operator
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from ingot.compiler.evaluate import Evaluator
from ingot.passes.base import Context, GraphPass, Outcome
from ingot.passes.graph import TracedGraph, copy_graph, emit, op_name
from ingot.passes.instruments import Recorder
from ingot.passes.manager import run_passes
from ingot.passes.stages import Stage
from ingot.passes.weights import Constant, Stored, Weights
from torch import Tensor, fx, nn

aten = torch.ops.aten
F32, BF16 = torch.float32, torch.bfloat16
DECODE = Context("decode", 2, 1, max_length=32, block_size=4, num_blocks=17, max_blocks=8)
PREFILL = Context("prefill", 1, 8, max_length=32, block_size=4, num_blocks=17, max_blocks=8)


class Builder:
    """Writes one graph op by op; every graph has the inputs tokens and positions [batch, length]."""

    def __init__(self, batch: int = 2, length: int = 1) -> None:
        self.traced = TracedGraph(fx.GraphModule(nn.Module(), fx.Graph()), Weights())
        self.graph = self.traced.graph
        self.tokens = self.input("tokens", batch, length, dtype=torch.int64)
        self.positions = self.input("positions", batch, length, dtype=torch.int64)

    def input(self, name: str, *shape: int, dtype: torch.dtype = F32) -> fx.Node:
        """A graph input."""
        node = self.graph.placeholder(name)
        node.meta = {"val": torch.empty(shape, dtype=dtype, device="meta"), "source": ""}
        return node

    def weight(self, name: str, *shape: int, dtype: torch.dtype = F32) -> fx.Node:
        """A stored weight; its value comes from `load`."""
        return self._attribute(name, Stored(name, shape, dtype), torch.empty(shape, dtype=dtype, device="meta"))

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A weight that is known at build."""
        return self._attribute(name, Constant(value), value.to("meta"))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A call; its value on meta is computed."""
        return emit(self.graph, target, *args, **kwargs)

    def part(self, node: fx.Node, index: int) -> fx.Node:
        """One of the results of an op that has several."""
        return emit(self.graph, operator.getitem, node, index)

    def done(self, *outputs: fx.Node) -> TracedGraph:
        """The graph with these outputs."""
        self.graph.output(outputs[0] if len(outputs) == 1 else outputs)
        self.traced.gm.recompile()
        return self.traced

    def _attribute(self, name: str, expression: Any, value: Tensor) -> fx.Node:
        if name not in self.traced.weights.entries:
            self.traced.weights.entries[name] = expression
            self.traced.gm.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta = {"val": value, "source": ""}
        return node


def text(traced: TracedGraph) -> str:
    """The graph's calls, one a line: inputs and weights by name, results by number."""
    names: dict[fx.Node, str] = {}
    lines = []

    def written(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(written, value)) + "]"
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)

    for node in traced.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = str(node.target)
        elif node.op == "output":
            lines.append(f"return {written(node.args[0])}")
        else:
            names[node] = f"%{sum(name.startswith('%') for name in names.values())}"
            arguments = [*map(written, node.args), *(f"{k}={written(v)}" for k, v in node.kwargs.items())]
            lines.append(f"{names[node]} = {op_name(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def lines(block: str) -> str:
    """A triple-quoted text without its indentation and outer line breaks."""
    return textwrap.dedent(block).strip()


def apply(graph_pass: GraphPass, traced: TracedGraph, ctx: Context = DECODE) -> tuple[TracedGraph, Outcome]:
    """A copy of the graph after the pass, run as a build would run it, and what the pass says it did."""
    after, recorder = copy_graph(traced), Recorder()
    run_passes(after, [graph_pass], ctx, [recorder], graph_pass.needs)
    record = recorder.records[0]
    outcome = Outcome(record.changed, facts=record.facts)
    for miss in record.missed:
        outcome.miss(miss["site"], miss["reason"])
    return after, outcome


def reasons(outcome: Outcome) -> list[str]:
    """Why near misses were left."""
    return [miss.reason for miss in outcome.missed]


def untouched(graph_pass: GraphPass, traced: TracedGraph, ctx: Context = DECODE) -> list[str]:
    """The reasons of a pass that must leave this graph exactly as it is."""
    after, outcome = apply(graph_pass, traced, ctx)
    assert outcome.changed == 0
    assert text(after) == text(traced)
    return reasons(outcome)


def load(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Any:
    """Random tensors by name, the same every time."""

    def by_name(name: str) -> Tensor:
        shape, dtype = shapes[name]
        return random(name, *shape, dtype=dtype)

    return by_name


def random(name: str, *shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Normal values that depend on the name and the seed."""
    digest = hashlib.sha256(f"{name}/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
    return torch.randn(shape, generator=generator).to(dtype)


def values(traced: TracedGraph, seed: Any = 0, **inputs: Any) -> list[Tensor]:
    """The graph's outputs on random weights and, where none are given, random inputs (tokens and positions from 0)."""
    known = {
        entry.name: (entry.shape, entry.dtype)
        for name in traced.weights.entries
        for entry in _stored(traced.weights.entries[name])
    }
    given = {}
    for node in traced.graph.nodes:
        if node.op != "placeholder" or "_cache_" in node.target:
            continue
        value = node.meta["val"]
        if node.target in inputs:
            given[node.target] = inputs[node.target]
        elif value.dtype.is_floating_point:
            given[node.target] = random(node.target, *value.shape, dtype=value.dtype, seed=seed)
        else:
            rows = torch.arange(value.numel() // value.shape[0], dtype=value.dtype)
            given[node.target] = rows.expand(value.shape).clone()
    with torch.no_grad():
        out = Evaluator(traced, load(known)).run(given)
    return list(out) if isinstance(out, list | tuple) else [out]


def _stored(expression: Any) -> list[Stored]:
    """The checkpoint's tensors behind a weight."""
    if isinstance(expression, Stored):
        return [expression]
    parts = getattr(expression, "parts", (expression.part,) if hasattr(expression, "part") else ())
    return [leaf for part in parts for leaf in _stored(part)]


def same_bits(before: TracedGraph, after: TracedGraph, **inputs: Tensor) -> None:
    """Both graphs give the same bits on several random weights and inputs."""
    for seed in range(3):
        for a, b in zip(values(before, seed, **inputs), values(after, seed, **inputs), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a, b), (a.float() - b.float()).abs().max()


def nearly_same(before: TracedGraph, after: TracedGraph, tolerance: float = 1e-6, **inputs: Tensor) -> None:
    """Both graphs give the same up to `tolerance` of the largest value."""
    for seed in range(3):
        for a, b in zip(values(before, seed, **inputs), values(after, seed, **inputs), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a - b).abs().max() <= tolerance * a.abs().max()


__all__ = [
    "BF16", "DECODE", "F32", "PREFILL", "Builder", "Stage", "apply", "aten", "lines", "load", "nearly_same", "random",
    "reasons", "same_bits", "text", "untouched", "values",
]  # fmt: skip
