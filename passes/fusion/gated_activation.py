"""Finds gated activations, act(gate) * up, whose gate and up are neighbouring parts of one tensor (arXiv 2002.05202).

Runs after `merge-projections`, which makes them neighbours; models with one gate_up weight (Phi-3, mixtures of experts)
have them so from the start.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from ...runtime.ops.schema import overload
from ..base import Context, Outcome
from ..graph import TracedGraph, aten, emit, is_call, op_name, operands, replace, shape_of, source_of
from ..patterns import is_cast
from ..stages import Stage

# Ops between a part and the product that make a near miss: pointwise, and common in gated activations.
_POINTWISE = (
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
    aten.mish.default, aten.elu.default, aten.leaky_relu.default, aten.hardswish.default, aten.softplus.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.minimum.default, aten.maximum.default,
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default, aten._to_copy.default,
    aten.pow.Tensor_Scalar,
)  # fmt: skip
_DEPTH = 8


@dataclass(frozen=True)
class _Part:
    """Elements start, start + step, … (size of them) of the last dimension of `whole`."""

    whole: fx.Node
    start: int
    size: int
    step: int


class FuseGatedActivation:
    """silu, gelu or relu of one half of a tensor times its other half becomes one op that reads the tensor once."""

    name = "fuse-gated-activation"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Match from the product; other products of two parts of one tensor are near misses."""
        outcome = Outcome()
        for node in list(traced.graph.nodes):
            if not is_call(node, aten.mul.Tensor):
                continue
            a, b = operands(node)
            behind = [_parts_behind(a, _DEPTH), _parts_behind(b, _DEPTH)]
            if [len(parts) for parts in behind] != [1, 1] or behind[0] == behind[1]:
                continue
            (first,), (second,) = behind
            if first.whole is not second.whole:
                continue
            gate, up = (a, b) if _part(b) is not None else (b, a)
            kind = activation_kind(gate)
            if reason := _unfit(node, gate, up, kind, first, second):
                outcome.miss(node.name, reason)
                continue
            low, high = sorted((first, second), key=lambda part: part.start)
            gate_part = _part(operands(gate)[0])
            with traced.graph.inserting_before(node):
                x = _both(traced, low, high, source_of(node))
                new = emit(
                    traced.graph, overload("gated_activation"), x, kind, gate_part == low, source=source_of(node)
                )
            replace(node, new)
            outcome.changed += 1
        return outcome


def activation_kind(node: fx.Node) -> str:
    """The op's word for the activation a node computes, or ""."""
    if is_call(node, aten.silu.default):
        return "silu"
    if is_call(node, aten.relu.default):
        return "relu"
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return ""


def _unfit(node: fx.Node, gate: fx.Node, up: fx.Node, kind: str, first: _Part, second: _Part) -> str:
    """Why a product of two parts of one tensor is not the op's, or ""."""
    if _part(up) is None:
        return f"both parts are computed with before the product ({op_name(gate)}, {op_name(up)})"
    if is_cast(gate) or is_cast(operands(gate)[0]):
        return "the gate is computed in another dtype"
    if not kind:
        return f"{op_name(gate)} is none of the op's activations"
    if _part(operands(gate)[0]) is None:
        return f"the gate goes through {op_name(operands(gate)[0])} before its activation"
    if first.step != 1 or second.step != 1:
        return "gate and up are interleaved"
    low, high = sorted((first, second), key=lambda part: part.start)
    if low.size != high.size or low.start + low.size != high.start:
        return "gate and up are not neighbours of the same size"
    return ""


def _both(traced: TracedGraph, low: _Part, high: _Part, source: str) -> fx.Node:
    """The two neighbours as one tensor: the whole, or a slice of it when more was merged into it."""
    last, stop = len(shape_of(low.whole)) - 1, high.start + high.size
    if (low.start, stop) == (0, shape_of(low.whole)[last]):
        return low.whole
    return emit(traced.graph, aten.slice.Tensor, low.whole, last, low.start, stop, source=source)


def _part(node: object) -> _Part | None:
    """What part of the last dimension of another tensor a node is, if it is one."""
    if is_call(node, aten.slice.Tensor):
        whole, dim, start, stop, step = (*operands(node), 1)[:5]  # type: ignore[arg-type]
        start, stop, step = slice(start, stop, step).indices(shape_of(whole)[dim])
        return _Part(whole, start, shape_of(node)[dim], step) if _is_last(whole, dim) else None
    if not is_call(node, operator.getitem):
        return None
    split, index = operands(node)  # type: ignore[arg-type]
    if not is_call(split, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        return None
    whole = operands(split)[0]
    dim = operands(split)[2] if len(split.args) > 2 else 0
    if not _is_last(whole, dim):
        return None
    sizes = [piece.shape[dim] for piece in split.meta["val"]]
    return _Part(whole, sum(sizes[:index]), sizes[index], 1)


def _is_last(whole: fx.Node, dim: int) -> bool:
    return dim in (-1, len(shape_of(whole)) - 1)


def _parts_behind(node: object, depth: int) -> set[_Part]:
    """Parts of other tensors that pointwise ops compute a value from; empty when anything else takes part."""
    part = _part(node)
    if part is not None:
        return {part}
    if depth == 0 or not is_call(node, *_POINTWISE):
        return set()
    found: set[_Part] = set()
    for source in node.all_input_nodes:  # type: ignore[attr-defined]
        behind = _parts_behind(source, depth - 1)
        if not behind:
            return set()
        found |= behind
    return found
