"""Finds the pass that breaks the numbers: binary search over the pipeline with the numeric gate as oracle.

A prefix of the pipeline, completed by the passes without which nothing runs, is replayed eagerly with the real
weights and compared with eager Hugging Face. The first prefix that misses the budget ends in the culprit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..artifacts.manifest import KVCache
from ..passes.base import GraphPass
from ..passes.graph import copy_graph
from ..passes.manager import run_passes
from ..passes.weights import Load
from ..runtime.replay import Pair, replay
from . import gate as numeric_gate
from .console import Progress
from .eager_engines import EagerGroup
from .load_model import make_model
from .metrics import compare
from .model_weights import open_weights
from .pipelines import PIPELINE, STRUCTURAL, select
from .plan import Plan, make_plan
from .recipe import Recipe
from .trace import trace

_MOST_STEPS = 6


@dataclass(frozen=True)
class Culprit:
    """The pass that brings the error in; `name` is None when no pass does."""

    name: str | None
    detail: str
    tried: tuple[str, ...] = ()


class Oracle:
    """Judges lists of passes over one plan: rewrite, replay, compare. Traces and reference are made once."""

    def __init__(self, plan: Plan, load: Load) -> None:
        self.plan, self.load = plan, load
        recipe = plan.recipe
        model = make_model(plan.config, recipe.model.dtype)
        self.pair = Pair(*numeric_gate.engine_pairs(recipe)[-1])
        shapes = {s.name: s for s in recipe.engines() if s.name in (self.pair.prefill, self.pair.decode)}
        self.traces = {name: trace(model, shape.batch, shape.length) for name, shape in shapes.items()}
        vocabulary = numeric_gate_vocabulary(plan)
        rows = shapes[self.pair.decode].batch
        tokens = numeric_gate.gate_tokens(recipe, None, vocabulary, 0)
        keep = list(range(len(tokens.sequences)))[-rows:]
        self.tokens = numeric_gate.GateTokens(
            [tokens.sequences[i][: tokens.prompts[i] + _MOST_STEPS] for i in keep], [tokens.prompts[i] for i in keep]
        )
        self.reference = numeric_gate.reference_logits(plan.config, load, self.tokens)
        eager = numeric_gate.eager_logits(plan.config, recipe, load, self.tokens)
        self.own = compare(self.reference, eager) if eager is not None else None
        self.budget = numeric_gate.budget_for(recipe)
        self.tried: list[str] = []

    def shortfalls(self, passes: Sequence[GraphPass], label: str = "all passes") -> list[str]:
        """What these passes' graphs miss of the budget; `label` names the prefix in the record of what was tried."""
        graphs = {name: copy_graph(traced) for name, traced in self.traces.items()}
        for name, graph in graphs.items():
            run_passes(graph, passes, self.plan.contexts[name])
        context = self.plan.contexts[self.pair.decode]
        cache = KVCache(context.block_size, context.num_blocks, context.max_blocks, self.plan.recipe.model.dtype, ())
        group = EagerGroup(graphs, self.load)
        found: list[np.ndarray] = replay(group.engines, cache, self.pair, self.tokens.sequences, self.tokens.prompts)
        missed = self.budget.shortfalls(compare(self.reference, found), self.own)
        self.tried.append(f"{label}: {missed[0] if missed else 'within budget'}")
        return missed


def numeric_gate_vocabulary(plan: Plan) -> int:
    """Tokens the model knows, from its config."""
    return int(plan.config["vocab_size"])


def find_culprit(plan: Plan, load: Load, passes: Sequence[GraphPass]) -> Culprit:
    """The first pass of `passes` whose prefix misses the budget.

    Args:
        plan: shapes, config and contexts (its graphs are not used); load: stored weights by name.
    """
    return search(Oracle(plan, load), passes)


def search(oracle: Oracle, passes: Sequence[GraphPass]) -> Culprit:
    """`find_culprit` with an oracle at hand, which can serve several lists of passes."""
    oracle.tried = []

    def prefix(count: int) -> list[GraphPass]:
        """The first passes, and of the rest only what is needed to run."""
        return [*passes[:count], *(p for p in passes[count:] if p.name in STRUCTURAL)]

    whole = oracle.shortfalls(passes)
    if not whole:
        return Culprit(
            None,
            "no pass does: run eagerly, the graphs are within budget; if the engines are not, it is the back end",
            tuple(oracle.tried),
        )
    if bare := oracle.shortfalls(prefix(0), "only what is needed to run"):
        return Culprit(
            None,
            f"the trace with nothing but {', '.join(STRUCTURAL)} already misses the budget: {bare[0]}",
            tuple(oracle.tried),
        )
    good, bad, detail = 0, len(passes), whole[0]
    while bad - good > 1:
        middle = (good + bad) // 2
        missed = oracle.shortfalls(prefix(middle), f"up to {passes[middle - 1].name}")
        if missed:
            bad, detail = middle, missed[0]
        else:
            good = middle
    return Culprit(passes[bad - 1].name, detail, tuple(oracle.tried))


def bisect(recipe: Recipe, *, progress: Progress, passes: Sequence[GraphPass] = PIPELINE) -> Culprit:
    """`ingot bisect`: plan the recipe and search its pipeline.

    Args:
        passes: the pipeline, or `faults.plant(name, PIPELINE)` for `--plant NAME`.

    Raises:
        UsageError, UnsupportedModelError, PassError: as a build would.
    """
    plan, model = make_plan(recipe, progress, None, passes)
    weights = open_weights(model, plan.folder, recipe.model.dtype, recipe.model.seed)
    with progress.stage("bisect"):
        return find_culprit(plan, weights.load, select(recipe.passes.skip, passes))
