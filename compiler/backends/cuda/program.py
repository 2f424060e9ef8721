"""From a planned graph to one that Inductor takes: plain ATen, and Ingot's ops with a CUDA kernel as opaque calls.

Ops without a kernel of their own are replaced by their meaning (runtime/ops), which Inductor fuses. Weights become
inputs, so that the engine names them and holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ....passes.graph import TracedGraph
from ....runtime.ops.schema import SEMANTICS

DEVICE = torch.device("cuda", 0)


@dataclass
class Program:
    """A flat graph on the (fake) device.

    Attributes:
        inputs: names of its inputs in order: the engine's, then the weights'.
        weights: which of them are weights. examples: fake tensors of the inputs.
    """

    gm: fx.GraphModule
    inputs: tuple[str, ...]
    weights: frozenset[str]
    examples: list[Tensor]
    mode: FakeTensorMode


class _Inline(fx.Interpreter):
    """Runs the graph with weights from a table and unserved ops by their meaning."""

    def __init__(self, gm: fx.GraphModule, served: frozenset[Any], weights: dict[str, Tensor]) -> None:
        super().__init__(gm)
        self._served, self._weights = served, weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._weights[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in SEMANTICS and target not in self._served:
            return SEMANTICS[target](*args, **kwargs)
        return target(*args, **kwargs)


def make_program(traced: TracedGraph, served: frozenset[Any]) -> Program:
    """Flatten a planned graph; `served` are the op overloads that stay calls."""
    from torch._inductor.decomposition import select_decomp_table

    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    used = dict.fromkeys(str(n.target) for n in traced.graph.nodes if n.op == "get_attr")
    names = (*(str(n.target) for n in placeholders), *used)
    values = [n.meta["val"] for n in placeholders] + [getattr(traced.gm, name) for name in used]
    count = len(placeholders)

    def run(*inputs: Tensor) -> Any:
        weights = dict(zip(used, inputs[count:]))
        return _Inline(traced.gm, served, weights).run(*inputs[:count])

    metas = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for v in values]
    with torch.no_grad():
        gm = make_fx(run, decomposition_table=select_decomp_table())(*metas)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        examples = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=DEVICE) for v in values]
    _move(gm, mode)
    return Program(gm, names, frozenset(used), examples, mode)


def _move(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Let a graph that was traced on meta say that it lives on the device."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)

    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
        node.meta.pop("tensor_meta", None)
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": DEVICE}
    gm.recompile()


@contextmanager
def swapped(owner: Any, name: str, value: Callable[..., Any] | Any) -> Iterator[None]:
    """An attribute of a library replaced for a while."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)
