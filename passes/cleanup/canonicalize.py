"""Removes ops that compute nothing and writes the rest in one spelling, on which all later passes rely."""

from __future__ import annotations

import torch
from torch import fx

from ..base import Context, Outcome
from ..graph import TracedGraph, aten, dtype_of, operands, replace, shape_of, value_of
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
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class Canonicalize:
    """Drop checks, copies, idle views, casts and multiplications by one; one spelling for views, slices and casts."""

    name = "canonicalize"
    needs = Stage.TRACED
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """One sweep in the graph's order: a node's inputs are settled before the node is looked at."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _CHECKS:
                traced.graph.erase_node(node)
                outcome.changed += 1
            elif (same := _unchanged(node)) is not None:
                replace(node, same)
                outcome.changed += 1
            elif _respell(node):
                outcome.changed += 1
        return outcome


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The input that the node equals in shape, dtype and every value, or None."""
    args = operands(node)
    if not args or not isinstance(args[0], fx.Node) or not isinstance(node.meta["val"], torch.Tensor):
        return None
    source, target = args[0], node.target
    if not isinstance(value_of(source), torch.Tensor) or dtype_of(source) != dtype_of(node):
        return None
    if target in _COPIES or target in _CASTS:
        return source
    if target is aten.dropout.default and (args[2] is False or args[1] == 0):
        return source
    if shape_of(source) != shape_of(node):
        return None
    if target in _VIEWS or target is aten.expand.default:
        return source
    if target is aten.slice.Tensor and (len(args) < 5 or args[4] == 1):
        return source
    if target in (aten.mul.Tensor, aten.div.Tensor) and _is_number(args[1], 1):
        return source
    # x + 0 turns -0.0 into 0.0, which no op that may stand in a graph tells apart.
    if target in (aten.add.Tensor, aten.sub.Tensor) and _is_number(args[1], 0) and not node.kwargs:
        return source
    return None


def _is_number(value: object, wanted: int) -> bool:
    return isinstance(value, int | float) and value == wanted


def _respell(node: fx.Node) -> bool:
    """Whether the node was not yet in the one spelling of its meaning; now it is."""
    args = operands(node)
    if node.target in _VIEWS:
        return _set(node, aten.reshape.default, (args[0], list(shape_of(node))))
    if node.target is aten.slice.Tensor:
        return _set(node, aten.slice.Tensor, _explicit_slice(node))
    if node.target is aten.type_as.default:
        return _set(node, aten._to_copy.default, (args[0],), {"dtype": dtype_of(node)})
    if node.target is aten.square.default:
        return _set(node, aten.pow.Tensor_Scalar, (args[0], 2))
    # PyTorch computes both the same way in float32, not in bfloat16 on every CPU; norms are written in either.
    if node.target is aten.pow.Tensor_Scalar and args[1] == -0.5 and dtype_of(node) == torch.float32:
        return _set(node, aten.rsqrt.default, (args[0],))
    return False


def _set(node: fx.Node, target: object, args: tuple, kwargs: dict | None = None) -> bool:
    kwargs = kwargs or {}
    if node.target is target and tuple(node.args) == args and dict(node.kwargs) == kwargs:
        return False
    node.target, node.args, node.kwargs = target, args, kwargs  # type: ignore[assignment]
    return True


def _explicit_slice(node: fx.Node) -> tuple:
    """Arguments of a slice with dimension, start and end counted from the front; the step only where it is not one."""
    x, dim, start, end, step = (*operands(node), None, None, None, None)[:5]
    dim = (dim or 0) % len(shape_of(x))
    start, end, step = slice(start, end, step if step is not None else 1).indices(shape_of(x)[dim])
    return (x, dim, start, max(start, end)) if step == 1 else (x, dim, start, end, step)
