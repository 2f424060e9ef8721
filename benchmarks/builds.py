"""Gets a subject's artifact: builds it in a child process unless a fit one is there, and keeps what the build took.

The figures are kept beside the artifact (NAME.build.json) with the manifest's digest, so that a later run that reuses
the artifact can still show them, and never shows those of another build.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from .. import __version__
from ..artifacts import strict
from ..artifacts.errors import IngotError, ResourceError, UsageError, VerificationError
from ..artifacts.manifest import FILE_NAME, Manifest, load_manifest
from ..compiler.recipe import Recipe, load_recipe
from . import children
from .machine import ROOT
from .results import Build
from .subjects import Subject

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


def open_recipe(subject: Subject, stories: Path | None) -> Recipe:
    """The subject's recipe with its settings.

    Raises:
        UsageError: the recipe or the model's folder is wrong.
    """
    return load_recipe(ROOT / "recipes" / subject.recipe, subject.settings, str(stories) if subject.stories else None)


def ensure_artifact(
    subject: Subject, recipe: Recipe, folder: Path, rebuild: bool, cold: bool = True, timeout: float | None = None
) -> tuple[Manifest, Build]:
    """The manifest of a present artifact of this recipe in `folder`, and what its build took.

    Args:
        cold: build without what earlier builds have cached. timeout: seconds after which a build is given up.

    Raises:
        ResourceError: the build failed; its message is passed on.
    """
    reason = "asked for" if rebuild else stale(recipe, folder)
    if not reason:
        manifest = load_manifest(folder)
        return manifest, _kept(folder, manifest)
    print(f"{subject.name}: building ({reason})", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "ingot.compiler.cli", "build", str(recipe.file), "-o", str(folder), "--no-cache"]
    command += ["--force", "--json"]
    command += [word for setting in subject.settings for word in ("--set", setting)]
    if recipe.model_folder is not None:
        command += ["--model", str(recipe.model_folder)]
    with tempfile.TemporaryDirectory(prefix="ingot-bench-") as empty:
        # Without the caches of earlier builds (the compiler's, Triton's, the tuner's) every build is a cold one.
        caches = {name: f"{empty}/{name}" for name in _CACHES} if cold else {}
        done = children.run(command, extra=caches, watch_memory=True, device=subject.device, timeout=timeout)
    if done.code:
        why = f"it was given up after {done.seconds:.0f} s" if done.timed_out else f"exit code {done.code}"
        raise ResourceError(f"building {subject.name} failed: {why}", children.tail(done.stderr, 2000), "")
    stages = {str(k): float(v) for k, v in json.loads(done.stdout).get("stage_seconds", {}).items()}
    build = Build(done.seconds, done.peak_bytes, done.largest_process_bytes, False, stages, cold)
    manifest = load_manifest(folder)
    kept = {"manifest": manifest.digest(), **{k: getattr(build, k) for k in ("seconds", "peak_bytes")}}
    kept |= {"largest_process_bytes": build.largest_process_bytes, "cold": cold, "stages": stages}
    _record(folder).write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    return manifest, build


def stale(recipe: Recipe, folder: Path) -> str:
    """Why the artifact in `folder` cannot stand for this recipe; empty when it can.

    What the recipe says counts, not when its file was written: a copied tree is all new.
    """
    if not (folder / FILE_NAME).is_file():
        return "there is no artifact yet"
    try:
        manifest = load_manifest(folder)
    except IngotError as error:
        return error.what
    built = {key: value for key, value in manifest.recipe.items() if key != "weights_digest"}
    if built != json.loads(json.dumps(recipe.to_dict())):
        return "the artifact was built from another recipe"
    if manifest.ingot_version != __version__:
        return f"the artifact was built by Ingot {manifest.ingot_version}"
    return ""


def newer_sources(folder: Path) -> bool:
    """Whether something that decides what engines look like was changed after the artifact was built."""
    built = (folder / FILE_NAME).stat().st_mtime
    places = (ROOT / "compiler", ROOT / "passes", ROOT / "runtime" / "ops")
    files = (f for place in places for f in place.rglob("*") if f.suffix in (".py", ".cpp", ".h"))
    return any(f.stat().st_mtime > built for f in files)


def checkpoint_bytes(recipe: Recipe, manifest: Manifest) -> int:
    """The size of the checkpoint's weights; for random ones what a file of them would have."""
    if recipe.model.source == "local":
        return sum(file.stat().st_size for file in recipe.model_path().glob("*.safetensors"))
    return manifest.model.parameters * (4 if recipe.model.dtype == "float32" else 2)


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.build.json")


def _kept(folder: Path, manifest: Manifest) -> Build:
    """What an earlier run of the harness kept of this very build; zeros where nobody did."""
    try:
        kept = strict.read_json(_record(folder).read_bytes(), str(_record(folder)))
        if kept.pop("manifest") != manifest.digest():
            return Build(reused=True)
        build: Build = strict.build(Build, {**kept, "reused": True}, str(_record(folder)))
    except (OSError, KeyError, TypeError, AttributeError, VerificationError):
        return Build(reused=True)
    return build


def stories_folder(given: Path | None) -> Path | None:
    """The folder of stories260K: the one given, else ../shared/models/stories260K beside the repository, else None.

    Raises:
        UsageError: the one given holds no checkpoint.
    """
    folder = given if given is not None else ROOT.parent / "shared" / "models" / "stories260K"
    if (folder / "config.json").is_file():
        return folder
    if given is not None:
        raise UsageError(
            f"{given} holds no checkpoint", "there is no config.json in it", "give the folder of stories260K"
        )
    return None
