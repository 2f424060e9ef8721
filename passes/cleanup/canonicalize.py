"""Removes ops that compute nothing and writes the rest in one spelling."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..base import Context, Outcome
from ..graph import TracedGraph, aten, is_call, shape_of, value_of
from ..stages import Stage

_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
)
_COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_LARGEST = 2**63 - 1


class Canonicalize:
    """Drop checks, copies, views to the same shape, casts to the same dtype and multiplications by one; views become reshapes."""

    name = "canonicalize"
    needs = Stage.TRACED
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Rewrite until nothing changes in one sweep (each node is looked at once; its inputs are already settled)."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _CHECKS:
                traced.graph.erase_node(node)
                outcome.changed += 1
            elif (same := _unchanged(node)) is not None:
                node.replace_all_uses_with(same)
                traced.graph.erase_node(node)
                outcome.changed += 1
            elif _respell(node):
                outcome.changed += 1
        return outcome


def _unchanged(node: fx.Node) -> Any:
    """The input that the node equals, or None."""
    if not node.args or not isinstance(node.args[0], fx.Node) or not isinstance(value_of(node.args[0]), torch.Tensor):
        return None
    source, target = node.args[0], node.target
    same_type = (
        value_of(source).dtype == node.meta["val"].dtype if isinstance(node.meta["val"], torch.Tensor) else False
    )
    if not same_type:
        return None
    same_shape = shape_of(source) == shape_of(node)
    if target in _COPIES or (target in (aten._to_copy.default, aten.to.dtype, aten.type_as.default)):
        return source
    if target in (*_VIEWS, aten.expand.default) and same_shape:
        return source
    if target is aten.slice.Tensor and same_shape and (len(node.args) < 5 or node.args[4] == 1):
        return source
    if target in (aten.mul.Tensor, aten.div.Tensor) and same_shape and node.args[1] == 1:
        return source
    if target in (aten.add.Tensor, aten.sub.Tensor) and same_shape and node.args[1] == 0 and not node.kwargs:
        return source
    return aten_dropout(node)


def aten_dropout(node: fx.Node) -> Any:
    """The input of a dropout that is off."""
    off = is_call(node, aten.dropout.default) and (node.args[2] is False or node.args[1] == 0)
    return node.args[0] if off else None


def _respell(node: fx.Node) -> bool:
    """One spelling for one meaning: reshape with full sizes, slices with explicit ends, type_as as a cast."""
    if node.target in _VIEWS:
        wanted = (node.args[0], list(shape_of(node)))
        if node.target is aten.reshape.default and list(node.args) == list(wanted):
            return False
        node.target, node.args = aten.reshape.default, wanted
        return True
    if node.target is aten.slice.Tensor and len(node.args) >= 4 and node.args[3] == _LARGEST:
        size = shape_of(node.args[0])[node.args[1]]
        node.args = (*node.args[:3], size, *node.args[4:])
        return True
    if node.target is aten.type_as.default:
        node.target, node.args, node.kwargs = aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype}
        return True
    return False
