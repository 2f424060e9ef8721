"""Which linear layers of a model read the same input, and what before them can take a scale per input channel.

Found in the traced graph, where every layer and norm of every model looks alike: nothing here knows a name. Layers are
told apart by their weight's name in the checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...passes.graph import TracedGraph, aten, is_call, is_weight, operands, shape_of
from ...passes.quantize.select import is_router
from ...passes.weights import Expression, Stored, Transposed
from ...runtime.ops.schema import overload


@dataclass(frozen=True)
class Linear:
    """A linear layer [n, k] by its weight's name; `transposed` where the checkpoint holds it as [k, n].

    Attributes:
        attribute: the weight's name in the graph.
        apart: why it is not calibrated like others, "" if it is: it is tied to an embedding, or a router.
    """

    name: str
    n: int
    k: int
    transposed: bool = False
    attribute: str = ""
    apart: str = ""


@dataclass(frozen=True, eq=False)
class Fold:
    """What takes a scale out of an input's channels before the layers that read it, exactly.

    Attributes:
        weight: name of a norm's weight [k], or of a linear layer's [m, …]; bias: of its bias, "" if it has none.
        linear: the layer, None for a norm.
        offset: what a norm adds to its weight before it multiplies (1 in Gemma).
        rows: which element of the norm or row of the layer makes each of the k channels, int64 [k].
    """

    weight: str
    bias: str
    linear: Linear | None
    offset: float
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Site:
    """An input and the layers that read it. `reason` says why nothing before it can take a scale."""

    linears: tuple[Linear, ...]
    fold: Fold | None
    reason: str = ""


def find_sites(traced: TracedGraph) -> list[Site]:
    """Every input of linear layers with stored weights, in the order of the graph, which must be clean."""
    uses: dict[str, int] = defaultdict(int)
    embedded = set()
    readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] += len(node.users)
        elif is_call(node, aten.embedding.default) and is_weight(operands(node)[0]):
            embedded.add(str(operands(node)[0].target))
        elif _linear(traced, node) is not None:
            readers[operands(node)[0]].append(node)
    sites = []
    for x, nodes in readers.items():
        linears = []
        for node in nodes:
            linear = _linear(traced, node)
            attribute = str(operands(node)[1].target)
            if linear is not None:
                apart = "tied to an embedding" if attribute in embedded or uses[attribute] > 1 else ""
                apart = "a router" if is_router(node) else apart
                linears.append(replace(linear, attribute=attribute, apart=apart))
        others = [user for user in x.users if user not in nodes]
        if others:
            found: Fold | str = f"its input is read by {others[0].name} too"
        else:
            found = _Walk(traced, uses).back(x)
        fold, reason = (found, "") if isinstance(found, Fold) else (None, found)
        sites.append(Site(tuple(linears), fold, reason))
    return sites


def _linear(traced: TracedGraph, node: fx.Node) -> Linear | None:
    if not is_call(node, aten.linear.default) or not is_weight(operands(node)[1]):
        return None
    entry = traced.weights.entries[str(operands(node)[1].target)]
    n, k = shape_of(operands(node)[1])
    if isinstance(entry, Stored):
        return Linear(entry.name, n, k)
    if isinstance(entry, Transposed) and isinstance(entry.part, Stored):
        return Linear(entry.part.name, n, k, transposed=True)
    return None


# Ops that move channels about, or cast them, and leave each as it is.
_MOVES = frozenset({
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.clone.default,
    aten.contiguous.default,
})  # fmt: skip


class _Walk:
    """From an input back to what multiplies each of its channels by a stored number."""

    def __init__(self, traced: TracedGraph, uses: Mapping[str, int]) -> None:
        self.traced, self.uses = traced, uses

    def back(self, x: fx.Node) -> Fold | str:
        """The fold, or why there is none."""
        path: list[fx.Node] = []
        found = self._source(x, path)
        if isinstance(found, str):
            return found
        start, weight, bias, linear, offset = found
        rows = _rows(start, path)
        if rows is None:
            return f"the channels of {start.name} reach it in an order that depends on the position"
        return Fold(weight, bias, linear, offset, rows)

    def _source(self, node: fx.Node, path: list[fx.Node]) -> tuple[fx.Node, str, str, Linear | None, float] | str:
        """Walks back from `node`; what is passed is put in front of `path`."""
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return f"{getattr(node, 'name', node)} takes no scale"
        if (linear := _linear(self.traced, node)) is not None:
            bias = (*operands(node), None)[2]
            names = self._names(node, operands(node)[1], bias)
            return names if isinstance(names, str) else (node, *names, linear, 0.0)
        if is_call(node, aten.layer_norm.default):
            _, _, weight, bias = (*operands(node), None, None)[:4]
            names = self._names(node, weight, bias)
            return names if isinstance(names, str) else (node, *names, None, 0.0)
        if is_call(node, aten.mul.Tensor):
            return self._product(node, path)
        source = self._moved(node)
        if source is None:
            return f"{node.name} takes no scale"
        if reason := _shared(source, node):
            return reason
        path.insert(0, node)
        return self._source(source, path)

    def _product(self, node: fx.Node, path: list[fx.Node]) -> tuple[fx.Node, str, str, Linear | None, float] | str:
        """A norm's product with its weight, or a product of two inputs one of which takes the scale."""
        for vector in operands(node):
            weight, offset = _vector(vector)
            if weight is not None and shape_of(weight) == shape_of(node)[-1:]:
                names = self._names(node, weight, None)
                return names if isinstance(names, str) else (node, *names, None, offset)
        reason = f"{node.name} takes no scale"
        for factor in operands(node):
            if not isinstance(factor, fx.Node) or shape_of(factor) != shape_of(node) or _shared(factor, node):
                continue
            tried: list[fx.Node] = []
            found = self._source(factor, tried)
            if not isinstance(found, str):
                path[:0] = [*tried, node]
                return found
            reason = found
        return reason

    @staticmethod
    def _moved(node: fx.Node) -> fx.Node | None:
        """The input whose channels `node` hands on."""
        source: fx.Node | None = None
        if is_call(node, overload("attention")):
            source = operands(node)[2]
        elif (
            is_call(node, *_MOVES, aten._to_copy.default)
            or getattr(node.target, "__name__", "") == "getitem"
            or is_call(node, aten.split.Tensor, aten.split_with_sizes.default)
        ):
            source = operands(node)[0]
        return source

    def _names(self, node: fx.Node, weight: object, bias: object) -> tuple[str, str] | str:
        """The checkpoint's names of a weight and a bias that nothing else reads."""
        names = []
        for part in (weight, bias):
            if part is None:
                names.append("")
                continue
            entry: Expression | None = None
            if isinstance(part, fx.Node) and is_weight(part):
                entry = self.traced.weights.entries[str(part.target)]
                if self.uses[str(part.target)] > 1:
                    return f"the weight of {node.name} is used elsewhere too"
                entry = entry.part if isinstance(entry, Transposed) else entry
            if not isinstance(entry, Stored):
                return f"{node.name} has no stored weight"
            names.append(entry.name)
        return (names[0], names[1]) if names[0] else f"{node.name} has no weight"


def _vector(node: object) -> tuple[fx.Node | None, float]:
    """The stored vector behind a norm's factor, and the number added to it."""
    offset = 0.0
    while isinstance(node, fx.Node) and not is_weight(node):
        if is_call(node, aten._to_copy.default):
            node = operands(node)[0]
        elif is_call(node, aten.add.Tensor) and isinstance(operands(node)[1], int | float) and not node.kwargs:
            offset += operands(node)[1]
            node = operands(node)[0]
        else:
            return None, 0.0
        if isinstance(node, fx.Node) and len(node.users) > 1:
            return None, 0.0
    return (node, offset) if isinstance(node, fx.Node) and len(shape_of(node)) == 1 else (None, 0.0)


def _shared(source: fx.Node, node: fx.Node) -> str:
    """Why `source` cannot be scaled for `node` alone, or "". Parts that do not overlap belong to their readers."""
    if len(source.users) == 1 or is_call(source, aten.split.Tensor, aten.split_with_sizes.default):
        return ""
    if not all(is_call(user, aten.slice.Tensor) for user in source.users):
        return f"{source.name} is read by others too"
    spans = []
    for user in source.users:
        given = list(operands(user)[1:])
        dim, start, stop, step = given + [0, 0, None, 1][len(given) :]
        size = shape_of(source)[dim]
        spans.append((dim % len(shape_of(source)), range(size)[start:stop:step]))
    own = spans[list(source.users).index(node)]
    overlap = [span for span in spans if span is not own and (span[0] != own[0] or set(span[1]) & set(own[1]))]
    return f"{source.name} is read by others too" if overlap else ""


def _rows(start: fx.Node, path: list[fx.Node]) -> Tensor | None:
    """Which channel of `start` each channel at the end of `path` is: its number is sent along the way."""
    shape = shape_of(start)
    ids: dict[fx.Node, object] = {start: torch.arange(shape[-1]).expand(shape)}
    last = start
    for node in path:
        value = ids[last]
        if is_call(node, overload("attention")) and isinstance(value, Tensor):
            heads = shape_of(node)[2]  # [batch, length, heads, head_dim] of values [batch, key heads, length, head_dim]
            ids[node] = value.repeat_interleave(heads // value.shape[1], 1).transpose(1, 2)
        elif is_call(node, aten.mul.Tensor, aten._to_copy.default):
            ids[node] = value
        else:
            target, rest = node.target, node.args[1:]
            ids[node] = target(value, *rest)  # type: ignore[operator]
        last = node
    end = ids[last]
    if not isinstance(end, Tensor):
        return None
    flat = end.reshape(-1, end.shape[-1])
    return flat[0].contiguous() if bool((flat == flat[:1]).all()) else None
