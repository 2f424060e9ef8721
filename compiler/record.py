"""What a build writes down about itself: the manifest's facts, the reports, and the provenance beside them."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..artifacts.fingerprint import digest_file
from ..artifacts.manifest import SCHEMA_VERSION, EngineEntry, FileEntry, KVCache, Manifest, Model, Target
from ..artifacts.target import host_target
from .assets import write_assets
from .backends.aoti import input_buffers, output_buffers
from .model_weights import ModelWeights
from .plan import Plan

# x86-64-v3, in /proc/cpuinfo's words.
_PORTABLE_ISA = ("ssse3", "sse4_1", "sse4_2", "popcnt", "bmi1", "bmi2", "avx", "avx2", "fma", "f16c", "abm", "movbe")


def draft_manifest(plan: Plan, weights: ModelWeights) -> Manifest:
    """All that is known before compiling."""
    recipe, config = plan.recipe, plan.config
    graph = next(iter(plan.graphs.values()))
    context = next(iter(plan.contexts.values()))
    layers = plan.cache_layers
    host = host_target()
    parameters = sum(getattr(graph.gm, name).numel() for name in graph.weights.entries)
    model = Model(
        architecture=str((config.get("architectures") or [config["model_type"]])[0]), model_type=config["model_type"],
        vocab_size=plan.vocabulary, max_length=recipe.model.max_length, dtype=recipe.model.dtype,
        hidden_size=int(config.get("hidden_size") or config.get("n_embd") or 1), num_layers=len(layers),
        parameters=parameters,
    )  # fmt: skip
    isa = tuple(host.isa) if recipe.target.isa == "native" else _PORTABLE_ISA
    if recipe.target.device == "cuda":
        isa = (_capability(),)
    target = Target(recipe.target.device, host.system, host.machine, isa, "none", torch.__version__.split("+")[0])
    import transformers

    toolchain = {
        "ingot": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compiler": _compiler_version(),
    }
    if recipe.target.device == "cuda":
        toolchain = {**toolchain, "triton": importlib.metadata.version("triton")}
    cache = KVCache(context.block_size, context.num_blocks, context.max_blocks, recipe.model.dtype, layers)
    record = {**recipe.to_dict(), "weights_digest": weights.digest()}
    return Manifest(
        SCHEMA_VERSION, recipe.name, __version__, model, target, toolchain, record, cache, (), (), [], {}, ()
    )


def _capability() -> str:
    """What kernels are compiled for on this GPU, such as sm_90a."""
    from .backends.cuda.kernels import architecture

    major, minor = torch.cuda.get_device_capability()
    return architecture(10 * major + minor)


def planned_manifest(plan: Plan, weights: ModelWeights, root: Path) -> Manifest:
    """The manifest of a plan whose engines are not compiled, with the assets in `root`: for running graphs eagerly."""
    manifest = draft_manifest(plan, weights)
    write_assets(plan.config, plan.folder, root, manifest.model.vocab_size)
    engines = tuple(
        EngineEntry(s.name, "aoti", s.phase, s.batch, s.length, "", input_buffers(g), output_buffers(g), (), (), 0)
        for s in plan.recipe.engines()
        if (g := plan.graphs[s.name])
    )
    return listed(root, replace(manifest, engines=engines))


def _compiler_version() -> str:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return ""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.splitlines()[0] if done.stdout else ""


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


def reports(plan: Plan, gate_report: dict[str, Any]) -> dict[str, Any]:
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
