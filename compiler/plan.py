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

from ..artifacts.errors import UsageError
from ..artifacts.manifest import CacheLayer
from ..passes.base import Context, GraphPass, QuantizationGroup
from ..passes.graph import TracedGraph
from ..passes.instruments import DumpIR, PassRecord, Recorder
from ..passes.manager import Instrument, run_passes
from .backends.aoti import output_buffers
from .config_check import check_length, check_memory, read_config
from .console import Progress
from .load_model import make_model
from .model_source import resolve_source
from .pipelines import PIPELINE, select
from .recipe import EngineShape, Recipe
from .task_file import read_task
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

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """The KV cache of each layer, as the pass that put it in has found it; the same in every engine."""
        facts = next(r.facts for r in next(iter(self.records.values())) if "layers" in r.facts)
        return tuple(CacheLayer(tuple(x["key"]), tuple(x["value"]), x["window"]) for x in facts["layers"])  # type: ignore[attr-defined]

    @property
    def vocabulary(self) -> int:
        """Logits per token: what the config calls vocab_size, as the graphs have it."""
        return output_buffers(next(iter(self.graphs.values())))[1].shape[1]


def context_for(recipe: Recipe, shape: EngineShape) -> Context:
    """What passes may know of one engine."""
    block = recipe.shapes.kv_block_size
    max_blocks = -(-recipe.model.max_length // block)
    tokens = recipe.shapes.kv_cache_tokens or max(recipe.shapes.decode_batch_sizes) * max_blocks * block
    return Context(
        phase=shape.phase, batch=shape.batch, length=shape.length, device=recipe.target.device,
        max_length=recipe.model.max_length, block_size=block, num_blocks=-(-tokens // block) + 1, max_blocks=max_blocks,
        quantization=_groups(recipe),
    )  # fmt: skip


def _groups(recipe: Recipe) -> tuple[QuantizationGroup, ...]:
    asked = recipe.quantization
    return () if asked.scheme == "none" else (QuantizationGroup(asked.scheme, asked.targets, asked.ignore),)


def check_recipe(recipe: Recipe) -> None:
    """Raise UsageError for what a build would only meet after compiling: a task that is none, a scheme of no use."""
    if recipe.target.device == "cuda" and recipe.quantization.scheme != "none":
        raise UsageError(
            f"quantization.scheme {recipe.quantization.scheme!r} has no kernels for CUDA yet",
            "target.device is 'cuda'",
            '--set quantization.scheme="none", or --set target.device=cpu',
        )
    path = recipe.task_path()
    if path is not None:
        read_task(path, recipe.gate.task_examples)
    recipe.accuracy_path()
    if recipe.quantization.scheme == "none" and recipe.quantization.ignore:
        raise UsageError(
            "quantization.ignore has no effect", 'quantization.scheme is "none"', "set a scheme, or drop it"
        )


def _check_quantized(plan: Plan) -> None:
    """A scheme that reached no weight is a mistake in its patterns, not a smaller artifact."""
    if plan.recipe.quantization.scheme == "none":
        return
    for engine, records in plan.records.items():
        if not any(r.changed for r in records if not r.exact):
            raise UsageError(
                f"quantization reached no weight of engine {engine}",
                f"targets {list(plan.recipe.quantization.targets)} and ignore {list(plan.recipe.quantization.ignore)}"
                " leave none",
                'use targets = ["Linear"], or patterns of weight names as --dump-ir shows them',
            )


def make_plan(
    recipe: Recipe, progress: Progress, dump_ir: Path | None = None, passes: Sequence[GraphPass] = PIPELINE
) -> tuple[Plan, torch.nn.Module]:
    """Trace and rewrite every engine's graph. Reads the config, no weights.

    Raises:
        UsageError, UnsupportedModelError: recipe and model do not fit, or the model cannot be compiled.
        PassError: a pass failed; names it.
    """
    check_recipe(recipe)
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
    _check_quantized(plan)
    return plan, model
