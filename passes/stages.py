"""What may stand in a graph at each stage of the pipeline; the manager checks it on every pass's result."""

from __future__ import annotations

import enum

import torch
from torch import fx

from .graph import TracedGraph, dtype_of, op_name, shape_of


class Stage(enum.IntEnum):
    """The stages in order; a pass needs one and leaves the same or a later one."""

    TRACED = 0
    CLEAN = 1
    FUSED = 2
    CACHED = 3
    QUANTIZED = 4
    PLANNED = 5


_OUT_ONCE_CLEAN = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten.alias", "aten.detach")
_OUT_ONCE_CACHED = ("ingot.attention",)
_ONLY_ONCE_CACHED = (
    "ingot.paged_attention", "ingot.cache_write", "ingot.cache_slots", "ingot.sample", "ingot.sample_with_logit",
    "ingot.attention_step", "ingot.fused_linear",
)  # fmt: skip


def violations(traced: TracedGraph, stage: Stage) -> list[str]:
    """Everything in the graph that does not belong into `stage`, each with what to do; empty when it holds."""
    found: list[str] = []
    for node in traced.graph.nodes:
        found += _node_violations(node, traced, stage)
    names = [n.target for n in traced.graph.nodes if n.op == "placeholder"]
    wanted = ["tokens", "positions"] + (["block_tables"] if stage >= Stage.CACHED else [])
    found += [f"input {name!r} is missing: a pass removed a placeholder" for name in wanted if name not in names]
    return found


def _node_violations(node: fx.Node, traced: TracedGraph, stage: Stage) -> list[str]:
    name = op_name(node) if node.op == "call_function" else node.op
    found = []
    if node.op in ("call_module", "call_method"):
        found.append(f"{node.format_node()}: only plain function calls belong into a graph")
    if node.op != "output" and "val" not in node.meta:
        found.append(f"{node.name} ({name}): node.meta['val'] is missing; insert nodes with passes.graph.emit")
    if node.op == "get_attr" and str(node.target) not in traced.weights.entries:
        found.append(f"{node.name}: weight {node.target!r} has no source; add it with passes.graph.add_weight")
    elif node.op == "get_attr" and "val" in node.meta:
        registered = getattr(traced.gm, str(node.target), None)
        if registered is None or (tuple(registered.shape), registered.dtype) != (shape_of(node), dtype_of(node)):
            found.append(f"{node.name}: weight {node.target!r} is not registered with the node's shape and dtype")
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        found.append(f"{node.name} ({name}): nothing random may stand in a graph")
    if stage >= Stage.CLEAN and name in _OUT_ONCE_CLEAN:
        found.append(f"{node.name} ({name}): clean-up must remove it")
    if stage >= Stage.CACHED and name in _OUT_ONCE_CACHED:
        found.append(f"{node.name} ({name}): attention without a cache after the cache was put in")
    if stage < Stage.CACHED and name in _ONLY_ONCE_CACHED:
        found.append(f"{node.name} ({name}): cached ops come with the cache pass")
    return found
