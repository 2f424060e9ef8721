"""The first half of a build: everything that is known before a weight is read.

The model is traced and rewritten for every engine of the recipe; the result says which weights, caches and buffers
the artifact will have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..passes.base import Context, GraphPass
from ..passes.graph import TracedGraph
from ..passes.instruments import DumpIR, PassRecord, Recorder
from ..passes.manager import Instrument, run_passes
from .config_check import check_length, check_memory, read_config
from .console import Progress
from .load_model import make_model
from .model_source import resolve_source
from .pipelines import PIPELINE, select
from .recipe import EngineShape, Recipe
from .trace import trace


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
    check_memory(
        sum(p.numel() * p.element_size() for p in model.parameters()), f"a {config['model_type']} of this size"
    )
    chosen = select(recipe.passes.skip, passes)
    shapes = recipe.engines()
    with progress.stage("trace and passes", total=len(shapes)):
        for shape in shapes:
            progress.update(shape.name)
            traced = trace(model, shape.batch, shape.length)
            recorder = Recorder()
            instruments: list[Instrument] = [recorder, *([DumpIR(dump_ir, shape.name)] if dump_ir else [])]
            context = context_for(recipe, shape)
            run_passes(traced, chosen, context, instruments)
            plan.graphs[shape.name], plan.contexts[shape.name] = traced, context
            plan.records[shape.name] = recorder.records
            progress.update(shape.name, advance=1)
    return plan, model
