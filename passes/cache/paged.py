"""Puts the KV cache in: attention over a sequence becomes attention over a paged cache."""

from __future__ import annotations

import torch
from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, add_input, aten, dtype_of, emit, is_call, operands, replace, shape_of, source_of
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
        calls.sort(key=_layer)
        layers = [_layer(n) for n in calls]
        if len(set(layers)) != len(layers):
            raise ValueError(f"two attentions share a layer index: {layers}")
        positions = next(n for n in graph.nodes if n.op == "placeholder" and n.target == "positions")
        tables = add_input(traced, "block_tables", (ctx.batch, ctx.max_blocks), torch.int32)
        anchor = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        with graph.inserting_before(anchor):
            slots = emit(graph, overload("cache_slots"), tables, positions, ctx.block_size)
        _hide_padding(graph, positions, slots)
        facts = []
        for index, node in enumerate(calls):
            q, k, v, _, scale, window, softcap, sinks = operands(node)
            caches = []
            for kind, x in (("k", k), ("v", v)):
                _, heads, _, dim = shape_of(x)
                shape = (ctx.num_blocks, ctx.block_size, heads, dim)
                caches.append(add_input(traced, f"{kind}_cache_{index}", shape, dtype_of(x)))
            source = source_of(node)
            with graph.inserting_before(node):
                for cache, x in zip(caches, (k, v)):
                    emit(graph, overload("cache_write"), cache, x, slots, None, source=source)
                where = (tables, positions, scale, window, softcap, sinks, None, None)
                new = emit(graph, overload("paged_attention"), q, *caches, *where, source=source)
            replace(node, new)
            facts.append({"key": list(shape_of(k)[1::2]), "value": list(shape_of(v)[1::2]), "window": window})
        outcome.facts["layers"] = facts
        return outcome


def _layer(attention: fx.Node) -> int:
    return int(operands(attention)[3])


def _hide_padding(graph: fx.Graph, positions: fx.Node, slots: fx.Node) -> None:
    """From here on positions may be -1 (padding); whatever looks something up by position sees 0 instead."""
    others = [user for user in positions.users if user is not slots]
    if others:
        with graph.inserting_before(min(others)):
            known = emit(graph, aten.clamp.default, positions, 0)
        for user in others:
            user.replace_input_with(positions, known)
