"""Measures one model on a GPU: the artifact, then ours, starts, and each peer, one process on the device at a time.

Taking turns, as on the CPU, would need room for all sides on the device at once. Every first run warms up and is
dropped. What fails is noted and the rest goes on; past the time there is, nothing new is begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifacts.errors import IngotError, ResourceError
from ..artifacts.manifest import Manifest
from ..compiler.recipe import Recipe
from ..compiler.traffic import Facts, prefill_flops, step_bytes
from ..runtime.weights import read_headers
from . import gpt_fast_peer, ours, transformers_gpu_peer
from .budget import OutOfTime
from .builds import ensure_artifact, newer_sources, open_recipe
from .children import Worker
from .results import OURS, Model
from .run import SHORTEST_S, Options, Say, describe, peer_source, prompt_ids, sample, start_once
from .subjects import Subject
from .workload import Workload

_LEAST_S = 10.0  # an answer that is under way may take so long past the end
_GPT_FAST = "gpt-fast"
_INT8 = "W8A16"


@dataclass(frozen=True)
class Job:
    """One test of one engine: what its worker is asked, and what the test has to read and compute."""

    engine: str
    load: Workload
    request: dict[str, Any]
    per_step: int
    read_bytes: int = 0
    flops: int = 0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.engine} {self.load.name}"

    def rate(self, seconds: float) -> float:
        """Tokens per second of one run."""
        return self.load.tokens * self.load.batch / seconds


def measure_gpu(subject: Subject, model: Model, options: Options, say: Say) -> None:
    """Fill `model` with everything that can be measured of it; a `model` of an earlier run is completed.

    What goes wrong with ours is recorded as `failed`; what goes wrong with a peer becomes a note.
    """
    model.failed, model.notes, folder = "", [], options.artifacts / subject.folder
    try:
        recipe = open_recipe(subject, None)
        left = options.budget.require(f"{subject.name}")
        say(f"{subject.name}: artifact")
        manifest, model.build = ensure_artifact(subject, recipe, folder, options.rebuild, options.cold, left)
        if not model.build.reused:
            say(f"{subject.name}: built in {model.build.seconds:.1f} s")
            model.series = [s for s in model.series if s.engine != OURS]  # those of another artifact
        if newer_sources(folder):
            model.notes.append("the compiler's sources are newer than the artifact: --rebuild measures what they make")
        describe(subject, model, recipe, manifest, folder)
        jobs = own_jobs(subject, model, recipe, manifest, folder, options)
    except OutOfTime as error:
        model.notes.append(error.what)
        return
    except IngotError as error:
        model.failed = str(error)
        return
    try:
        if "speed" in options.parts:
            failed = run_jobs(model, jobs, lambda: Worker(ours.__name__, str(folder), device="cuda"), options, say)
            model.failed = failed or model.failed
        if "start" in options.parts:
            measure_start(subject, model, manifest, folder, options, say)
        if "peers" in options.parts:
            for peer_jobs, worker in peers(jobs, recipe, options, model.notes):
                run_jobs(model, peer_jobs, worker, options, say)
    except OutOfTime as error:
        model.notes.append(error.what)
    except ResourceError as error:
        model.failed = str(error)


def own_jobs(
    subject: Subject, model: Model, recipe: Recipe, manifest: Manifest, folder: Path, options: Options
) -> list[Job]:
    """Ours, for every workload that was asked for and that the artifact is long enough for."""
    headers = read_headers(folder / path for path in manifest.weights)
    tensors: dict[str, Facts] = {n: (t.shape, t.dtype) for f in headers for n, t in f.tensors.items()}
    heads, vocab, jobs = query_heads(recipe), manifest.model.vocab_size, []
    batches = {e.batch for e in manifest.engines if e.phase == "decode"}
    for load in subject.workloads:
        if options.tests and load.name not in options.tests:
            continue
        if load.length > manifest.model.max_length or (load.phase == "decode" and load.batch not in batches):
            model.notes.append(f"{load.name}: not measured, the artifact was built without it")
        elif load.phase == "decode":
            contexts = range(load.context + 1, load.context + load.tokens + 1)
            need = step_bytes(manifest, tensors, contexts, load.batch).total
            prompts = [prompt_ids(load.context, vocab, row) for row in range(load.batch)]
            way = {"op": "batch", "prompts": prompts} if load.batch > 1 else {"op": "decode", "prompt": prompts[0]}
            jobs.append(Job(OURS, load, {**way, "tokens": load.tokens}, load.batch, need))
        else:
            need = prefill_flops(manifest, tensors, load.tokens, heads)
            way = {"op": "prefill", "prompt": prompt_ids(load.tokens, vocab)}
            jobs.append(Job(OURS, load, way, load.tokens, flops=need))
    return jobs


def query_heads(recipe: Recipe) -> int:
    """How many query heads the model has, from its config."""
    source = peer_source(recipe)
    config = json.loads((source / "config.json" if source.is_dir() else source).read_text("utf-8"))
    return int(config.get("text_config", config)["num_attention_heads"])


def run_jobs(model: Model, jobs: Sequence[Job], make: Callable[[], Worker], options: Options, say: Say) -> str:
    """Run jobs on one worker, which is started anew after a failure; returns the first failure, empty if none.

    Raises:
        OutOfTime: there is no time to begin the next one.
    """
    first = ""
    with ExitStack() as stack:
        worker: Worker | None = None
        for job in jobs:
            if done(model, job, options.repetitions):
                continue
            options.budget.require(f"{job.name} and what follows")
            try:
                worker = worker or stack.enter_context(make())
                run_job(model, job, worker, options, say)
            except ResourceError as error:
                say(f"{model.name}: {job.name}: {error}")
                model.notes.append(f"{job.name}: {error}")
                first = first or f"{job.name}: {error}"
                stack.close()
                worker = None
    return first


def done(model: Model, job: Job, repetitions: int) -> bool:
    """Whether an earlier run has this test in full; what it has of it in part is dropped."""
    series = model.find(job.engine, job.load.name, job.load.name)
    if series is None:
        return False
    if len(series.samples) >= repetitions:
        return True
    model.series.remove(series)
    return False


def run_job(model: Model, job: Job, worker: Worker, options: Options, say: Say) -> None:
    """Warm up, then take the samples, or as many as there is time for."""
    for repetition in range(options.repetitions + 1):
        if repetition > 1 and options.budget.left <= 0:
            model.notes.append(f"{job.name}: {repetition - 1} of {options.repetitions} repetitions")
            return
        limit = max(options.budget.left, _LEAST_S)
        seconds, _ = sample(worker, job.request, SHORTEST_S if repetition else 0.0, limit)
        rate = job.rate(seconds)
        say(f"{model.name}: {job.name}: {'warm-up' if repetition == 0 else repetition}: {rate:.1f} tok/s")
        if repetition:
            needs = (job.per_step, job.read_bytes, job.flops)
            model.open_series(job.engine, job.load.name, "tok/s", *needs).add(rate)


def measure_start(subject: Subject, model: Model, manifest: Manifest, folder: Path, options: Options, say: Say) -> None:
    """Process start to first token in fresh processes, and their peak memory."""
    prompt = json.dumps(prompt_ids(subject.context, manifest.model.vocab_size))
    series = model.find(OURS, "start")
    if series is not None and len(series.samples) >= options.repetitions:
        return
    model.series = [s for s in model.series if s.test not in ("start", "peak")]
    for repetition in range(options.repetitions + 1):  # the first run fills the page cache
        left = options.budget.require(f"start {repetition}")
        limit = max(left, _LEAST_S)
        seconds, peak = start_once(OURS, [ours.START, str(folder), prompt], "cuda", limit)
        say(f"{subject.name}: start {repetition}/{options.repetitions}: {seconds:.3f} s")
        if repetition:
            model.open_series(OURS, "start", "s").add(seconds)
            model.open_series(OURS, "peak", "bytes").add(peak)


def peers(
    jobs: Sequence[Job], recipe: Recipe, options: Options, notes: list[str]
) -> list[tuple[list[Job], Callable[[], Worker]]]:
    """The jobs of each peer, and how its worker is started."""
    found: list[tuple[list[Job], Callable[[], Worker]]] = []
    asked = [j for j in jobs if j.load.peers and j.load.batch in (options.peer_batches or (j.load.batch,))]
    quantized = recipe.quantization.schemes
    # gpt-fast has int8 weights with a scale per row as well; of all else, peers hold the weights in full.
    alike = asked if quantized in ((), (_INT8,)) else [replace(j, read_bytes=0) for j in asked]
    if quantized:
        asked = [replace(j, read_bytes=0) for j in asked]
    source = peer_source(recipe)
    config = source / "config.json" if source.is_dir() else source
    if _GPT_FAST in options.peers and options.gpt_fast is not None:
        # What its authors publish, and what the goals compare with, is one row.
        single = [j for j in alike if j.load.phase == "decode" and j.load.batch == 1]
        if why := gpt_fast_peer.refusal(config):
            notes.append(f"{_GPT_FAST}: {why}")
        elif single:
            arguments = (str(options.gpt_fast), str(config), "cuda", "int8" if quantized == (_INT8,) else "")
            found.append((
                [_peer_job(j, _GPT_FAST, "decode") for j in single],
                lambda: Worker(gpt_fast_peer.__name__, *arguments, device="cuda"),
            ))  # fmt: skip
    if "transformers" in options.peers:
        compiled, eager = transformers_gpu_peer.COMPILED, transformers_gpu_peer.EAGER
        theirs = [_peer_job(j, eager, "prefill") for j in asked if j.load.phase == "prefill"]
        theirs += [_peer_job(j, compiled, "decode") for j in asked if j.load.phase == "decode"]
        theirs += [_peer_job(j, compiled, "compiled prefill") for j in asked if j.load.phase == "prefill"]
        dtype = recipe.model.dtype
        found.append((theirs, lambda: Worker(transformers_gpu_peer.__name__, str(config), dtype, device="cuda")))
    return found


def _peer_job(job: Job, engine: str, op: str) -> Job:
    """The same test for a peer, which makes its own prompts."""
    load = job.load
    request = {"op": op, "batch": load.batch, "context": load.context, "tokens": load.tokens}
    return Job(engine, load, request, job.per_step, job.read_bytes, job.flops)
