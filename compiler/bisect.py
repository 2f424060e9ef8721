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
from .gate import GateTokens
from .load_model import make_model
from .metrics import compare
from .model_weights import open_weights
from .pipelines import PIPELINE, STRUCTURAL, select
from .plan import Plan, make_plan
from .recipe import Recipe
from .tokenizer_check import check_tokenizer
from .trace import trace


@dataclass(frozen=True)
class Culprit:
    """The pass that brings the error in.

    Attributes:
        name: None when no pass does.
        missed: whether the budget is missed at all; without a name it is the trace itself that misses it.
    """

    name: str | None
    detail: str
    missed: bool
    tried: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """What is replayed: a pair of engines, and the numbers of the gate's sequences that share a batch."""

    pair: Pair
    sequences: tuple[int, ...]


class Oracle:
    """Judges lists of passes over one plan: rewrite, replay, compare. Traces and reference are made once.

    Args:
        tokens: the gate's.
        failed_pair, worst: the engines and the sequence that the gate found to fall short; without them every pair of
            engines is a case, with the gate's longest sequences.
    """

    def __init__(
        self,
        plan: Plan,
        load: Load,
        tokens: GateTokens,
        failed_pair: tuple[str, str] | None = None,
        worst: int = -1,
    ) -> None:
        self.plan, self.load, self.tokens = plan, load, tokens
        recipe = plan.recipe
        pairs = [failed_pair] if failed_pair is not None else numeric_gate.engine_pairs(recipe)
        self.cases = [self._case(Pair(*pair), worst) for pair in pairs]
        model = make_model(plan.config, recipe.model.dtype)
        named = {name for case in self.cases for name in (case.pair.prefill, case.pair.decode)}
        self.traces = {s.name: trace(model, s.batch, s.length) for s in recipe.engines() if s.name in named}
        replayed = sorted({i for case in self.cases for i in case.sequences})
        chosen = GateTokens([tokens.sequences[i] for i in replayed], [tokens.prompts[i] for i in replayed])
        self.reference = dict(zip(replayed, numeric_gate.reference_logits(plan.config, load, chosen)))
        eager = numeric_gate.eager_logits(plan.config, recipe, load, chosen)
        self.own = compare(list(self.reference.values()), eager) if eager is not None else None
        self.budget = numeric_gate.budget_for(recipe, bool(plan.kept_activations))
        self.tried: list[str] = []

    def _case(self, pair: Pair, worst: int) -> Case:
        """The worst sequence and, from the longest down, as many more as rows and cache blocks allow."""
        count = len(self.tokens.sequences)
        context = self.plan.contexts[pair.decode]
        chosen: list[int] = []
        free = context.num_blocks - 1
        for i in dict.fromkeys([worst % count, *range(count - 1, -1, -1)]):
            need = -(-len(self.tokens.sequences[i]) // context.block_size)
            if len(chosen) < context.batch and need <= free:
                chosen.append(i)
                free -= need
        return Case(pair, tuple(chosen))

    def shortfalls(self, case: Case, passes: Sequence[GraphPass], label: str) -> list[str]:
        """What these passes' graphs miss of the budget; `label` names the prefix in the record of what was tried."""
        names = (case.pair.prefill, case.pair.decode)
        graphs = {name: copy_graph(self.traces[name]) for name in names}
        for name, graph in graphs.items():
            run_passes(graph, passes, self.plan.contexts[name])
        context = self.plan.contexts[case.pair.decode]
        cache = KVCache(context.block_size, context.num_blocks, context.max_blocks, self.plan.cache_dtype, ())
        group = EagerGroup(graphs, self.load)
        sequences = [self.tokens.sequences[i] for i in case.sequences]
        prompts = [self.tokens.prompts[i] for i in case.sequences]
        found: list[np.ndarray] = replay(group.engines, cache, case.pair, sequences, prompts)
        missed = self.budget.shortfalls(compare([self.reference[i] for i in case.sequences], found), self.own)
        self.tried.append(f"{label}: {missed[0] if missed else 'within budget'}")
        return missed


def find_culprit(
    plan: Plan,
    load: Load,
    tokens: GateTokens,
    passes: Sequence[GraphPass],
    failed_pair: tuple[str, str] | None = None,
    worst: int = -1,
) -> Culprit:
    """The first pass of `passes` whose prefix misses the budget.

    Args:
        plan: shapes, config and contexts (its graphs are not rewritten); load: stored weights by name.
        tokens, failed_pair, worst: what the gate replayed and found to fall short, see `Oracle`.
    """
    return search(Oracle(plan, load, tokens, failed_pair, worst), passes)


def search(oracle: Oracle, passes: Sequence[GraphPass]) -> Culprit:
    """`find_culprit` with an oracle at hand, which can serve several lists of passes."""
    oracle.tried = []

    def prefix(count: int) -> list[GraphPass]:
        """The first passes, and of the rest only what is needed to run."""
        return [*passes[:count], *(p for p in passes[count:] if p.name in STRUCTURAL)]

    for case in oracle.cases:
        if whole := oracle.shortfalls(case, passes, f"all passes, {case.pair.prefill} + {case.pair.decode}"):
            break
    else:
        return Culprit(
            None,
            "no pass does: run eagerly, the graphs are within budget; if the engines are not, it is the back end",
            False,
            tuple(oracle.tried),
        )
    if bare := oracle.shortfalls(case, prefix(0), "only what is needed to run"):
        return Culprit(
            None,
            f"the trace with nothing but {', '.join(STRUCTURAL)} already misses the budget: {bare[0]}",
            True,
            tuple(oracle.tried),
        )
    good, bad, detail = 0, len(passes), whole[0]
    while bad - good > 1:
        middle = (good + bad) // 2
        missed = oracle.shortfalls(case, prefix(middle), f"up to {passes[middle - 1].name}")
        if missed:
            bad, detail = middle, missed[0]
        else:
            good = middle
    return Culprit(passes[bad - 1].name, detail, True, tuple(oracle.tried))


def bisect(recipe: Recipe, *, progress: Progress, passes: Sequence[GraphPass] = PIPELINE) -> Culprit:
    """`ingot bisect`: plan the recipe and search its pipeline.

    Args:
        passes: the pipeline, or `faults.plant(name, PIPELINE)` for `--plant NAME`.

    Raises:
        UsageError, UnsupportedModelError, PassError: as a build would.
    """
    plan, model = make_plan(recipe, progress, None, passes)
    weights = open_weights(model, plan.folder, recipe.model.dtype, recipe.model.seed, plan.foreign)
    tokenizer = check_tokenizer(plan.folder, plan.vocabulary) if plan.folder is not None else None
    with progress.stage("bisect"):
        tokens = numeric_gate.plan_tokens(plan, tokenizer)
        return find_culprit(plan, weights.load, tokens, select(recipe.passes.skip, passes))
