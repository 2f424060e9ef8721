"""The KV cache in 8 bits: int8 or fp8, each token and KV head by its own scale, so nothing has to be calibrated."""

from __future__ import annotations

import torch
from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, add_input, is_call, operands, shape_of
from ..stages import Stage

CACHE_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


class QuantizeKVCache:
    """Keys and values are kept in int8 or fp8 with a float32 scale for each token and KV head beside them."""

    name = "quantize-kv-cache"
    needs = Stage.CACHED
    leaves = Stage.CACHED
    exact = False

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Narrows the inputs k_cache_i and v_cache_i, adds k_scale_cache_i and v_scale_cache_i [blocks, block_size,
        kv_heads]; runs where the recipe says so."""
        outcome = Outcome()
        if ctx.kv_cache_dtype not in CACHE_DTYPES:
            return outcome
        scales: dict[fx.Node, fx.Node] = {}
        for node in [n for n in traced.graph.nodes if is_call(n, overload("cache_write"))]:
            cache, x, slots, scale = operands(node)
            if scale is not None:
                continue
            kind, _, index = str(cache.target).partition("_cache_")
            shape = shape_of(cache)
            cache.meta["val"] = torch.empty(shape, dtype=CACHE_DTYPES[ctx.kv_cache_dtype], device="meta")
            scales[cache] = add_input(traced, f"{kind}_scale_cache_{index}", shape[:3], torch.float32)
            node.args = (cache, x, slots, scales[cache])
            outcome.changed += 1
        for node in [n for n in traced.graph.nodes if is_call(n, overload("paged_attention"))]:
            *others, k_scale, v_scale = operands(node)
            k_cache, v_cache = others[1:3]
            node.args = (*others, scales.get(k_cache, k_scale), scales.get(v_cache, v_scale))
        return outcome
