"""Measures one model on the CPU: the artifact, then ours and the peer in turn, repetition by repetition.

Turn and turn about means that a machine growing slower (heat, a neighbour) hits both sides alike, and a ratio is always
one of two runs next to each other. Every first run warms up and is dropped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts.errors import IngotError, ResourceError
from ..artifacts.manifest import Manifest
from ..compiler.recipe import Recipe
from ..compiler.traffic import step_bytes
from ..runtime.weights import map_weights
from . import llama_cpp_model, llama_cpp_peer, ours, transformers_peer
from .budget import Budget
from .builds import checkpoint_bytes, ensure_artifact, newer_sources, open_recipe
from .children import Worker, run, tail
from .results import OURS, Model
from .subjects import Subject

Say = Callable[[str], None]
PARTS = ("speed", "start", "peers")
SHORT_CONTEXT = 16  # up to here the depth is not named in a test of the CPU
SHORTEST_S = 0.25  # a sample is the mean over as many runs as this takes: a tiny model's single run is all jitter


@dataclass(frozen=True)
class Options:
    """How to measure. `stories` is the folder of stories260K if there is one, `peers` the names of peers to run.

    On a GPU also: `parts` to measure, `tests` to run by name (none: all), batches to measure peers at (none: all there
    are), the folder of gpt-fast, whether builds start `cold`, and the time there is.
    """

    artifacts: Path
    stories: Path | None
    peers: tuple[str, ...]
    repetitions: int
    rebuild: bool = False
    parts: tuple[str, ...] = PARTS
    tests: tuple[str, ...] = ()
    peer_batches: tuple[int, ...] = ()
    gpt_fast: Path | None = None
    cold: bool = True
    budget: Budget = field(default_factory=Budget)
    llama_cpp: Path | None = None


@dataclass(frozen=True)
class Contender:
    """One side: how it is called in the results, its worker, and how many tokens its tests have."""

    engine: str
    op: str  # how the worker calls its way to decode
    worker: Worker
    generate: int
    prefill: int


def begin(subject: Subject) -> Model:
    """The empty result of a subject, with its goals."""
    settings, goals = list(subject.settings), list(subject.goals)
    return Model(subject.name, f"recipes/{subject.recipe}", settings, subject.device, goals=goals)


def measure(subject: Subject, model: Model, options: Options, say: Say) -> None:
    """Fill `model` with everything that can be measured of it.

    What goes wrong with ours ends the model and is recorded as `failed`; what goes wrong with a peer becomes a note.
    """
    if subject.stories and options.stories is None:
        model.skipped = "its checkpoint is not in the repository: give its folder with --stories DIR"
        return
    try:
        recipe = open_recipe(subject, options.stories)
        folder = options.artifacts / subject.folder
        manifest, model.build = ensure_artifact(subject, recipe, folder, options.rebuild)
        if newer_sources(folder):
            model.notes.append("the compiler's sources are newer than the artifact: --rebuild measures what they make")
        describe(subject, model, recipe, manifest, folder)
        compare_speed(subject, model, recipe, manifest, options, say)
        compare_start(subject, model, recipe, manifest, options, say)
    except IngotError as error:
        model.failed = str(error)


def describe(subject: Subject, model: Model, recipe: Recipe, manifest: Manifest, folder: Path) -> None:
    """What is known of an artifact without running it."""
    model.dtype, model.scheme = manifest.model.dtype, "+".join(recipe.quantization.schemes)
    model.parameters = manifest.model.parameters
    model.checkpoint_bytes = checkpoint_bytes(recipe, manifest)
    model.artifact_bytes = sum(entry.size for entry in manifest.files)
    model.weights_bytes = sum(entry.size for entry in manifest.files if entry.path in manifest.weights)
    tensors = {n: (t.shape, t.dtype) for n, t in map_weights(folder / path for path in manifest.weights).items()}
    # The first token comes from the prefill; step i then sees the prompt, i tokens before it, and its own.
    context, generate = subject.decoding
    contexts = range(context + 1, context + generate + 1)
    model.traffic = step_bytes(manifest, tensors, contexts)


def compare_speed(
    subject: Subject, model: Model, recipe: Recipe, manifest: Manifest, options: Options, say: Say
) -> None:
    """Decode and prefill rates, ours and the peer's in turn."""
    with ExitStack() as stack:
        folder = options.artifacts / subject.folder
        mine = stack.enter_context(Worker(ours.__name__, str(folder)))
        sides = [Contender(OURS, "decode", mine, subject.generate, subject.prefill)]
        if "transformers" in options.peers:
            peer = stack.enter_context(Worker(transformers_peer.__name__, str(peer_source(recipe)), recipe.model.dtype))
            sizes = (subject.peer_generate, subject.peer_prefill)
            sides += [Contender(transformers_peer.LOOP, "decode", peer, *sizes)]
            sides += [Contender(transformers_peer.GENERATE, "generate", peer, *sizes)]
        if llama_cpp_peer.NAME in options.peers and subject.gguf:
            try:
                file, extra = gguf_file(subject, recipe, options, say)
                longest = str(manifest.model.max_length)
                peer = stack.enter_context(Worker(llama_cpp_peer.__name__, str(file), longest, extra=extra))
                sides += [Contender(llama_cpp_peer.NAME, "decode", peer, subject.generate, subject.prefill)]
            except ResourceError as error:
                model.notes.append(f"{llama_cpp_peer.NAME}: {error}")
        greedy: dict[str, list[int]] = {}
        for repetition in range(options.repetitions + 1):
            say(f"{subject.name}: speed {repetition}/{options.repetitions}")
            for side in list(sides):
                try:
                    greedy[side.engine] = one_round(side, subject, model, manifest, warm_up=repetition == 0)
                except ResourceError as error:
                    if side.engine == OURS:
                        raise
                    model.notes.append(f"{side.engine}: {error}")
                    sides.remove(side)
        if recipe.model.source == "local" and recipe.model.dtype == "float32":
            model.notes += agreement(greedy)


def one_round(side: Contender, subject: Subject, model: Model, manifest: Manifest, warm_up: bool) -> list[int]:
    """One decode and one prefill run of a side; returns the tokens decoded."""
    vocab, longest = manifest.model.vocab_size, manifest.model.max_length
    chunk = max(e.length for e in manifest.engines if e.phase == "prefill")
    context = min(subject.context, longest - 2)
    tokens = min(side.generate, longest - context - 1)
    decode = {"op": side.op, "prompt": prompt_ids(context, vocab), "tokens": tokens}
    seconds, produced = sample(side.worker, decode, 0.0 if warm_up else SHORTEST_S)
    length = prefill_length(side.prefill, longest, chunk)
    if not warm_up:
        # What a peer reads is another matter: it may hold the weights in another precision.
        read = model.traffic.total if side.engine == OURS else 0
        test = f"tg{tokens}" + (f" @ d{context}" if context > SHORT_CONTEXT else "")
        model.open_series(side.engine, test, "tok/s", 1, read).add(tokens / seconds)
    if side.op == "decode":  # a peer's second way to decode has no prefill of its own
        prefill = {"op": "prefill", "prompt": prompt_ids(length, vocab)}
        seconds, _ = sample(side.worker, prefill, 0.0 if warm_up else SHORTEST_S)
        if not warm_up:
            model.open_series(side.engine, f"pp{length}", "tok/s", length).add(length / seconds)
    return produced


def sample(
    worker: Worker, request: dict[str, Any], shortest: float, timeout: float = 1800.0
) -> tuple[float, list[int]]:
    """Repeat a request for at least `shortest` seconds of its own time: mean seconds of a run, and its tokens.

    Raises:
        ResourceError: see `Worker.ask`.
    """
    total, runs = 0.0, 0
    while True:
        answer = worker.ask(request, timeout)
        total, runs = total + answer["seconds"], runs + 1
        if total >= shortest:
            return total / runs, list(answer.get("token_ids", ()))


def compare_start(
    subject: Subject, model: Model, recipe: Recipe, manifest: Manifest, options: Options, say: Say
) -> None:
    """Process start to first token in fresh processes, ours and the peer's in turn, and their peak memory."""
    has_tokenizer = any(entry.path == "tokenizer.json" for entry in manifest.files)
    given: Any = subject.prompt if has_tokenizer else prompt_ids(subject.context, manifest.model.vocab_size)
    prompt = json.dumps(given)
    commands = {OURS: [ours.START, str(options.artifacts / subject.folder), prompt]}
    source = peer_source(recipe)
    if "transformers" in options.peers:
        if source.is_dir():
            commands[transformers_peer.GENERATE] = [transformers_peer.START, str(source), prompt, recipe.model.dtype]
        else:
            model.notes.append("transformers: no start-up time, since its random weights are not on disk")
    for repetition in range(options.repetitions + 1):
        say(f"{subject.name}: start {repetition}/{options.repetitions}")
        for engine, command in list(commands.items()):
            try:
                seconds, peak = start_once(engine, command)
            except ResourceError as error:
                if engine == OURS:
                    raise
                model.notes.append(f"{engine}: {error}")
                del commands[engine]
                continue
            if repetition:  # the first run fills the page cache
                model.open_series(engine, "start", "s").add(seconds)
                model.open_series(engine, "peak", "bytes").add(peak)


def start_once(engine: str, program: list[str], device: str = "cpu", timeout: float | None = None) -> tuple[float, int]:
    """Seconds from process start to first token, and the process's peak memory in bytes.

    Raises:
        ResourceError: it failed, or took longer than `timeout` seconds.
    """
    done = run([sys.executable, "-c", *program], device=device, timeout=timeout)
    if done.code:
        why = f"it was given up after {done.seconds:.0f} s" if done.timed_out else f"exit code {done.code}"
        raise ResourceError(f"{engine} did not start", f"{why}: {tail(done.stderr)}", "")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["first_token"] - done.started, int(answer["peak"])


def gguf_file(subject: Subject, recipe: Recipe, options: Options, say: Say) -> tuple[Path, dict[str, str]]:
    """The file that llama.cpp reads, random weights in the subject's shape, and the environment that has llama.cpp.

    Raises:
        ResourceError: llama-cpp-python or gguf is not installed, or the file cannot be made.
    """
    places = [str(options.llama_cpp), os.environ.get("PYTHONPATH", "")] if options.llama_cpp else []
    extra = {"PYTHONPATH": os.pathsep.join(p for p in places if p)} if places else {}
    done = run([sys.executable, "-c", "import gguf, llama_cpp"], extra=extra)
    if done.code:
        fix = "pip install --target DIR llama-cpp-python gguf, and --llama-cpp DIR"
        raise ResourceError("it is not installed, and was left out", tail(done.stderr, 200), fix)
    file = options.artifacts / f"{subject.name}.{subject.gguf}.gguf"
    if not file.is_file():
        say(f"{subject.name}: writing {file.name}")
        command = [sys.executable, "-m", llama_cpp_model.__name__, str(recipe.config_path()), subject.gguf, str(file)]
        done = run(command, extra=extra)
        if done.code:
            raise ResourceError(f"{file.name} could not be made", tail(done.stderr), "")
    return file, extra


def peer_source(recipe: Recipe) -> Path:
    """What the peer loads: the checkpoint's folder, or the config that random weights are made for."""
    return recipe.model_path() if recipe.model.source == "local" else recipe.config_path()


def prompt_ids(length: int, vocab_size: int, row: int = 0) -> list[int]:
    """A prompt of token ids, the same for everybody: varied, and without the special tokens at the start.

    `row` gives prompts that differ from their first token on.
    """
    low = min(3, vocab_size - 1)
    return [low + (7919 * (i + 131 * row) + 17) % (vocab_size - low) for i in range(length)]


def prefill_length(wanted: int, max_length: int, chunk: int) -> int:
    """The longest prompt up to `wanted` tokens that leaves room for an answer, in whole chunks if one fits."""
    most = min(wanted, max_length - 1)
    return most - most % chunk if most > chunk else most


def agreement(greedy: dict[str, list[int]]) -> Iterator[str]:
    """How far the peers' greedy tokens agree with ours: a check that both sides did the same work."""
    mine = greedy.get(OURS, [])
    for engine, theirs in greedy.items():
        if engine != OURS and theirs:
            both = min(len(mine), len(theirs))
            same = next((i for i in range(both) if mine[i] != theirs[i]), both)
            yield f"greedy tokens equal to those of {engine}: {same} of {both}"
