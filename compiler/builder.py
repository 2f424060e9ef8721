"""The story of a build, top to bottom: recipe, trace, passes, weights, engines, gate, artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..artifacts.errors import GateError, ResourceError, UsageError
from ..artifacts.manifest import Manifest
from ..artifacts.store import ArtifactWriter
from ..artifacts.trust import record_build
from ..passes.base import GraphPass
from ..passes.graph import TracedGraph
from ..passes.instruments import PassRecord
from . import accuracy
from . import gate as numeric_gate
from .assets import write_assets
from .console import Progress
from .engines import compile_all, require_gpu
from .gate import GateTokens
from .model_weights import ModelWeights, open_weights
from .pipelines import PIPELINE, select
from .plan import Plan, check_recipe, make_plan
from .provenance import attestations
from .recipe import Recipe
from .record import draft_manifest, listed, reports
from .weights_file import Spec, write_weights


@dataclass
class BuildResult:
    """A finished build."""

    path: Path
    manifest: Manifest
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    records: dict[str, list[PassRecord]] = field(default_factory=dict)
    task: dict[str, Any] | None = None


def build(
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    dump_ir: Path | None = None,
    progress: Progress,
    passes: Sequence[GraphPass] = PIPELINE,
) -> BuildResult:
    """Compile a recipe into the artifact folder `output`.

    The old artifact there stays until the new one is whole. Returns what was built.

    Raises:
        UsageError (2), UnsupportedModelError (3), GateError (4), ResourceError (5).
    """
    check_recipe(recipe)
    if recipe.target.device == "cuda":
        require_gpu()
    clock = _Clock()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with clock("trace and passes"):
        plan, model = make_plan(recipe, progress, dump_ir, passes)
    weights = open_weights(model, plan.folder, recipe.model.dtype, recipe.model.seed)
    del model
    _refuse_own_source(output, plan.folder)
    with ArtifactWriter(output, force) as writer:
        root = writer.root
        for name in ("engines", "weights", "report"):
            (root / name).mkdir()
        manifest = draft_manifest(plan, weights)
        with clock("weights"), progress.stage("weights"):
            files = _write_weights(root / "weights", plan, weights)
        has_tokenizer = write_assets(plan.config, plan.folder, root, manifest.model.vocab_size)
        with clock("engines"):
            engines = compile_all(plan, root, progress)
        target = replace(manifest.target, host_library=engines.host_library)
        paths = tuple(f"weights/{f}" for f in files)
        manifest = replace(manifest, target=target, engines=engines.entries, weights=paths)
        tokenizer = root / "tokenizer.json" if has_tokenizer else None
        tokens = numeric_gate.plan_tokens(plan, tokenizer)
        with clock("gate"), progress.stage("numeric gate"):
            result = _gate(plan, weights, root, manifest, tokens)
        if not result.passed:
            _fail(plan, weights, tokens, result, progress, passes)
        lossy = accuracy.is_lossy(plan)
        measured = None
        if lossy and recipe.gate.accuracy_tokens:
            with clock("accuracy"), progress.stage("accuracy"):
                windows = accuracy.accuracy_windows(plan, tokenizer)
                measured = accuracy.measure(plan, weights.load, root, listed(root, manifest), windows)
            result.report["accuracy"] = accuracy.summary(measured)
            _judge_accuracy(recipe, measured)
        task = None
        if recipe.gate.task:
            from .task import run_task

            with clock("task"), progress.stage("task"):
                task = run_task(plan, root, listed(root, manifest), weights.load if lossy else None)
            result.report["task"] = task
            _judge_task(task)
        written = reports(plan, result.report)
        if measured:
            written["accuracy"] = measured
        if engines.tuning:
            written["tuning"] = engines.tuning
        manifest = replace(manifest, passes=written["passes"], gate=result.report)
        for name, value in written.items():
            (root / "report" / f"{name}.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        with clock("publish"), progress.stage("digest and publish"):
            manifest = writer.commit(manifest, lambda final: attestations(final, started, clock.seconds, plan.records))
    try:
        record_build(manifest.digest())
    except ResourceError as error:
        progress.log(f"{error}\nIt runs here with --trust digest:sha256:{manifest.digest()} only.")
    return BuildResult(output, manifest, clock.seconds, plan.records, task)


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> _Clock:
        self._name, self._start = name, time.perf_counter()
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = time.perf_counter() - self._start


def _refuse_own_source(output: Path, folder: Path | None) -> None:
    if folder is None:
        return
    here, there = output.resolve(), folder.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise UsageError(
            f"the output {output} and the model {folder} overlap",
            "a build must not write into its own input",
            "choose another output folder",
        )


def _write_weights(folder: Path, plan: Plan, weights: ModelWeights) -> list[str]:
    """One file set for all engines: a name must mean the same weight in each of them."""
    specs: dict[str, Spec] = {}
    owners: dict[str, TracedGraph] = {}
    for graph in plan.graphs.values():
        for name, expression in graph.weights.entries.items():
            held = getattr(graph.gm, name)
            if name in owners and owners[name].weights.entries[name] != expression:
                raise ValueError(f"two engines mean different things by weight {name}")
            specs[name] = Spec(tuple(held.shape), held.dtype)
            owners[name] = graph
    return write_weights(folder, specs, lambda name: owners[name].weights.evaluate(name, weights.load))


def _gate(
    plan: Plan, weights: ModelWeights, root: Path, manifest: Manifest, tokens: GateTokens
) -> numeric_gate.GateResult:
    recipe, pairs = plan.recipe, numeric_gate.engine_pairs(plan.recipe)
    found = numeric_gate.replay_in_child(root, listed(root, manifest), pairs, tokens)
    device = recipe.target.device
    reference = numeric_gate.reference_logits(plan.config, weights.load, tokens, device)
    result = numeric_gate.judge(recipe, pairs, found, reference, None, tokens)
    if result.passed:
        return result
    # Only now is it worth the time to ask how far the model's own dtype is off.
    eager = numeric_gate.eager_logits(plan.config, recipe, weights.load, tokens)
    return result if eager is None else numeric_gate.judge(recipe, pairs, found, reference, eager, tokens)


def _fail(
    plan: Plan,
    weights: ModelWeights,
    tokens: GateTokens,
    result: numeric_gate.GateResult,
    progress: Progress,
    passes: Sequence[GraphPass],
) -> None:
    """The gate failed: find the pass, and say all of it."""
    from .bisect import find_culprit

    try:
        with progress.stage("bisecting the passes"):
            chosen = select(plan.recipe.passes.skip, passes)
            culprit = find_culprit(plan, weights.load, tokens, chosen, result.failed_pair, result.worst)
        why = f"pass {culprit.name!r} brings the error in: {culprit.detail}" if culprit.name else culprit.detail
    except Exception as error:  # noqa: BLE001 - the gate's own failure must be told, whatever the search meets
        why = f"the search for the pass failed too: {type(error).__name__}: {str(error)[:200]}"
    engine, what = result.failures[0]
    more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
    raise GateError(
        f"the numeric gate failed: engine {engine}: {what}{more}", why,
        "the old artifact is untouched; skip or mend the pass, or change gate.budgets if this loss is meant",
    )  # fmt: skip


def _judge_accuracy(recipe: Recipe, measured: dict[str, Any]) -> None:
    if missed := accuracy.shortfalls(recipe, measured):
        raise GateError(
            f"the accuracy falls short: {'; '.join(missed)}",
            f"measured on {measured['positions']} tokens of {measured['text']}, scheme {measured['scheme']}",
            "use a more exact scheme, quantize fewer weights (quantization.ignore), or change gate.budgets if this loss"
            " is meant",
        )


def _judge_task(task: dict[str, Any]) -> None:
    if task["exact_match"] < task["required"]:
        wrong = task["wrong"][0]
        raise GateError(
            f"the task falls short: {task['exact_match']:.1%} of {task['items']} answers match,"
            f" {task['required']:.1%} are required",
            f"for example {wrong['question']!r} got {wrong['given']!r}, not {wrong['answer']!r}",
            "use a more exact quantization scheme, or lower gate.task_exact_match if this loss is meant",
        )
