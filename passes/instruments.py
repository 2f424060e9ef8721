"""What watches the passes: timing and op counts for the build report, IR dumps, and the crash reproducer."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .base import Context, GraphPass, Outcome
from .graph import TracedGraph, op_name


def op_counts(traced: TracedGraph) -> Counter[str]:
    """How often each op stands in the graph."""
    return Counter(op_name(n) for n in traced.graph.nodes if n.op == "call_function")


@dataclass
class PassRecord:
    """One pass over one engine's graph, for the build report."""

    name: str
    exact: bool
    changed: int
    missed: list[dict[str, str]]
    facts: dict[str, object]
    ops_before: int
    ops_after: int
    ops_changed: dict[str, int]
    time_ms: float


@dataclass
class Recorder:
    """Timing and op differences of every pass."""

    records: list[PassRecord] = field(default_factory=list)
    _start: float = 0.0
    _before: Counter[str] = field(default_factory=Counter)

    def before(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context) -> None:
        self._before = op_counts(traced)
        self._start = time.perf_counter()

    def after(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context, outcome: Outcome) -> None:
        elapsed = (time.perf_counter() - self._start) * 1e3
        after = op_counts(traced)
        changed = {
            op: after[op] - self._before[op] for op in sorted(after | self._before) if after[op] != self._before[op]
        }
        self.records.append(
            PassRecord(
                graph_pass.name, graph_pass.exact, outcome.changed, [asdict(m) for m in outcome.missed], outcome.facts,
                self._before.total(), after.total(), changed, elapsed,
            )
        )  # fmt: skip

    def crashed(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context, error: Exception) -> None:
        return None


@dataclass
class DumpIR:
    """Writes the graph to numbered files, before the first pass and after every pass that changed it.

    When a pass crashes, the graph it was given and what it raised are written too: the reproducer.
    """

    folder: Path
    engine: str
    _count: int = 0
    _given: str = ""

    def before(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context) -> None:
        self._given = ir_text(traced)
        if self._count == 0:
            self._write(f"{self.engine}-00-traced.py", self._given)
        self._count += 1

    def after(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context, outcome: Outcome) -> None:
        if outcome.changed:
            self._write(f"{self.engine}-{self._count:02d}-{graph_pass.name}.py", ir_text(traced))

    def crashed(self, graph_pass: GraphPass, traced: TracedGraph, ctx: Context, error: Exception) -> None:
        story = {"pass": graph_pass.name, "context": asdict(ctx), "error": f"{type(error).__name__}: {error}"}
        text = f"# {json.dumps(story)}\n# The graph that was given to the pass:\n{self._given}"
        self._write(f"{self.engine}-crash-{graph_pass.name}.py", text)

    def _write(self, file: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / file).write_text(text, encoding="utf-8")


def ir_text(traced: TracedGraph) -> str:
    """The graph as Python, and under it every tensor's shape and dtype."""
    shapes = [
        f"# {n.name}: {tuple(n.meta['val'].shape)} {n.meta['val'].dtype}"
        for n in traced.graph.nodes
        if hasattr(n.meta.get("val"), "shape")
    ]
    return "\n".join([traced.gm.code.strip(), *shapes, ""])
