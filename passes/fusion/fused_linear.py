"""On the GPU a linear layer takes in the norm before it and what follows it: each of them would be a launch of its own.

Runs behind quantization, on dense and quantized products alike. The residual stream's add moves into the product that
feeds it, its norm into the products that read it, so a decoder layer becomes few and large kernels.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from ...runtime.ops.cuda.linear_problem import DECODE_ROWS
from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, dtype_of, emit, is_call, is_weight, operands, replace, shape_of, sole_user
from ..graph import source_of as source
from ..stages import Stage

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_QUANTIZED = overload("linear_quantized")
_LINEAR = (aten.linear.default, _QUANTIZED)


@dataclass
class _Site:
    """A linear layer and what it takes in; `last` is the node whose value the fused op computes."""

    linear: fx.Node
    x: fx.Node
    norm: fx.Node | None = None
    activation: fx.Node | None = None
    residual: fx.Node | None = None
    last: fx.Node | None = None
    wide: bool = False


class FuseLinear:
    """For CUDA: RMSNorm, linear, gated activation and residual add become one op; float32 logits are not rounded."""

    name = "fuse-linear"
    needs = Stage.CACHED
    leaves = Stage.QUANTIZED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Part the fused adds and norms where a product takes a half each, then rewrite every product."""
        outcome = Outcome()
        if ctx.device != "cuda":
            return outcome
        for node in [n for n in traced.graph.nodes if is_call(n, overload("add_rms_norm"))]:
            if any(_is_product(n) and len(n.users) == 1 for n in operands(node)[:2]):
                _part(traced, node)
        for linear in [n for n in traced.graph.nodes if is_call(n, *_LINEAR)]:
            if not _is_product(linear):
                outcome.miss(linear.name, "its weight is computed, or of a dtype without a kernel")
                continue
            _rewrite(traced, _site(linear, outcome))
            outcome.changed += 1
        return outcome


def _is_product(node: object) -> bool:
    """Whether the node is a linear layer with stored weight and bias, quantized or of the activations' dtype."""
    if not isinstance(node, fx.Node) or not is_call(node, *_LINEAR):
        return False
    if node.target is _QUANTIZED:
        return True
    x, weight, bias = (*operands(node), None)[:3]
    stored = is_weight(weight) and (bias is None or is_weight(bias))
    return stored and dtype_of(weight) in _DTYPES and dtype_of(weight) == dtype_of(x)


def _part(traced: TracedGraph, node: fx.Node) -> None:
    """add_rms_norm becomes add and rms_norm again."""
    x, residual, *norm_args = operands(node)
    with traced.graph.inserting_before(node):
        total = emit(traced.graph, aten.add.Tensor, x, residual, source=source(node))
        normed = emit(traced.graph, overload("rms_norm"), total, *norm_args, source=source(node))
    for user in list(node.users):
        if is_call(user, operator.getitem):
            replace(user, (total, normed)[operands(user)[1]])
    traced.graph.erase_node(node)


def _site(linear: fx.Node, outcome: Outcome) -> _Site:
    x = operands(linear)[0]
    site = _Site(linear, x, last=linear)
    if is_call(x, overload("rms_norm")) and is_weight(operands(x)[1]) and dtype_of(operands(x)[1]) == dtype_of(x):
        # Rows that are quantized are read once for it in any case.
        if math.prod(shape_of(x)[:-1]) <= DECODE_ROWS or (linear.target is _QUANTIZED and operands(linear)[7]):
            site.norm, site.x = x, operands(x)[0]
        else:
            outcome.miss(linear.name, "so many rows are bound by arithmetic: their norm is computed once, before")
    user = sole_user(linear)
    if user is not None and is_call(user, overload("gated_activation")):
        site.activation = site.last = user
        user = sole_user(user)
    if user is not None and is_call(user, aten.add.Tensor) and not user.kwargs:
        others = [a for a in operands(user)[:2] if a is not site.last]
        other = others[0] if len(others) == 1 else None
        if isinstance(other, fx.Node) and _alike(other, user) and _alike(user, site.last or linear):
            site.residual, site.last = other, user
    elif user is not None and site.last is linear:
        _take_cast(site, user)
    return site


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return shape_of(a) == shape_of(b) and dtype_of(a) == dtype_of(b)


def _take_cast(site: _Site, user: fx.Node) -> None:
    """A cast of the product alone to float32 (the logits, perhaps behind a reshape): round once less."""
    cast = user
    if is_call(user, aten.reshape.default):
        inner = sole_user(user)
        if inner is None:
            return
        cast = inner
    narrow = dtype_of(site.linear) != torch.float32
    if narrow and is_call(cast, aten._to_copy.default) and dtype_of(cast) == torch.float32:
        site.wide, site.last = True, cast


def _rewrite(traced: TracedGraph, site: _Site) -> None:
    if site.linear.target is _QUANTIZED:
        _, weight, scale, zero, bias, *form = operands(site.linear)
    else:
        _, weight, bias = (*operands(site.linear), None)[:3]
        scale, zero, form = None, None, ["", [], ""]
    last = site.last or site.linear
    norm_weight, eps, offset, narrow_first = operands(site.norm)[1:5] if site.norm else (None, 0.0, 0.0, False)
    kind, gate_first = operands(site.activation)[1:3] if site.activation else ("", True)
    with traced.graph.inserting_before(last):
        new = emit(
            traced.graph, overload("fused_linear"), site.x, weight, bias, norm_weight, site.residual, eps, offset,
            narrow_first, kind, gate_first, site.wide, scale, zero, *form, source=source(site.linear),
        )  # fmt: skip
        if shape_of(new) != shape_of(last):
            new = emit(traced.graph, aten.reshape.default, new, list(shape_of(last)), source=source(site.linear))
    replace(last, new)
