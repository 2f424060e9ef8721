"""Computes what is equal once."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..base import Context, Outcome
from ..graph import TracedGraph, replace
from ..stages import Stage


class CommonSubexpressions:
    """Calls of the same op with the same arguments become one."""

    name = "common-subexpressions"
    needs = Stage.CLEAN
    leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Every op before the cache pass is pure, so equal calls have equal results."""
        outcome = Outcome()
        seen: dict[Any, fx.Node] = {}
        for node in list(traced.graph.nodes):
            if node.op not in ("call_function", "get_attr"):
                continue
            key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
            first = seen.setdefault(key, node)
            if first is not node:
                replace(node, first)
                outcome.changed += 1
        return outcome


def _frozen(value: Any) -> Any:
    """A hashable form in which 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    return value if isinstance(value, fx.Node) else (type(value).__name__, repr(value))
