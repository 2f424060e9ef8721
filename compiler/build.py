"""The story of a build, top to bottom: recipe, trace, passes, weights, engines, gate, artifact."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..artifacts.errors import GateError, UsageError
from ..artifacts.manifest import CacheLayer, EngineEntry, FileEntry, KVCache, Manifest, Model, Target
from ..artifacts.store import ArtifactWriter
from ..artifacts.target import host_target
from ..passes.base import Context, GraphPass
from ..passes.graph import TracedGraph
from ..passes.instruments import DumpIR, PassRecord, Recorder
from ..passes.manager import run_passes
from . import gate as numeric_gate
from .assets import write_assets
from .backends.aoti import compile_engine, input_buffers, output_buffers
from .backends.cpu_kernels import compile_kernels
from .config_check import check_length, check_memory, read_config
from .console import Progress
from .load_model import make_model
from .model_source import resolve_source
from .model_weights import ModelWeights, open_weights
from .pipelines import PIPELINE, select
from .recipe import EngineShape, Recipe
from .trace import trace
from .weights_file import Spec, write_weights


@dataclass
class BuildResult:
    """A finished build."""

    path: Path
    manifest: Manifest
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    records: dict[str, list[PassRecord]] = field(default_factory=dict)
    task: dict[str, Any] | None = None


@dataclass
class Plan:
    """Everything known before a weight is read: the planned graphs of all engines."""

    recipe: Recipe
    config: dict[str, Any]
    folder: Path | None
    graphs: dict[str, TracedGraph]
    records: dict[str, list[PassRecord]]
    contexts: dict[str, Context]


def context_for(recipe: Recipe, shape: EngineShape) -> Context:
    """What passes may know of one engine."""
    block = recipe.shapes.kv_block_size
    max_blocks = -(-recipe.model.max_length // block)
    tokens = recipe.shapes.kv_cache_tokens or max(recipe.shapes.decode_batch_sizes) * max_blocks * block
    return Context(
        phase=shape.phase, batch=shape.batch, length=shape.length, device=recipe.target.device,
        max_length=recipe.model.max_length, block_size=block, num_blocks=-(-tokens // block) + 1, max_blocks=max_blocks,
        scheme=recipe.quantization.scheme, targets=recipe.quantization.targets, ignore=recipe.quantization.ignore,
    )  # fmt: skip


def make_plan(
    recipe: Recipe, progress: Progress, dump_ir: Path | None = None, passes: Sequence[GraphPass] = PIPELINE
) -> tuple[Plan, torch.nn.Module]:
    """Trace and rewrite every engine's graph. Reads the config, no weights.

    Raises:
        UsageError, UnsupportedModelError: recipe and model do not fit, or the model cannot be compiled.
        PassError: a pass failed; names it.
    """
    source = resolve_source(recipe)
    config = read_config(source)
    check_length(config, recipe.model.max_length)
    folder = None if recipe.model.source == "random" else source
    model = make_model(config, recipe.model.dtype)
    plan = Plan(recipe, config, folder, {}, {}, {})
    check_memory(sum(p.numel() * p.element_size() for p in model.parameters()), f"a {config['model_type']} of this size")
    chosen = select(recipe.passes.skip, passes)
    shapes = recipe.engines()
    with progress.stage("trace and passes", total=len(shapes)):
        for shape in shapes:
            progress.update(shape.name)
            traced = trace(model, shape.batch, shape.length)
            recorder = Recorder()
            instruments = [recorder, *([DumpIR(dump_ir, shape.name)] if dump_ir else [])]
            context = context_for(recipe, shape)
            run_passes(traced, chosen, context, instruments)
            plan.graphs[shape.name], plan.contexts[shape.name] = traced, context
            plan.records[shape.name] = recorder.records
            progress.update(shape.name, advance=1)
    return plan, model


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
    if recipe.target.device != "cpu":
        raise UsageError(f"target.device is {recipe.target.device!r}", "this version compiles for the CPU", "--set target.device=cpu")
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
        manifest = _manifest(plan, weights)
        with clock("weights"), progress.stage("weights"):
            files = _write_weights(root / "weights", plan, weights)
        has_tokenizer = write_assets(plan.config, plan.folder, root, manifest.model.vocab_size)
        with clock("engines"):
            engines = _compile(plan, root, progress)
        manifest = replace(manifest, engines=engines, weights=tuple(f"weights/{f}" for f in files))
        with clock("gate"), progress.stage("numeric gate"):
            result = _gate(plan, weights, root, manifest, has_tokenizer)
        if not result.passed:
            _fail(plan, weights, result, progress, passes)
        task = None
        if recipe.gate.task:
            from .task import run_task

            with clock("task"), progress.stage("task"):
                task = run_task(recipe, root, _listed(root, manifest))
            result.report["task"] = task
            _judge_task(task)
        reports = _reports(plan, result.report)
        manifest = replace(manifest, passes=reports["passes"], gate=result.report)
        for name, value in reports.items():
            (root / "report" / f"{name}.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        _provenance(root, started, clock, plan)
        with clock("publish"), progress.stage("digest and publish"):
            manifest = writer.commit(manifest)
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
        raise UsageError(f"the output {output} and the model {folder} overlap", "a build must not write into its own input", "choose another output folder")


def _manifest(plan: Plan, weights: ModelWeights) -> Manifest:
    """All that is known before compiling."""
    recipe, config = plan.recipe, plan.config
    graph = next(iter(plan.graphs.values()))
    context = next(iter(plan.contexts.values()))
    facts = next(r.facts for r in next(iter(plan.records.values())) if "layers" in r.facts)
    layers = tuple(CacheLayer(tuple(x["key"]), tuple(x["value"]), x["window"]) for x in facts["layers"])  # type: ignore[attr-defined, arg-type]
    logits = output_buffers(graph)[1]
    host = host_target()
    parameters = sum(getattr(graph.gm, name).numel() for name in graph.weights.entries)
    model = Model(
        architecture=str((config.get("architectures") or [config["model_type"]])[0]), model_type=config["model_type"],
        vocab_size=logits.shape[1], max_length=recipe.model.max_length, dtype=recipe.model.dtype,
        hidden_size=int(config.get("hidden_size") or config.get("n_embd") or 1), num_layers=len(layers), parameters=parameters,
    )  # fmt: skip
    isa = tuple(host.isa) if recipe.target.isa == "native" else ("avx2", "f16c", "fma")
    target = Target("cpu", host.system, host.machine, isa, "none", torch.__version__.split("+")[0])
    import transformers

    toolchain = {"ingot": __version__, "torch": torch.__version__, "transformers": transformers.__version__, "compiler": _compiler_version()}
    cache = KVCache(context.block_size, context.num_blocks, context.max_blocks, recipe.model.dtype, layers)
    record = {**recipe.to_dict(), "weights_digest": weights.digest()}
    return Manifest(1, recipe.name, __version__, model, target, toolchain, record, cache, (), (), [], {}, ())


def planned_manifest(plan: Plan, weights: ModelWeights, root: Path) -> Manifest:
    """The manifest of a plan whose engines are not compiled, with the assets in `root`: for running graphs eagerly."""
    manifest = _manifest(plan, weights)
    write_assets(plan.config, plan.folder, root, manifest.model.vocab_size)
    engines = tuple(
        EngineEntry(s.name, "aoti", s.phase, s.batch, s.length, "", input_buffers(g), output_buffers(g), (), ())
        for s in plan.recipe.engines()
        if (g := plan.graphs[s.name])
    )
    return _listed(root, replace(manifest, engines=engines))


def _compiler_version() -> str:
    import subprocess

    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return ""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.splitlines()[0] if done.stdout else ""


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


def _compile(plan: Plan, root: Path, progress: Progress) -> tuple[EngineEntry, ...]:
    entries = []
    shapes = plan.recipe.engines()
    with progress.stage("compile engines", total=len(shapes) + 1):
        progress.update("kernels")
        compile_kernels(root / "engines" / "kernels.so", isa=plan.recipe.target.isa)
        for shape in shapes:
            progress.update(shape.name, advance=1)
            graph = plan.graphs[shape.name]
            file = f"engines/{shape.name}.so"
            constants = compile_engine(graph, shape.name, root / file, plan.recipe.target.isa)
            entries.append(
                EngineEntry(
                    shape.name, "aoti", shape.phase, shape.batch, shape.length, file, input_buffers(graph),
                    output_buffers(graph), constants, ("engines/kernels.so",),
                )
            )  # fmt: skip
    return tuple(entries)


def _listed(root: Path, manifest: Manifest) -> Manifest:
    """The manifest with the files as they stand, undigested: for the child processes of the build itself."""
    files = tuple(
        FileEntry(p.relative_to(root).as_posix(), p.stat().st_size, "0" * 64) for p in sorted(root.rglob("*")) if p.is_file()
    )
    return replace(manifest, files=files)


def _gate(plan: Plan, weights: ModelWeights, root: Path, manifest: Manifest, has_tokenizer: bool) -> numeric_gate.GateResult:
    recipe = plan.recipe
    encode = None
    if has_tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
        encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    window = max((layer.window for layer in manifest.kv_cache.layers), default=0)
    tokens = numeric_gate.gate_tokens(recipe, encode, manifest.model.vocab_size, window)
    pairs = numeric_gate.engine_pairs(recipe)
    found = numeric_gate.replay_in_child(root, _listed(root, manifest), pairs, tokens)
    reference = numeric_gate.reference_logits(plan.config, weights.load, tokens)
    result = numeric_gate.judge(recipe, pairs, found, reference, None, tokens)
    if result.passed:
        return result
    # Only now is it worth the time to ask how far the model's own dtype is off.
    eager = numeric_gate.eager_logits(plan.config, recipe, weights.load, tokens)
    return result if eager is None else numeric_gate.judge(recipe, pairs, found, reference, eager, tokens)


def _fail(plan: Plan, weights: ModelWeights, result: numeric_gate.GateResult, progress: Progress, passes: Sequence[GraphPass]) -> None:
    """The gate failed: find the pass, and say all of it."""
    from .bisect import find_culprit

    with progress.stage("bisecting the passes"):
        culprit = find_culprit(plan, weights.load, select(plan.recipe.passes.skip, passes))
    engine, what = result.failures[0]
    more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
    why = f"pass {culprit.name!r} brings the error in: {culprit.detail}" if culprit.name else culprit.detail
    raise GateError(
        f"the numeric gate failed: engine {engine}: {what}{more}", why,
        "the old artifact is untouched; skip or mend the pass, or change gate.budgets if this loss is meant",
    )  # fmt: skip


def _judge_task(task: dict[str, Any]) -> None:
    if task["exact_match"] < task["required"]:
        wrong = task["wrong"][0]
        raise GateError(
            f"the task falls short: {task['exact_match']:.1%} of {task['items']} answers match, {task['required']:.1%} are required",
            f"for example {wrong['question']!r} got {wrong['given']!r}, not {wrong['answer']!r}",
            "use a more exact quantization scheme, or lower gate.task_exact_match if this loss is meant",
        )


def _reports(plan: Plan, gate_report: dict[str, Any]) -> dict[str, Any]:
    """What goes into the artifact: without times, which would make equal builds differ."""
    passes = []
    for engine, records in plan.records.items():
        for record in records:
            entry = asdict(record)
            del entry["time_ms"]
            entry["missed"] = entry["missed"][:20]
            entry["facts"] = {k: v for k, v in entry["facts"].items() if k not in ("inputs", "layers")}
            passes.append({"engine": engine, **entry})
    return {"passes": passes, "gate": gate_report}


def _provenance(root: Path, started: str, clock: _Clock, plan: Plan) -> None:
    """Times and host: beside the manifest, outside its digest."""
    times = {engine: {r.name: round(r.time_ms, 3) for r in records} for engine, records in plan.records.items()}
    facts = {
        "started": started, "host": platform.node(), "system": platform.platform(), "python": platform.python_version(),
        "stage_s": {k: round(v, 3) for k, v in clock.seconds.items()}, "pass_ms": times,
    }  # fmt: skip
    (root / "report" / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [f"{started} build of {plan.recipe.name}"]
    lines += [f"{seconds:8.2f} s  {name}" for name, seconds in clock.seconds.items()]
    (root / "report" / "build.log").write_text("\n".join(lines) + "\n")
