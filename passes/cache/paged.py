"""Puts the KV cache in: attention over a sequence becomes attention over a paged cache."""

from __future__ import annotations

import torch
from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, emit, is_call, shape_of
from ..stages import Stage


class InsertKVCache:
    """Each attention writes its keys and values into a paged cache and reads all that came before from there."""

    name = "insert-kv-cache"
    needs = Stage.FUSED
    leaves = Stage.CACHED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Adds the inputs block_tables and k_cache_i, v_cache_i [blocks, block_size, kv_heads, dim] per layer."""
        graph = traced.graph
        calls = [n for n in graph.nodes if is_call(n, overload("attention"))]
        outcome = Outcome(changed=len(calls))
        if not calls:
            return outcome
        layers = [n.args[3] for n in calls]
        if len(set(layers)) != len(layers):
            raise ValueError(f"two attentions share a layer index: {sorted(layers)}")
        positions = next(n for n in graph.nodes if n.op == "placeholder" and n.target == "positions")
        tables = _placeholder(graph, "block_tables", (ctx.batch, ctx.max_blocks), torch.int32)
        anchor = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        with graph.inserting_before(anchor):
            slots = emit(graph, overload("cache_slots"), tables, positions, ctx.block_size)
        _hide_padding(graph, positions, slots)
        facts = []
        for index, node in enumerate(sorted(calls, key=lambda n: n.args[3])):
            q, k, v, _, scale, window, softcap, sinks = node.args
            caches = []
            for kind, x in (("k", k), ("v", v)):
                _, heads, _, dim = shape_of(x)
                shape = (ctx.num_blocks, ctx.block_size, heads, dim)
                caches.append(_placeholder(graph, f"{kind}_cache_{index}", shape, x.meta["val"].dtype))
            with graph.inserting_before(node):
                source = node.meta.get("source", "")
                for cache, x in zip(caches, (k, v)):
                    emit(graph, overload("cache_write"), cache, x, slots, source=source)
                new = emit(
                    graph,
                    overload("paged_attention"),
                    q,
                    *caches,
                    tables,
                    positions,
                    scale,
                    window,
                    softcap,
                    sinks,
                    source=source,
                )
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            facts.append({"key": list(shape_of(k)[1::2]), "value": list(shape_of(v)[1::2]), "window": window})
        outcome.facts["layers"] = facts
        return outcome


def _hide_padding(graph: fx.Graph, positions: fx.Node, slots: fx.Node) -> None:
    """From here on positions may be -1 (padding); whatever looks something up by position sees 0 instead."""
    others = [user for user in positions.users if user is not slots]
    if others:
        first = min(others, key=list(graph.nodes).index)
        with graph.inserting_before(first):
            known = emit(graph, aten.clamp.default, positions, 0)
        for user in others:
            user.replace_input_with(positions, known)


def _placeholder(graph: fx.Graph, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta = {"val": torch.empty(shape, dtype=dtype, device="meta"), "source": ""}
    return node
