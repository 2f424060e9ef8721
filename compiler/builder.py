"""The story of a build, top to bottom: recipe, trace, passes, weights, engines, gate, artifact.

Every stage is looked up in the build cache first (stages.py); what is only needed to make one is imported when it is.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.errors import GateError, ResourceError, UsageError
from ..artifacts.manifest import PAGE, PROVENANCE, Manifest
from ..artifacts.store import ArtifactWriter
from ..artifacts.trust import record_build
from .accuracy_facts import summary
from .assets import write_assets
from .backends.commands import ENGINE_TIMEOUT_S
from .cache.session import Session, Step
from .console import Progress
from .engines import require_gpu
from .facts import BuildFacts
from .model_source import resolve_source
from .provenance import attestations
from .recipe import Recipe
from .recipe_check import check_files
from .record import draft_manifest, listed, page, reports
from .stages import Stages

if TYPE_CHECKING:
    from ..passes.base import GraphPass
    from .gate import GateResult, GateTokens
    from .workshop import Workshop


@dataclass
class BuildResult:
    """A finished build.

    Attributes:
        stages: seconds by part of the build; steps: how each stage fared with the cache.
        records: what each pass did, by engine.
    """

    path: Path
    manifest: Manifest
    stages: dict[str, float] = field(default_factory=dict)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    task: dict[str, Any] | None = None
    steps: list[Step] = field(default_factory=list)


def build(
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    dump_ir: Path | None = None,
    progress: Progress,
    passes: Sequence[GraphPass] | None = None,
    cache: Session | None = None,
    tuning: Path | None = None,
    engine_timeout: float = ENGINE_TIMEOUT_S,
) -> BuildResult:
    """Compile a recipe into the artifact folder `output`.

    The old artifact there stays until the new one is whole. Returns what was built.

    Args:
        passes: another pipeline than the product's; such a build is not cached.
        cache: where stages are looked up and kept; None makes everything anew.
        tuning: a file of measured CUDA kernel configurations, to replay and add to.
        engine_timeout: seconds that the C++ compiler may take for one engine.

    Raises:
        UsageError (2), UnsupportedModelError (3), GateError (4), ResourceError (5).
    """
    check_files(recipe)
    if recipe.target.device == "cuda":
        require_gpu()
    clock = _Clock()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    source = resolve_source(recipe)
    session = cache if cache is not None and passes is None else Session(None)

    @functools.cache
    def workshop() -> Workshop:
        from .workshop import Workshop

        return Workshop(recipe, source, dump_ir, passes)

    stages = Stages(
        recipe, source, session, workshop, progress, dump_ir is not None, tuning=tuning, engine_timeout=engine_timeout
    )
    with clock("trace and passes"):
        facts = stages.trace()
    _refuse_own_source(output, facts.folder)
    with ArtifactWriter(output, force, alone=True) as writer:
        root = writer.root
        for name in ("engines", "weights", "report"):
            (root / name).mkdir()
        with clock("weights"):
            weights = stages.weights(facts, root)
        manifest = draft_manifest(facts, weights["checkpoint"])
        has_tokenizer = write_assets(facts.config, facts.folder, root, manifest.model.vocab_size)
        with clock("engines"):
            engines = stages.engines(facts, root)
        target = replace(manifest.target, host_library=engines.host_library)
        paths = tuple(f"weights/{f}" for f in weights["files"])
        manifest = replace(manifest, target=target, engines=engines.entries, weights=paths)
        tokenizer = root / "tokenizer.json" if has_tokenizer else None
        with clock("gate"):
            gate = stages.gate(
                facts, root, lambda: _gate(facts, workshop(), listed(root, manifest), root, tokenizer, progress)
            )
        measured, task = None, None
        if facts.lossy and recipe.gate.accuracy_tokens != 0:
            with clock("accuracy"):
                measured = stages.accuracy(
                    root, lambda: _accuracy(facts, workshop(), listed(root, manifest), root, tokenizer, progress)
                )
            gate = {**gate, "accuracy": summary(measured)} if measured else gate
        if recipe.gate.task:
            with clock("task"):
                task = stages.task(facts, root, lambda: listed(root, manifest))
            gate = {**gate, "task": task}
            _judge_task(task)
        written = reports(facts, gate)
        if measured:
            written["accuracy"] = measured
        if engines.tuning:
            written["tuning"] = engines.tuning
        manifest = replace(manifest, passes=written["passes"], gate=gate)
        for name, value in written.items():
            (root / "report" / f"{name}.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        with clock("speed"):
            speed = stages.speed(root, lambda: listed(root, manifest))
        records = {name: known.records for name, known in facts.engines.items()}

        def attest(final: Manifest) -> dict[str, bytes]:
            files = attestations(final, started, clock.seconds, records, session.steps, speed)
            return {**files, PAGE: page(root, final, json.loads(files[PROVENANCE]), measured)}

        with clock("publish"), progress.stage("digest and publish"):
            manifest = writer.commit(manifest, attest)
    try:
        record_build(manifest.digest())
    except ResourceError as error:
        progress.log(f"{error}\nIt runs here with --trust digest:sha256:{manifest.digest()} only.")
    return BuildResult(output, manifest, clock.seconds, records, task, session.steps)


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


def _gate(
    facts: BuildFacts, workshop: Workshop, manifest: Manifest, root: Path, tokenizer: Path | None, progress: Progress
) -> dict[str, Any]:
    """Run the numeric gate; its report. Raises GateError where it fails, and names the pass."""
    from . import gate as numeric_gate

    recipe, load = facts.recipe, workshop.weights.load
    tokens = numeric_gate.plan_tokens(facts, tokenizer)
    pairs = numeric_gate.engine_pairs(recipe)
    found = numeric_gate.replay_in_child(root, manifest, pairs, tokens)
    reference = numeric_gate.reference_logits(facts.config, load, tokens, recipe.target.device)
    activations = bool(facts.kept_activations)
    result = numeric_gate.judge(recipe, pairs, found, reference, None, tokens, activations)
    if not result.passed:
        # Only now is it worth the time to ask how far the model's own dtype is off.
        eager = numeric_gate.eager_logits(facts.config, recipe, load, tokens)
        if eager is not None:
            result = numeric_gate.judge(recipe, pairs, found, reference, eager, tokens, activations)
    if not result.passed:
        _fail(workshop, tokens, result, progress)
    return result.report


def _fail(workshop: Workshop, tokens: GateTokens, result: GateResult, progress: Progress) -> None:
    """The gate failed: find the pass, and say all of it."""
    from .bisect import find_culprit
    from .pipelines import select

    try:
        progress.update("bisecting the passes")
        plan = workshop.plan()
        chosen = select(plan.recipe.passes.skip, workshop.passes)
        culprit = find_culprit(plan, workshop.weights.load, tokens, chosen, result.failed_pair, result.worst)
        why = f"pass {culprit.name!r} brings the error in: {culprit.detail}" if culprit.name else culprit.detail
    except Exception as error:  # noqa: BLE001 - the gate's own failure must be told, whatever the search meets
        why = f"the search for the pass failed too: {type(error).__name__}: {str(error)[:200]}"
    engine, what = result.failures[0]
    more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
    worst = _worst_layers(workshop, tokens, progress)
    raise GateError(
        f"the numeric gate failed: engine {engine}: {what}{more}", f"{why}{worst}",
        "the old artifact is untouched; skip or mend the pass, or change gate.budgets if this loss is meant",
    )  # fmt: skip


def _accuracy(
    facts: BuildFacts, workshop: Workshop, manifest: Manifest, root: Path, tokenizer: Path | None, progress: Progress
) -> dict[str, Any]:
    """Measure what was lost; the accuracy report. Raises GateError where it is more than the budgets."""
    from . import accuracy
    from .gate import plan_tokens

    windows = accuracy.accuracy_windows(facts, tokenizer, manifest.model.parameters)
    if not windows.positions:
        return {}
    measured = accuracy.measure(facts, workshop.weights.load, root, manifest, windows)
    if missed := accuracy.shortfalls(facts.recipe, measured, bool(facts.kept_activations)):
        worst = _worst_layers(workshop, plan_tokens(facts, tokenizer), progress)
        raise GateError(
            f"the accuracy falls short: {'; '.join(missed)}",
            f"measured on {measured['positions']} tokens of {measured['text']}, scheme {measured['scheme']}{worst}",
            "use a more exact scheme, leave the worst layers out (quantization.ignore), or change gate.budgets if this"
            " loss is meant",
        )
    return measured


def _worst_layers(workshop: Workshop, tokens: GateTokens, progress: Progress) -> str:
    """The quantized layers that are off the most, in words; empty where none is quantized."""
    from .layer_error import worst_layers
    from .pipelines import select

    try:
        plan = workshop.plan()
        if not plan.recipe.quantization.active:
            return ""
        progress.update("measuring the layers")
        chosen = select(plan.recipe.passes.skip, workshop.passes)
        layers = worst_layers(plan, workshop.weights.load, tokens.sequences[-1], chosen)
    except Exception as error:  # noqa: BLE001 - as in the search for the pass
        return f"; measuring the layers failed too: {type(error).__name__}: {str(error)[:200]}"
    return f"; the layers that are off the most: {', '.join(map(str, layers[:5]))}"


def _judge_task(task: dict[str, Any]) -> None:
    if task["exact_match"] < task["required"]:
        wrong = task["wrong"][0]
        raise GateError(
            f"the task falls short: {task['exact_match']:.1%} of {task['items']} answers match,"
            f" {task['required']:.1%} are required",
            f"for example {wrong['question']!r} got {wrong['given']!r}, not {wrong['answer']!r}",
            "use a more exact quantization scheme, or lower gate.task_exact_match if this loss is meant",
        )
