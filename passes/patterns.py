"""A small language for subgraphs: say what a computation looks like, get its parts by name.

    norm = op(aten.mul.Tensor, var("x"), op(aten.rsqrt.default, …), commutes=True)
    found = match(norm, node)          # {"x": <node>, …} or None

A variable that occurs twice must be the same value both times. Matching backtracks: every order of a commutative op
and every depth of a chain of casts is tried before a pattern fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph import aten

Bindings = dict[str, Any]


@dataclass(frozen=True)
class Var:
    """Any value, bound to a name; `where` may restrict it."""

    name: str
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Op:
    """A call of one of `targets` whose first arguments match and whose further ones are the op's defaults.

    Keyword arguments never match: no pattern can say what they mean.
    """

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    commutes: bool = False
    bind: str = ""


@dataclass(frozen=True)
class Cast:
    """A value, possibly behind changes of dtype; `bind` names the outermost of them."""

    inner: Any
    bind: str = ""


def var(name: str, where: Callable[[Any], bool] | None = None) -> Var:
    """A named hole in a pattern."""
    return Var(name, where)


def op(target: Any, *args: Any, commutes: bool = False, bind: str = "") -> Op:
    """A call in a pattern: a tuple of targets allows each; `commutes` swaps the first two; `bind` names the node."""
    return Op(target if isinstance(target, tuple) else (target,), args, commutes, bind)


def number(name: str) -> Var:
    """A named hole for a plain number."""
    return Var(name, lambda value: isinstance(value, int | float) and not isinstance(value, bool))


def tensor(name: str) -> Var:
    """A named hole for a tensor, computed or stored."""
    return Var(name, lambda value: isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor))


def is_cast(value: Any) -> bool:
    """Whether the value only changes the dtype of another."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    if value.target is aten._to_copy.default:
        return set(value.kwargs) == {"dtype"}
    return value.target is aten.type_as.default


def match(pattern: Any, value: Any, bound: Bindings | None = None) -> Bindings | None:
    """The first way in which `value` matches `pattern`, or None. A list in a pattern matches a list item by item."""
    return next(_matches(pattern, value, bound or {}), None)


def _matches(pattern: Any, value: Any, bound: Bindings) -> Iterator[Bindings]:
    if isinstance(pattern, Var):
        if pattern.name in bound:
            if _same(bound[pattern.name], value):
                yield bound
        elif pattern.where is None or pattern.where(value):
            yield {**bound, pattern.name: value}
    elif isinstance(pattern, Cast):
        inner = value
        while True:
            yield from _matches(pattern.inner, inner, {**bound, pattern.bind: value} if pattern.bind else bound)
            if not is_cast(inner):
                return
            inner = inner.args[0]
    elif isinstance(pattern, Op):
        if not (isinstance(value, fx.Node) and value.op == "call_function" and value.target in pattern.targets):
            return
        if len(value.args) < len(pattern.args) or value.kwargs or not _rest_is_default(value, len(pattern.args)):
            return
        start = {**bound, pattern.bind: value} if pattern.bind else bound
        args = value.args[: len(pattern.args)]
        orders = [args, (args[1], args[0], *args[2:])] if pattern.commutes else [args]
        for order in orders:
            yield from _match_all(pattern.args, order, start)
    elif isinstance(pattern, list):
        if isinstance(value, list | tuple) and len(value) == len(pattern):
            yield from _match_all(tuple(pattern), tuple(value), bound)
    elif _same(pattern, value):
        yield bound


def _match_all(patterns: tuple[Any, ...], values: tuple[Any, ...], bound: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    for found in _matches(patterns[0], values[0], bound):
        yield from _match_all(patterns[1:], values[1:], found)


def _rest_is_default(node: fx.Node, count: int) -> bool:
    """Whether all arguments from `count` on are what the op takes without them."""
    rest = node.args[count:]
    if not rest:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    declared = node.target._schema.arguments[count:]
    return all(
        d.has_default_value() and _same(d.default_value, value) for d, value in zip(declared, rest, strict=False)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, bool) is not isinstance(b, bool):
        return False
    return bool(a == b)
