"""The heavy half of a build: torch, transformers and the graphs. Made only when some stage is not in the cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..passes.base import GraphPass
from ..passes.graph import TracedGraph
from ..passes.instruments import ir_text
from .backends.aoti import input_buffers, output_buffers
from .facts import EngineFacts, WeightFacts
from .model_weights import ModelWeights, open_weights
from .pipelines import PIPELINE
from .plan import Plan, Tracer
from .recipe import Recipe
from .weights_file import Spec, write_weights


class Workshop:
    """Graphs and weights of one recipe, each made when it is first asked for. Arguments: see `Tracer`."""

    def __init__(
        self, recipe: Recipe, source: Path, dump_ir: Path | None = None, passes: Sequence[GraphPass] | None = None
    ) -> None:
        self.recipe = recipe
        self.passes = PIPELINE if passes is None else passes
        self._shapes = {shape.name: shape for shape in recipe.engines()}
        self._make = functools.partial(Tracer, recipe, source, dump_ir, self.passes)

    @functools.cached_property
    def tracer(self) -> Tracer:
        """Traces engines; making it builds the model's module."""
        return self._make()

    @functools.cached_property
    def weights(self) -> ModelWeights:
        """The checkpoint, found to fit the model."""
        plan = self.tracer.plan
        return open_weights(
            self.tracer.model, plan.folder, self.recipe.model.dtype, self.recipe.model.seed, plan.foreign
        )

    def plan(self, names: Sequence[str] | None = None) -> Plan:
        """The plan with these engines' graphs in it, or with all."""
        for name in self._shapes if names is None else names:
            self.tracer.add(self._shapes[name])
        return self.tracer.plan

    def facts(self, name: str) -> EngineFacts:
        """What is known of one engine after the passes."""
        plan = self.plan([name])
        traced = plan.graphs[name]
        weights = {
            key: WeightFacts(tuple(held.shape), _plain(held.dtype), describe(expression))
            for key, expression in traced.weights.entries.items()
            for held in [getattr(traced.gm, key)]
        }
        # What the checkpoint holds is in the weights' expressions already.
        context = dataclasses.replace(plan.contexts[name], held={}, made_dense={})
        records = [dataclasses.asdict(record) for record in plan.records[name]]
        return EngineFacts(
            graph_digest(traced), input_buffers(traced), output_buffers(traced), weights,
            dataclasses.asdict(context), json.loads(json.dumps(records)), plan.config,
        )  # fmt: skip

    def write_weights(self, folder: Path) -> list[str]:
        """One file set for all engines: a name must mean the same weight in each of them. Returns the files' names."""
        specs: dict[str, Spec] = {}
        owners: dict[str, TracedGraph] = {}
        for graph in self.plan().graphs.values():
            for name, expression in graph.weights.entries.items():
                held = getattr(graph.gm, name)
                if name in owners and owners[name].weights.entries[name] != expression:
                    raise ValueError(f"two engines mean different things by weight {name}")
                specs[name] = Spec(tuple(held.shape), held.dtype)
                owners[name] = graph
        return write_weights(folder, specs, lambda name: owners[name].weights.evaluate(name, self.weights.load))


def graph_digest(traced: TracedGraph) -> str:
    """Digest of a graph's printed code and of all its values' shapes, strides and dtypes.

    "" if it calls anything but registered ops and Python's operators: a name says nothing of other functions.
    """
    for node in traced.graph.nodes:
        registered = isinstance(node.target, torch._ops.OpOverload)
        if node.op == "call_function" and not registered and getattr(node.target, "__module__", "") != "_operator":
            return ""
    strides = [
        f"# {node.name}: {tuple(value.stride())}"
        for node in traced.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor)
    ]
    return hashlib.sha256("\n".join([ir_text(traced), *strides]).encode()).hexdigest()


def describe(value: Any) -> str:
    """An expression over weights in words that two builds share: its class and fields all the way down.

    "" if it holds anything whose value a name does not tell.
    """
    try:
        return _describe(value)
    except TypeError:
        return ""


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor({_plain(value.dtype)}, {list(value.shape)}, {hashlib.sha256(data).hexdigest()})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ", ".join(f"{f.name}={_describe(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({fields})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_describe, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_describe(k)}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, functools.partial):
        return f"partial({_describe(value.func)}, {_describe(value.args)}, {_describe(value.keywords)})"
    if value is None or isinstance(value, str | int | float | bool | torch.dtype):
        return repr(value)
    if isinstance(value, FunctionType | type) and "<" not in value.__qualname__:  # no closure, no bound object
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"a {type(value).__name__} has no description")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
