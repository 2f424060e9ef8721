"""Joins the residual add with the norm that reads it: the residual stream is then read once and written once.

Runs after `fuse-rms-norm`. The op returns both the sum, which goes on as the residual stream, and its norm; the sum is
rounded to the stream's dtype before it is normed, as the model does.
"""

from __future__ import annotations

import operator

from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, dtype_of, emit, is_call, is_weight, operands, replace, shape_of, source_of
from ..stages import Stage


class FuseAddNorm:
    """x + residual and the RMSNorm or LayerNorm of the sum become one op with two results."""

    name = "fuse-add-norm"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Match from the norm; a sum is taken by the first norm that reads it."""
        outcome = Outcome()
        norms = (overload("rms_norm"), aten.layer_norm.default)
        taken: dict[fx.Node, str] = {}
        for norm in [n for n in traced.graph.nodes if is_call(n, *norms)]:
            total = operands(norm)[0]
            if total in taken:
                outcome.miss(norm.name, f"{taken[total]} of the same sum was taken")
                continue
            if not is_call(total, aten.add.Tensor):
                continue
            if reason := _unfit(total, norm):
                outcome.miss(norm.name, reason)
                continue
            taken[_fuse(traced, total, norm)] = norm.name
            outcome.changed += 1
        return outcome


def _unfit(total: fx.Node, norm: fx.Node) -> str:
    """Why add and norm stay apart, or ""."""
    x, residual = operands(total)[:2]
    if total.kwargs or norm.kwargs:
        return "the sum is scaled" if total.kwargs else "the norm has options the op lacks"
    if not isinstance(residual, fx.Node) or not isinstance(x, fx.Node):
        return "a number is added, not a residual"
    if shape_of(x) != shape_of(residual):
        return "what is added differs in shape"
    if {dtype_of(x), dtype_of(residual)} != {dtype_of(total)}:
        return "what is added differs in dtype"
    if len(total.users) < 2:
        return "the sum is used nowhere else: it is no residual stream"
    if any(n is not None and not is_weight(n) for n in _parameters(norm)):
        return "the norm's weight is computed, not stored"
    if norm.target is aten.layer_norm.default and len(operands(norm)[1]) != 1:
        return "it norms over more than the last dimension"
    return ""


def _parameters(norm: fx.Node) -> list[fx.Node | None]:
    args = operands(norm)
    if norm.target is overload("rms_norm"):
        return [args[1]]
    weight, bias = (*args[2:4], None, None)[:2]
    return [weight, bias]


def _fuse(traced: TracedGraph, total: fx.Node, norm: fx.Node) -> fx.Node:
    """Put the op in the place of the sum; returns the node that is the sum now."""
    x, residual = operands(total)[:2]
    args = operands(norm)
    for weight in _parameters(norm):
        # The op stands where the sum stood, and what it reads must stand before it; a weight itself reads nothing.
        if weight is not None and weight > total:
            total.prepend(weight)
    with traced.graph.inserting_before(total):
        if norm.target is overload("rms_norm"):
            both = emit(traced.graph, overload("add_rms_norm"), x, residual, *args[1:], source=source_of(norm))
        else:
            weight, bias = _parameters(norm)
            eps = args[4] if len(args) > 4 else 1e-5
            both = emit(
                traced.graph, overload("add_layer_norm"), x, residual, weight, bias, eps, source=source_of(norm)
            )
        new_total = emit(traced.graph, operator.getitem, both, 0, source=source_of(total))
        normed = emit(traced.graph, operator.getitem, both, 1, source=source_of(norm))
    replace(norm, normed)
    replace(total, new_total)
    return new_total
