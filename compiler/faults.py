"""Planted faults: passes wrong on purpose, to prove that the numeric gate sees an error and bisection names it.

    bisect(recipe, progress=…, passes=plant("swap-gate-up", PIPELINE))      # names fault-swap-gate-up
    build(recipe, output, progress=…, passes=plant("wrong-block", PIPELINE))  # ends with exit code 4

Each one is a mistake that a real pass could make, and looks like a sound pass from outside: stages, shapes and dtypes
hold. Nothing here runs unless it is planted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx

from ..artifacts.errors import UsageError
from ..passes.base import Context, GraphPass, Outcome
from ..passes.fusion.gated_activation import activation_kind
from ..passes.graph import (
    TracedGraph,
    add_weight,
    aten,
    dtype_of,
    emit,
    is_call,
    is_weight,
    operands,
    replace,
    shape_of,
)
from ..passes.stages import Stage
from ..passes.weights import Expression, Load
from ..runtime.ops.schema import overload


class Fault(GraphPass, Protocol):
    """A pass that is wrong, and the pass of the pipeline behind which it is planted."""

    after: str


@dataclass(frozen=True)
class _Scaled:
    """A weight times a factor."""

    part: Expression
    factor: float

    def evaluate(self, load: Load) -> Tensor:
        value = self.part.evaluate(load)
        return (value.float() * self.factor).to(value.dtype)

    def sources(self) -> tuple[str, ...]:
        return self.part.sources()


class ScaleWeight:
    """The weight of the last linear layer, usually the LM head, is 2 % too large."""

    name = "fault-scale-weight"
    after = "fold-constants"
    needs = leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """An embedding tied to the weight keeps the right one."""
        linears = [n for n in traced.graph.nodes if is_call(n, aten.linear.default) and is_weight(n.args[1])]
        if not linears:
            return _nothing("no linear layer with a stored weight")
        weight = operands(linears[-1])[1]
        scaled = _Scaled(traced.weights.entries[weight.target], 1.02)
        with traced.graph.inserting_before(linears[-1]):
            new = add_weight(traced, f"{weight.target}__scaled", scaled, shape_of(weight), dtype_of(weight))
        linears[-1].replace_input_with(weight, new)
        return Outcome(changed=1)


class SwapGateUp:
    """Every gated activation takes up for gate: act(up) * gate."""

    name = "fault-swap-gate-up"
    after = "fuse-rope"
    needs = leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Before the projections are merged, so that merging and fusing carry the mistake on."""
        outcome = Outcome()
        for node in [n for n in traced.graph.nodes if is_call(n, aten.mul.Tensor)]:
            act, up = operands(node)
            if not activation_kind(act):
                act, up = up, act
            if not activation_kind(act) or not isinstance(up, fx.Node) or shape_of(act) != shape_of(up):
                continue
            gate = operands(act)[0]
            with traced.graph.inserting_before(node):
                wrong = emit(traced.graph, act.target, up, **act.kwargs)
                replace(node, emit(traced.graph, aten.mul.Tensor, wrong, gate))
            outcome.changed += 1
        return outcome if outcome.changed else _nothing("no gated activation")


class DropResidual:
    """One residual add in the middle of the model forgets the residual stream."""

    name = "fault-drop-residual"
    after = "fuse-rms-norm"
    needs = leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """A residual add sums two values as wide as the token embedding, one of which is read elsewhere too."""
        embedding = next((n for n in traced.graph.nodes if is_call(n, aten.embedding.default)), None)
        sums = [
            n
            for n in traced.graph.nodes
            if embedding is not None and is_call(n, aten.add.Tensor) and shape_of(n) == shape_of(embedding)
        ]
        found = [(n, branch) for n in sums if (branch := _branch(n)) is not None]
        if not found:
            return _nothing("no residual add")
        total, branch = found[len(found) // 2]
        replace(total, branch)
        return Outcome(changed=1)


def _branch(total: fx.Node) -> fx.Node | None:
    """The operand of a residual add that is not the residual stream: nothing but the sum reads it."""
    inputs = [a for a in operands(total) if isinstance(a, fx.Node) and shape_of(a) == shape_of(total)]
    alone = [a for a in inputs if len(a.users) == 1]
    return alone[0] if len(inputs) == 2 and len(alone) == 1 else None


class ShiftRoPE:
    """Decode engines believe that every token stands one position later.

    In decode alone: rotary attention sees only differences of positions, so a shift that prefill shares changes no
    result and is no fault at all. This one shifts new tokens against the cached ones.
    """

    name = "fault-shift-rope"
    after = "position-tables"
    needs = leaves = Stage.CLEAN
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Cache slots and masks, which come later, keep the right positions."""
        if ctx.phase != "decode":
            return Outcome()
        positions = next(n for n in traced.graph.nodes if n.op == "placeholder" and n.target == "positions")
        users = list(positions.users)
        if not users:
            return _nothing("the model does not look at positions")
        with traced.graph.inserting_before(min(users)):
            later = emit(traced.graph, aten.add.Tensor, positions, 1)
            later = emit(traced.graph, aten.clamp.default, later, None, ctx.max_length - 1)
        for user in users:
            user.replace_input_with(positions, later)
        return Outcome(changed=1)


class WrongBlock:
    """Attention reads the block in column 1 of the block table where column 0 is meant, and so on round."""

    name = "fault-wrong-block"
    after = "insert-kv-cache"
    needs = leaves = Stage.CACHED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """Keys and values are still written to the right blocks."""
        reads = [n for n in traced.graph.nodes if is_call(n, overload("paged_attention"))]
        if not reads or ctx.max_blocks < 2:
            return _nothing("no block table with two columns")
        tables = operands(reads[0])[3]
        with traced.graph.inserting_before(reads[0]):
            rolled = emit(traced.graph, aten.roll.default, tables, [-1], [1])
        for node in reads:
            node.replace_input_with(tables, rolled)
        return Outcome(changed=len(reads))


def _nothing(reason: str) -> Outcome:
    """The model has nothing that this fault could spoil."""
    outcome = Outcome()
    outcome.miss("graph", reason)
    return outcome


FAULTS: tuple[Fault, ...] = (ScaleWeight(), SwapGateUp(), DropResidual(), ShiftRoPE(), WrongBlock())


def plant(name: str, passes: Sequence[GraphPass]) -> list[GraphPass]:
    """`passes` with one fault among them, where its mistake makes sense.

    Args:
        name: a fault's name, with or without "fault-" in front.

    Raises:
        UsageError: there is no such fault, or not the pass it is planted behind.
    """
    fault = next((f for f in FAULTS if name in (f.name, f.name.removeprefix("fault-"))), None)
    if fault is None:
        known = ", ".join(f.name.removeprefix("fault-") for f in FAULTS)
        raise UsageError(f"there is no fault {name!r} to plant", "", f"the faults are: {known}")
    names = [p.name for p in passes]
    if fault.after not in names:
        raise UsageError(
            f"fault {name!r} cannot be planted", f"its place is behind {fault.after}, which is not in the pipeline", ""
        )
    place = names.index(fault.after) + 1
    return [*passes[:place], fault, *passes[place:]]
