"""`ingot build`, `passes`, `bisect` and `families`: what reads a recipe and needs the compiler.

Every import of the compiler's heavy parts is inside a function, after the recipe was found sound: a wrong recipe is
answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.errors import GateError, IngotError, UsageError
from ..artifacts.writer import check_destination
from .artifact_commands import describe, print_artifact
from .backends.commands import ENGINE_TIMEOUT_S
from .cache.location import open_session
from .cache.session import DEFAULT_MAX_BYTES
from .cache_commands import print_steps, size_bytes
from .console import open_progress, print_table, size_text
from .model_source import check_output
from .quiet import quiet_libraries
from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from ..passes.base import GraphPass


def build(args: argparse.Namespace) -> int:
    """Compile a recipe into an artifact, or with --dry-run say what would be done."""
    recipe = load_recipe(args.recipe, args.overrides, args.model)
    output = args.output if args.output is not None else Path("artifacts/built") / recipe.name
    if args.dry_run:
        return _dry_run(recipe, output, args.json)
    recipe.check_source()
    check_output(recipe, output)
    check_destination(output, args.force)
    if args.engine_timeout is not None and not 0 < args.engine_timeout < float("inf"):
        raise UsageError(f"--engine-timeout {args.engine_timeout} is refused", "it is no number of seconds above 0", "")
    size = DEFAULT_MAX_BYTES if args.cache_size is None else size_bytes(args.cache_size)
    with open_progress(args.json) as progress, quiet_libraries(not args.debug):
        from .builder import build as build_artifact

        session = open_session(args.cache_dir, not args.no_cache, args.explain, progress.log, size)
        result = build_artifact(
            recipe, output, force=args.force, dump_ir=args.dump_ir, progress=progress,
            passes=None if args.plant is None else _pipeline(args.plant), cache=session, tuning=args.tuning_cache,
            engine_timeout=ENGINE_TIMEOUT_S if args.engine_timeout is None else args.engine_timeout,
        )  # fmt: skip
        session.close()
    facts = describe(result.manifest)
    if args.json:
        seconds = {name: round(value, 3) for name, value in result.stages.items()}
        steps = [dataclasses.asdict(step) for step in result.steps]
        print(json.dumps({"path": str(output), **facts, "stage_seconds": seconds, "cache": steps}))
        return 0
    print_artifact(facts)
    if args.explain:
        print_steps(result.steps)
    print_table("time", ("stage", "seconds"), [(name, round(value, 1)) for name, value in result.stages.items()])
    print(f'wrote {output} ({size_text(facts["total_bytes"])}); try: ingot run {output} "…"')
    return 0


def passes(args: argparse.Namespace) -> int:
    """Show the pipeline in order, for a recipe or in full."""
    skip = load_recipe(args.recipe, args.overrides).passes.skip if args.recipe is not None else ()
    from .pipelines import select

    rows = [_pass_facts(item) for item in select(skip)]
    if args.json:
        print(json.dumps(rows))
    else:
        table = [(i, *row.values()) for i, row in enumerate(rows, 1)]
        print_table("passes", ("", "name", "needs", "leaves", "exactness", "what it does"), table)
    return 0


def bisect(args: argparse.Namespace) -> int:
    """Find the pass that breaks the numbers; the gate's exit code if there is one."""
    recipe = load_recipe(args.recipe, args.overrides, args.model)
    recipe.check_source()
    with open_progress(args.json) as progress, quiet_libraries(not args.debug):
        from .bisect import bisect as find

        result = find(recipe, progress=progress, passes=_pipeline(args.plant))
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print_table("tried", ("", "prefix of the pipeline"), list(enumerate(result.tried, 1)))
        print(f"pass {result.name!r} brings the error in: {result.detail}" if result.name else result.detail)
    return GateError.exit_code if result.missed else 0


def _pipeline(fault: str | None) -> Sequence[GraphPass]:
    """The pipeline, with a fault planted on request."""
    from .faults import plant
    from .pipelines import PIPELINE

    return PIPELINE if fault is None else plant(fault, PIPELINE)


def families(args: argparse.Namespace) -> int:
    """Print the table of model families with token-exactness; the exit code is the gate's if one is not exact."""
    with open_progress(args.json) as progress, quiet_libraries(not args.debug):
        from .families import run

        rows: list[dict[str, Any]] = run(
            args.names, progress=progress, compile_engines=not args.eager, device=args.device
        )
    if unknown := set(args.names) - {row.get("family") for row in rows}:
        raise UsageError(f"there is no family {min(unknown)!r}", "recipes/families.toml lists them", "correct the name")
    if args.json:
        print(json.dumps(rows))
    elif rows:
        print_table("token-exactness against eager transformers", tuple(rows[0]), [tuple(r.values()) for r in rows])
    return 0 if all(row.get("exact") in (True, "yes") for row in rows) else GateError.exit_code


def _dry_run(recipe: Recipe, output: Path, as_json: bool) -> int:
    """Everything a build would settle before it reads weights."""
    from .pipelines import select

    names = [item.name for item in select(recipe.passes.skip)]
    engines = [dataclasses.asdict(engine) for engine in recipe.engines()]
    from .quantization import check_target
    from .recipe_check import check_files

    check_target(recipe)
    check_files(recipe)
    problem, model = _look_at_model(recipe, output)
    if as_json:
        plan = {"recipe": recipe.to_dict(), "output": str(output), "engines": engines, "passes": names, "model": model}
        print(json.dumps(plan))
    else:
        print_table(f"recipe {recipe.name}", ("key", "value"), _flat(recipe.to_dict()))
        if model:
            print_table("config.json", ("key", "value"), list(model.items()))
        print_table("engines", ("name", "phase", "batch", "length"), [tuple(engine.values()) for engine in engines])
        print_table("passes", ("", "name"), list(enumerate(names, 1)))
        print(f"would write {output}")
    if problem is not None:
        raise problem
    return 0


def _look_at_model(recipe: Recipe, output: Path) -> tuple[IngotError | None, dict[str, Any]]:
    """Whether a build could start, and the config's main facts; nothing is fetched."""
    from .config_check import check_length, read_config
    from .foreign.weights import reader_of, refuse_random
    from .model_source import resolve_source

    try:
        recipe.check_source()
        check_output(recipe, output)
        if recipe.model.source == "hub":
            return None, {}
        source = resolve_source(recipe)
        config = read_config(source)
        if recipe.model.source == "random":
            refuse_random(source)
        else:
            reader_of(source)
        check_length(config, recipe.model.max_length)
    except IngotError as error:
        return error, {}
    return None, {key: value for key, value in config.items() if isinstance(value, str | int | float)}


def _pass_facts(item: Any) -> dict[str, str]:
    summary = (inspect.getdoc(type(item)) or "").partition("\n")[0]
    exactness = "exact" if item.exact else "changes numerics"
    needs, leaves = item.needs.name.lower(), item.leaves.name.lower()
    return {"name": item.name, "needs": needs, "leaves": leaves, "exactness": exactness, "summary": summary}


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value not in ("", None, []):
            rows.append((prefix + key, json.dumps(value, ensure_ascii=False)))
    return rows
