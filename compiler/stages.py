"""The stages of a build between recipe and artifact, each looked up in the build cache before it is made.

Every stage says what its result depends on (its key), how it is made, and which files it writes. Heavy modules are
imported only where a stage is made: a build that finds everything imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.fingerprint import digest_files
from ..artifacts.manifest import EngineEntry, Manifest
from .backends.commands import ENGINE_TIMEOUT_S
from .cache import toolchain
from .cache.entry import Key
from .cache.inputs import Inputs
from .cache.keys import recipe_slice
from .cache.session import Session
from .console import Progress
from .engines import compile_cpu, compile_cuda, cpu_entry, cuda_entry
from .facts import BuildFacts, EngineFacts
from .lean_child import ask_child
from .recipe import Recipe

if TYPE_CHECKING:
    from .workshop import Workshop


@dataclass(frozen=True)
class Engines:
    """What was compiled.

    Attributes:
        host_library: who hosts the engines' tensors on the CPU: the artifact's own kernels ("none"), or libtorch.
        tuning: kernel configurations chosen by measuring, for the manifest.
    """

    entries: tuple[EngineEntry, ...]
    host_library: str = "none"
    tuning: dict[str, Any] = field(default_factory=dict)


class Stages:
    """The stages of one build.

    Args:
        source: the model's folder, or the config that random weights are made for.
        workshop: makes graphs and weights, when a stage is not in the cache.
        retrace: make the trace anew whatever the cache holds: its graphs are to be dumped.
        tuning: a file of measured kernel configurations to replay and add to; None for the user's own.
        engine_timeout: seconds that the C++ compiler may take for one engine, or one file of the kernels.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Path,
        session: Session,
        workshop: Callable[[], Workshop],
        progress: Progress,
        retrace: bool = False,
        tuning: Path | None = None,
        engine_timeout: float = ENGINE_TIMEOUT_S,
    ) -> None:
        self.recipe, self.session, self.workshop, self.progress = recipe, session, workshop, progress
        self.folder = None if recipe.model.source == "random" else source
        self._source, self._retrace, self._tuning = source, retrace, tuning
        self._timeout = engine_timeout
        self._weights_key: Key | None = None

    @functools.cached_property
    def inputs(self) -> Inputs:
        """Digests of the model's files; reads them all."""
        return Inputs(self.recipe, self._source)

    def trace(self) -> BuildFacts:
        """Every engine's graph, traced and rewritten; what is known of it."""
        shapes, found = self.recipe.engines(), {}
        with self.progress.stage("trace and passes", total=len(shapes)):
            for shape in shapes:
                self.progress.update(shape.name)
                key = None
                if not self._retrace:
                    size = [shape.phase, shape.batch, shape.length]
                    fields = {"shape": size, "config": self.inputs.config, "held": self.inputs.held}
                    key = self._key("trace", shape.name, fields, "torch", "transformers")
                make = functools.partial(self._facts, shape.name)
                value = self.session.run(key, make, name=("trace", shape.name))
                found[shape.name] = EngineFacts.from_json(value)
                self.progress.update(shape.name, advance=1)
        return BuildFacts(self.recipe, self.folder, found)

    def weights(self, facts: BuildFacts, root: Path) -> dict[str, Any]:
        """The weights of all engines in `root`/weights: their files' names, and the checkpoint's digest."""
        folder = root / "weights"
        union = {name: weight for known in facts.engines.values() for name, weight in known.weights.items()}
        key = None
        if all(weight.expression for weight in union.values()):
            lines = [f"{n} {w.dtype} {list(w.shape)} {w.expression}" for n, w in sorted(union.items())]
            fields = {
                "expressions": _digest(lines), "checkpoint": self.inputs.checkpoint, "config": self.inputs.config,
            }  # fmt: skip
            key = self._key("weights", "", fields, "torch", "transformers", "numpy", "safetensors")
        else:
            self.progress.log("the weights are made anew: an expression over them has no description in words")

        def make() -> dict[str, Any]:
            shop = self.workshop()
            return {"files": shop.write_weights(folder), "checkpoint": shop.weights.digest()}

        with self.progress.stage("weights"):
            value: dict[str, Any] = self.session.run(
                key, make, lambda value: {name: folder / name for name in value["files"]}, share=True,
                name=("weights", ""),
            )  # fmt: skip
        self._weights_key = key
        return value

    def engines(self, facts: BuildFacts, root: Path) -> Engines:
        """Every engine compiled into `root`/engines.

        Raises:
            ResourceError: the compiler failed, or what it needs is missing. UnsupportedModelError: an op has no kernel.
        """
        shapes = self.recipe.engines()
        with self.progress.stage("compile engines", total=len(shapes) + 1):
            return (self._cuda if self.recipe.target.device == "cuda" else self._cpu)(facts, root)

    def gate(self, facts: BuildFacts, root: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The numeric gate's report; `make` runs the gate and raises where it fails."""
        key = self._judging("gate", root, {"config": self.inputs.config, "checkpoint": self.inputs.checkpoint})
        with self.progress.stage("numeric gate"):
            report: dict[str, Any] = self.session.run(key, make, name=("gate", ""))
        return report

    def accuracy(self, root: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The accuracy report; `make` measures it and raises where too much is lost."""
        fields = {"config": self.inputs.config, "checkpoint": self.inputs.checkpoint, "words": self.inputs.accuracy}
        key = self._judging("accuracy", root, fields)
        with self.progress.stage("accuracy"):
            report: dict[str, Any] = self.session.run(key, make, name=("accuracy", ""))
        return report

    def task(self, facts: BuildFacts, root: Path, manifest: Callable[[], Manifest]) -> dict[str, Any]:
        """The finished engines' answers to the recipe's task, and the model's own where the build is lossy."""

        def make() -> dict[str, Any]:
            from .task import run_task

            return run_task(facts, root, manifest(), self.workshop().weights.load if facts.lossy else None)

        fields = {"config": self.inputs.config, "checkpoint": self.inputs.checkpoint, "task": self.inputs.task}
        key = self._judging("task", root, fields)
        with self.progress.stage("task"):
            result: dict[str, Any] = self.session.run(key, make, name=("task", ""))
        return result

    def speed(self, root: Path, manifest: Callable[[], Manifest]) -> dict[str, Any]:
        """Tokens/s of one chunk of a prompt and of decoding: one look, on a machine that was just busy."""
        room = max(self.recipe.model.max_length - 1, 1)
        sizes = {"prompt": min(max(self.recipe.shapes.prefill_lengths), room), "tokens": max(1, min(32, room - 16))}

        def make() -> dict[str, Any]:
            drafted = manifest()
            asked = {"vocabulary": drafted.model.vocab_size, **sizes}
            return {**sizes, **ask_child("ingot.runtime.speed", asked, root, drafted)}

        key = self._judging("speed", root, sizes)
        with self.progress.stage("speed"):
            result: dict[str, Any] = self.session.run(key, make, name=("speed", ""))
        return result

    def _facts(self, name: str) -> dict[str, Any]:
        return self.workshop().facts(name).to_json()

    def _cpu(self, facts: BuildFacts, root: Path) -> Engines:
        folder = root / "engines"
        self.progress.update("kernels")
        self._kernels(folder, with_shim=True)
        entries, missing = [], set()
        for shape in self.recipe.engines():
            self.progress.update(shape.name, advance=1)
            known = facts.engines[shape.name]
            compiled = self.session.run(
                self._engine_key(shape.name, {shape.name: known}),
                functools.partial(self._compile, shape.name, facts, folder),
                {f"{shape.name}.so": folder / f"{shape.name}.so"},
                name=("engine", shape.name),
            )
            entries.append(cpu_entry(shape, known, compiled))
            missing.update(compiled["missing"])
        if missing:
            self.progress.log(f"engines need libtorch at run time for {', '.join(sorted(missing)[:5])}")
            (folder / "kernels.so").unlink()
            self._kernels(folder, with_shim=False)
        return Engines(tuple(entries), "libtorch" if missing else "none")

    def _compile(self, name: str, facts: BuildFacts, folder: Path) -> dict[str, Any]:
        return compile_cpu(self._graph(name, facts), name, folder, self.recipe.target.isa, self._timeout)

    def _kernels(self, folder: Path, with_shim: bool) -> None:
        def make() -> dict[str, Any]:
            from .backends import cpu_kernels

            isa, timeout = self.recipe.target.isa, self._timeout
            cpu_kernels.compile_kernels(folder / "kernels.so", isa=isa, with_shim=with_shim, timeout=timeout)
            return {}

        key = self._key("kernels", "", {"with_shim": with_shim, **self._host})
        self.session.run(key, make, {"kernels.so": folder / "kernels.so"})

    def _cuda(self, facts: BuildFacts, root: Path) -> Engines:
        """All engines at once: they share kernels and one arena."""

        def make() -> dict[str, Any]:
            for name in facts.engines:
                self._graph(name, facts)
            return compile_cuda(self.workshop().plan(), root, self.progress, self._tuning)

        def files(value: dict[str, Any]) -> dict[str, Path]:
            paths = [f"engines/{name}.plan.json" for name in value["engines"]]
            paths += sorted({path for engine in value["engines"].values() for path in engine["libraries"]})
            for path in paths:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
            return {Path(path).name: root / path for path in paths}

        key = self._engine_key("all", facts.engines)
        value = self.session.run(key, make, files, name=("engine", "all"))
        entries = [cuda_entry(s, facts.engines[s.name], value["engines"][s.name]) for s in self.recipe.engines()]
        return Engines(tuple(entries), tuning=value["tuning"])

    def _engine_key(self, item: str, engines: dict[str, EngineFacts]) -> Key | None:
        if not all(known.graph for known in engines.values()):
            self.progress.log(f"{item} is compiled anew: its graph calls functions that its text does not tell")
            return None
        fields: dict[str, Any] = {"graph": {name: known.graph for name, known in engines.items()}, **self._host}
        packages = ["torch"]
        if self.recipe.target.device == "cuda":
            packages.append("triton")
            fields["gpu"] = toolchain.gpu()
            if self._tuning is not None:
                fields["tuning"] = _digest([self._tuning.read_text("utf-8")]) if self._tuning.is_file() else ""
        return self._key("engine", item, fields, *packages)

    def _graph(self, name: str, facts: BuildFacts) -> Any:
        """An engine's graph, which is the one that `facts` tell of."""
        from .workshop import graph_digest

        traced = self.workshop().plan([name]).graphs[name]
        if graph_digest(traced) != facts.engines[name].graph:
            raise ValueError(f"{name} was traced twice, and the graphs differ")
        return traced

    @functools.cached_property
    def _host(self) -> dict[str, Any]:
        """What decides native code besides its source."""
        native = self.recipe.target.device == "cpu" and self.recipe.target.isa == "native"
        return {"compiler": toolchain.compiler(), "processor": toolchain.processor() if native else {}}

    def _judging(self, stage: str, root: Path, fields: dict[str, Any]) -> Key | None:
        """The key of a stage that runs the engines."""
        if self._weights_key is None or self.session.store is None:
            return None
        engines = digest_files(path for path in (root / "engines").rglob("*") if path.is_file())
        told = {path.relative_to(root).as_posix(): digest for path, digest in sorted(engines.items())}
        fields = {**fields, "engines": told, "weights": self._weights_key.digest(), "text": self.inputs.text}
        where = toolchain.gpu() if self.recipe.target.device == "cuda" else toolchain.processor()
        return self._key(
            stage, "", {**fields, "machine": where}, "torch", "transformers", "numpy", "tokenizers", "jinja2"
        )

    def _key(self, stage: str, item: str, fields: dict[str, Any], *packages: str) -> Key | None:
        if self.session.store is None:
            return None
        tools = toolchain.versions(*packages)
        code = toolchain.code_digest(stage)
        return Key(stage, item, {**fields, "recipe": recipe_slice(self.recipe, stage), "tools": tools, "code": code})


def _digest(lines: list[str]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
