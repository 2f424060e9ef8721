"""The compiler: recipe in, artifact out. `from ingot.compiler import build` builds from Python.

Importing this package is cheap; torch and transformers are loaded by the first build.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .builder import BuildResult
    from .console import Progress
    from .recipe import Recipe

__all__ = ["build"]


def build(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    force: bool = False,
    dump_ir: Path | None = None,
    progress: Progress | None = None,
    use_cache: bool = True,
    cache_dir: Path | None = None,
) -> BuildResult:
    """Compile a recipe (an object, or the path of a TOML file) into the artifact folder `output`.

    Args:
        overrides: "key=value" each, and model: a folder or hub id, as `--set` and `--model`; for a path only.
        use_cache: take from the build cache what has not changed; cache_dir: where it is, None for the user's own.

    Raises:
        UsageError (2), UnsupportedModelError (3), GateError (4), ResourceError (5): see ingot.artifacts.errors.
    """
    from . import builder
    from .cache.location import open_session
    from .console import SilentProgress
    from .recipe import load_recipe

    loaded = load_recipe(recipe, overrides, model) if isinstance(recipe, str | Path) else recipe
    progress = progress or SilentProgress()
    session = open_session(cache_dir, use_cache, log=progress.log)
    result = builder.build(loaded, Path(output), force=force, dump_ir=dump_ir, progress=progress, cache=session)
    session.close()
    return result
