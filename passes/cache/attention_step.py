"""On the GPU all of a decode step's attention is one kernel: norms of q and k, RoPE, cache write, paged attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, dtype_of, emit, is_call, is_weight, operands, replace, shape_of, source_of
from ..stages import Stage


@dataclass(frozen=True)
class _Norm:
    """An RMSNorm over each head: its weight and options."""

    weight: fx.Node
    options: tuple[float, float, bool]


# A node, or a node and the two dimensions that change places on the way out of it.
_Value = fx.Node | tuple[fx.Node, tuple[int, ...]]


class FuseAttentionStep:
    """For CUDA decode: what a layer does between its projections becomes one op that writes and reads the cache."""

    name = "fuse-attention-step"
    needs = Stage.CACHED
    leaves = Stage.CACHED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Match from each paged attention of length 1 and the two cache writes before it."""
        outcome = Outcome()
        if ctx.device != "cuda" or ctx.phase != "decode":
            return outcome
        writes = {operands(n)[0]: n for n in traced.graph.nodes if is_call(n, overload("cache_write"))}
        for node in [n for n in traced.graph.nodes if is_call(n, overload("paged_attention"))]:
            q, k_cache, v_cache, tables, positions, scale, window, softcap, sinks, *kv_scales = operands(node)
            if k_cache not in writes or v_cache not in writes:
                outcome.miss(node.name, "its keys and values are written elsewhere")
                continue
            k, v = operands(writes[k_cache])[1], operands(writes[v_cache])[1]
            q, k, cos, sin = _without_rope(q, k, ctx.batch)
            cos, sin = _tables(cos, sin, positions)
            q, k, q_norm, k_norm = _without_norms(q, k)
            options = (q_norm or k_norm or _Norm(node, (0.0, 0.0, False))).options
            with traced.graph.inserting_before(node):
                q, k = (_materialized(traced, x) for x in (q, k))
                new = emit(
                    traced.graph, overload("attention_step"), q, k, v, k_cache, v_cache, tables, positions, cos, sin,
                    q_norm.weight if q_norm else None, k_norm.weight if k_norm else None, sinks, *options, scale,
                    window, softcap, *kv_scales, source=source_of(node),
                )  # fmt: skip
            replace(node, new)
            for cache in (k_cache, v_cache):
                traced.graph.erase_node(writes[cache])
            outcome.changed += 1
        return outcome


def _materialized(traced: TracedGraph, x: _Value) -> fx.Node:
    """A value found behind transposes of norms, as a node: (source, dims) pairs are emitted here."""
    if isinstance(x, fx.Node):
        return x
    inner, dims = x
    return emit(traced.graph, aten.transpose.int, inner, *dims, source=source_of(inner))


def _without_rope(q: fx.Node, k: fx.Node, batch: int) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]:
    """q and k before their rotation and its tables, if both are turned by the same."""
    if is_call(q, overload("rotate_half")) and is_call(k, overload("rotate_half")):
        (q0, cos, sin), (k0, k_cos, k_sin) = operands(q), operands(k)
        dim = shape_of(q0)[3]
        if cos is k_cos and sin is k_sin and shape_of(cos) == shape_of(sin) == (batch, 1, 1, dim) == (
            batch, 1, 1, shape_of(k0)[3],
        ) and dtype_of(cos) == dtype_of(q0):  # fmt: skip
            return q0, k0, cos, sin
    return q, k, None, None


def _tables(cos: fx.Node | None, sin: fx.Node | None, positions: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The stored tables that both are looked up in by position, or cos and sin themselves: the op looks up as well."""
    tables = [_table(x, positions) for x in (cos, sin)]
    if tables[0] is None or tables[1] is None or shape_of(tables[0]) != shape_of(tables[1]):
        return cos, sin
    return tables[0], tables[1]


def _table(rows: fx.Node | None, positions: fx.Node) -> fx.Node | None:
    """The table behind `reshape(table[max(positions, 0)])`, if its rows are those of [batch, 1, 1, dim]."""
    if not is_call(rows, aten.reshape.default):
        return None
    lookup = operands(rows)[0]  # type: ignore[arg-type]
    if not is_call(lookup, aten.embedding.default):
        return None
    table, known, *_ = operands(lookup)
    by_position = is_call(known, aten.clamp.default) and operands(known) == (positions, 0) and not known.kwargs
    fits = is_weight(table) and shape_of(table)[1:] == shape_of(rows)[3:] and dtype_of(table) == dtype_of(rows)
    return table if by_position and fits else None


def _without_norms(q: fx.Node, k: fx.Node) -> tuple[_Value, _Value, _Norm | None, _Norm | None]:
    """q and k before an RMSNorm over each head, if both have one with the same options."""
    found = [_norm_behind(x) for x in (q, k)]
    if any(f is None for f in found):
        return q, k, None, None
    (q0, q_norm), (k0, k_norm) = found  # type: ignore[misc]
    if q_norm.options != k_norm.options:
        return q, k, None, None
    return q0, k0, q_norm, k_norm


def _norm_behind(x: fx.Node) -> tuple[_Value, _Norm] | None:
    """rms_norm(y), or its transpose that leaves the last dimension alone: what to read instead, and the norm."""
    dims: tuple[int, ...] | None = None
    inner = x
    if is_call(x, aten.transpose.int):
        inner, *pair = operands(x)
        dims = tuple(d % 4 for d in pair)
        if 3 in dims:
            return None
    if not is_call(inner, overload("rms_norm")):
        return None
    y, weight, eps, offset, narrow_first = operands(inner)
    if not is_weight(weight) or dtype_of(weight) != dtype_of(y):
        return None
    return (y if dims is None else (y, dims)), _Norm(weight, (eps, offset, narrow_first))
