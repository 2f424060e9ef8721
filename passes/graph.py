"""The graph that flows through the passes, and small helpers to read and edit it.

Node values are plain tensors on `meta`, so every pass knows shapes and dtypes, and a new node's are computed by
running its op on `meta`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .weights import Expression, Weights

aten = torch.ops.aten


@dataclass
class TracedGraph:
    """One engine's graph and where its weights come from."""

    gm: fx.GraphModule
    weights: Weights

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.gm.graph


def meta_like(value: Tensor) -> Tensor:
    """A tensor on `meta` with the same shape, strides and dtype."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def value_of(argument: Any) -> Any:
    """The `meta` value of a node, or the argument itself when it is no node."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def operands(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments. (fx types them as a union of everything; a pass knows its op's schema.)"""
    return node.args


def shape_of(node: Any) -> tuple[int, ...]:
    """A node's shape."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: Any) -> torch.dtype:
    """A node's dtype."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def source_of(node: fx.Node) -> str:
    """Where in the Hugging Face module a node came from, "" if unknown."""
    return str(node.meta.get("source", ""))


def replace(node: fx.Node, new: fx.Node) -> None:
    """Put `new` in the place of `node` and take `node` out of the graph."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def is_weight(argument: Any) -> bool:
    """Whether the argument is a weight, not a computed value."""
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def emit(graph: fx.Graph, target: Any, *args: Any, source: str = "", **kwargs: Any) -> fx.Node:
    """Insert a call at the graph's insertion point and compute its value on `meta`."""
    node = graph.call_function(target, args, kwargs)
    with torch.no_grad():
        value = target(*fx.node.map_arg(args, value_of), **fx.node.map_arg(kwargs, value_of))
    node.meta = {
        "val": fx.node.map_aggregate(value, lambda v: meta_like(v) if isinstance(v, Tensor) else v),
        "source": source,
    }
    return node


def add_weight(
    traced: TracedGraph, attribute: str, expression: Expression, shape: Sequence[int], dtype: torch.dtype
) -> fx.Node:
    """A get_attr node for a new weight at the insertion point; the same name gives the same weight again.

    Raises:
        ValueError: the name is taken by a weight of another value or shape.
    """
    known = traced.weights.entries.get(attribute)
    if known is not None and (known != expression or tuple(getattr(traced.gm, attribute).shape) != tuple(shape)):
        raise ValueError(f"weight {attribute!r} exists and means something else")
    if known is None:
        traced.weights.entries[attribute] = expression
        traced.gm.register_buffer(attribute, torch.empty(tuple(shape), dtype=dtype, device="meta"))
    node = traced.graph.get_attr(attribute)
    node.meta = {"val": meta_like(getattr(traced.gm, attribute)), "source": ""}
    return node


def add_input(traced: TracedGraph, name: str, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
    """A new graph input behind the present ones."""
    last = [n for n in traced.graph.nodes if n.op == "placeholder"][-1]
    with traced.graph.inserting_after(last):
        node = traced.graph.placeholder(name)
    node.meta = {"val": torch.empty(tuple(shape), dtype=dtype, device="meta"), "source": ""}
    return node


def is_call(argument: Any, *targets: Any) -> bool:
    """Whether the argument is a node that calls one of the targets."""
    return isinstance(argument, fx.Node) and argument.op == "call_function" and argument.target in targets


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def copy_graph(traced: TracedGraph) -> TracedGraph:
    """A copy that passes may rewrite while the original stays; values, which no pass writes to, are shared."""
    graph, root = fx.Graph(), nn.Module()
    graph.output(graph.graph_copy(traced.graph, {}))
    for name, value in traced.gm.named_buffers():
        root.register_buffer(name, value)
    return TracedGraph(fx.GraphModule(root, graph), Weights(dict(traced.weights.entries)))


def drop_unused_weights(traced: TracedGraph) -> None:
    """Forget weights that no node reads any more."""
    used = {n.target for n in traced.graph.nodes if n.op == "get_attr"}
    for attribute in [a for a in traced.weights.entries if a not in used]:
        del traced.weights.entries[attribute]
        if hasattr(traced.gm, attribute):
            delattr(traced.gm, attribute)


def op_name(node: fx.Node) -> str:
    """Short name of a node's op for reports: `aten.linear`, `ingot.attention`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return getattr(target, "__name__", str(target)) if target is not operator.getitem else "getitem"
