"""Runs passes in the order it is given, checks the stage on each result, and calls the instruments around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import fx

from ..artifacts.errors import IngotError
from .base import Context, GraphPass, Outcome
from .graph import TracedGraph, drop_unused_weights
from .stages import Stage, violations


class PassError(IngotError):
    """A pass crashed or broke the graph; names the pass and all that ran before it."""

    def __init__(self, name: str, ran: Sequence[str], why: str) -> None:
        super().__init__(
            f"pass {name!r} failed",
            f"{why} (ran before it: {', '.join(ran) or 'nothing'})",
            "skip it with --set passes.skip=[...] and report it with the dump of --dump-ir",
        )
        self.pass_name = name


class Instrument(Protocol):
    """Something that watches passes run; it never changes the graph."""

    def before(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context) -> None:
        """Called before each pass."""
        ...

    def after(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context, outcome: Outcome) -> None:
        """Called after each pass that succeeded."""
        ...

    def crashed(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context, error: Exception) -> None:
        """Called when a pass raised or left a graph that does not hold."""
        ...


def run_passes(
    traced: TracedGraph,
    passes: Iterable[GraphPass],
    ctx: Context,
    instruments: Sequence[Instrument] = (),
    stage: Stage = Stage.TRACED,
) -> Stage:
    """Run `passes` over `traced` in place and return the stage reached.

    Raises:
        PassError: a pass raised, needs a later stage than reached, or left a graph its stage does not allow.
    """
    ran: list[str] = []
    for graph_pass in passes:
        if graph_pass.needs > stage:
            raise PassError(graph_pass.name, ran, f"it needs stage {graph_pass.needs.name}, the graph is {stage.name}")
        for instrument in instruments:
            instrument.before(graph_pass, traced, ctx)
        try:
            outcome = graph_pass.run(traced, ctx)
            stage = max(stage, graph_pass.leaves)
            _settle(traced, stage, outcome)
        except IngotError as error:
            _tell(instruments, graph_pass, traced, ctx, error)
            raise
        except Exception as error:
            _tell(instruments, graph_pass, traced, ctx, error)
            raise PassError(graph_pass.name, ran, f"{type(error).__name__}: {error}") from error
        for instrument in instruments:
            instrument.after(graph_pass, traced, ctx, outcome)
        ran.append(graph_pass.name)
    return stage


def _settle(traced: TracedGraph, stage: Stage, outcome: Outcome) -> None:
    """Drop what nothing reads any more, lint, and check the stage on the result."""
    if outcome.changed:
        traced.graph.eliminate_dead_code(is_impure_node=_is_impure)
        drop_unused_weights(traced)
    traced.graph.lint()
    if found := violations(traced, stage):
        raise ValueError(f"stage {stage.name} does not hold: " + "; ".join(found[:5]))
    if outcome.changed:
        traced.gm.recompile()


def _is_impure(node: fx.Node) -> bool:
    writes = ("cache_write", "attention_step")
    return node.op in ("placeholder", "output") or any(name in str(node.target) for name in writes)


def _tell(
    instruments: Sequence[Instrument], graph_pass: GraphPass, traced: TracedGraph, ctx: Context, error: Exception
) -> None:
    for instrument in instruments:
        instrument.crashed(graph_pass, traced, ctx, error)
