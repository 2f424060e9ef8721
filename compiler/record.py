"""What a build writes down about itself: the manifest's facts, the reports, and the provenance beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifacts.cuda_probe import architecture, probe_cuda
from ..artifacts.fingerprint import digest_file
from ..artifacts.kernel_plan import KernelPlan
from ..artifacts.manifest import SCHEMA_VERSION, EngineEntry, FileEntry, KVCache, Manifest, Model, Target
from ..artifacts.target import host_target
from ..runtime.weights import read_headers
from .assets import write_assets
from .cache.toolchain import compiler, versions
from .facts import BuildFacts
from .html.report import render_report, report_facts
from .traffic import step_bytes

# x86-64-v3, in /proc/cpuinfo's words.
_PORTABLE_ISA = ("ssse3", "sse4_1", "sse4_2", "popcnt", "bmi1", "bmi2", "avx", "avx2", "fma", "f16c", "abm", "movbe")


def draft_manifest(facts: BuildFacts, weights_digest: str) -> Manifest:
    """All that is known before compiling."""
    recipe, config, context = facts.recipe, facts.config, facts.first.context
    layers = facts.cache_layers
    host = host_target()
    parameters = sum(math.prod(weight.shape) for weight in facts.first.weights.values())
    model = Model(
        architecture=str((config.get("architectures") or [config["model_type"]])[0]), model_type=config["model_type"],
        vocab_size=facts.vocabulary, max_length=recipe.model.max_length, dtype=recipe.model.dtype,
        hidden_size=int(config.get("hidden_size") or config.get("n_embd") or 1), num_layers=len(layers),
        parameters=parameters,
    )  # fmt: skip
    isa = tuple(host.isa) if recipe.target.isa == "native" else _PORTABLE_ISA
    if recipe.target.device == "cuda":
        isa = (_capability(),)
    found = versions("torch", "transformers", "triton")
    target = Target(recipe.target.device, host.system, host.machine, isa, "none", found["torch"].split("+")[0])
    toolchain = {
        "ingot": __version__,
        "torch": found["torch"],
        "transformers": found["transformers"],
        "compiler": compiler()["version"],
    }
    if recipe.target.device == "cuda":
        toolchain = {**toolchain, "triton": found["triton"]}
    cache = KVCache(
        context["block_size"], context["num_blocks"], context["max_blocks"], facts.cache_dtype, layers
    )  # fmt: skip
    record = {**recipe.to_dict(), "weights_digest": weights_digest}
    return Manifest(
        SCHEMA_VERSION, recipe.name, __version__, model, target, toolchain, record, cache, (), (), [], {}, ()
    )


def _capability() -> str:
    """What kernels are compiled for on this GPU, such as sm_90a."""
    major, minor = probe_cuda().compute
    return architecture(10 * major + minor)


def planned_manifest(facts: BuildFacts, weights_digest: str, root: Path) -> Manifest:
    """The manifest of engines that are not compiled, with the assets in `root`: for running graphs eagerly."""
    manifest = draft_manifest(facts, weights_digest)
    write_assets(facts.config, facts.folder, root, manifest.model.vocab_size)
    engines = tuple(
        EngineEntry(s.name, "aoti", s.phase, s.batch, s.length, "", known.inputs, known.outputs, (), (), 0)
        for s in facts.recipe.engines()
        if (known := facts.engines[s.name])
    )
    return listed(root, replace(manifest, engines=engines))


def listed(root: Path, manifest: Manifest) -> Manifest:
    """The manifest with the files as they stand, for the child processes of the build itself.

    Native code is digested, since the loader asks for it; the rest is what this build has just written.
    """
    files = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        digest = digest_file(path) if name.startswith("engines/") else "0" * 64
        files.append(FileEntry(name, path.stat().st_size, digest))
    return replace(manifest, files=tuple(files))


def reports(facts: BuildFacts, gate_report: dict[str, Any]) -> dict[str, Any]:
    """What goes into the artifact: without times, which would make equal builds differ."""
    passes = []
    for engine, known in facts.engines.items():
        for record in known.records:
            entry = {key: value for key, value in record.items() if key != "time_ms"}
            entry["missed"] = entry["missed"][:20]
            entry["facts"] = {k: v for k, v in entry["facts"].items() if k not in ("inputs", "layers")}
            passes.append({"engine": engine, **entry})
    return {"passes": passes, "gate": gate_report}


def page(root: Path, manifest: Manifest, provenance: Mapping[str, Any], accuracy: Mapping[str, Any] | None) -> bytes:
    """report/report.html of a finished manifest. It tells times too, and so is not part of the digest."""
    headers = read_headers(root / path for path in manifest.weights)
    tensors = {name: (t.shape, t.dtype) for file in headers for name, t in file.tensors.items()}
    plans = [e for e in manifest.engines if e.kind == "plan"]
    facts = report_facts(
        manifest, provenance=provenance, accuracy=accuracy,
        traffic=step_bytes(manifest, tensors, [max(manifest.model.max_length // 2, 1)]),
        kernels={e.name: KernelPlan.from_json((root / e.file).read_bytes(), e.file).summary() for e in plans},
    )  # fmt: skip
    return render_report(facts).encode()
