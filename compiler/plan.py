"""The first half of a build: everything that is known before a weight is read.

The model is traced and rewritten for every engine of the recipe; the result says which weights, caches and buffers
the artifact will have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..artifacts.manifest import CacheLayer
from ..passes.base import Context, GraphPass
from ..passes.graph import TracedGraph
from ..passes.instruments import DumpIR, PassRecord, Recorder
from ..passes.manager import Instrument, run_passes
from .backends.aoti import input_buffers, output_buffers
from .config_check import check_length, check_memory, read_config
from .console import Progress
from .facts import kept_formats
from .foreign.weights import ForeignWeights, open_foreign, refuse_random
from .load_model import make_model
from .model_source import resolve_source
from .pipelines import PIPELINE, select
from .quantization import check_held, check_shapes, check_target, groups_of
from .recipe import EngineShape, Recipe
from .recipe_check import check_files
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
    foreign: ForeignWeights | None = None  # what the checkpoint holds quantized

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """The KV cache of each layer, as the pass that put it in has found it; the same in every engine."""
        facts = next(r.facts for r in next(iter(self.records.values())) if "layers" in r.facts)
        return tuple(CacheLayer(tuple(x["key"]), tuple(x["value"]), x["window"]) for x in facts["layers"])  # type: ignore[attr-defined]

    @property
    def kept(self) -> list[str]:
        """Formats of the weights that the checkpoint holds quantized and that stay so."""
        return kept_formats(record.facts for records in self.records.values() for record in records)

    @property
    def kept_activations(self) -> list[str]:
        """What those weights' products quantize activations to."""
        return kept_formats((r.facts for records in self.records.values() for r in records), "activations")

    @property
    def cache_dtype(self) -> str:
        """What keys and values are kept in."""
        graph = next(iter(self.graphs.values()))
        return next(b.dtype for b in input_buffers(graph) if b.name == "k_cache_0")

    @property
    def vocabulary(self) -> int:
        """Logits per token: what the config calls vocab_size, as the graphs have it."""
        return output_buffers(next(iter(self.graphs.values())))[1].shape[1]


def context_for(recipe: Recipe, shape: EngineShape, foreign: ForeignWeights | None = None) -> Context:
    """What passes may know of one engine."""
    block = recipe.shapes.kv_block_size
    max_blocks = -(-recipe.model.max_length // block)
    tokens = recipe.shapes.kv_cache_tokens or max(recipe.shapes.decode_batch_sizes) * max_blocks * block
    return Context(
        phase=shape.phase, batch=shape.batch, length=shape.length, device=recipe.target.device,
        max_length=recipe.model.max_length, block_size=block, num_blocks=-(-tokens // block) + 1, max_blocks=max_blocks,
        quantization=groups_of(recipe.quantization), kv_cache_dtype=recipe.shapes.kv_cache_dtype,
        held=foreign.held if foreign else {},
        made_dense=foreign.made_dense if foreign else {},
    )  # fmt: skip


class Tracer:
    """Traces and rewrites the engines of one recipe, one at a time and only those asked for. Reads no weights.

    Raises:
        UsageError, UnsupportedModelError: recipe and model do not fit, or the model cannot be compiled.
    """

    def __init__(
        self, recipe: Recipe, source: Path, dump_ir: Path | None = None, passes: Sequence[GraphPass] = PIPELINE
    ) -> None:
        check_target(recipe)
        self._dump_ir, self._chosen = dump_ir, select(recipe.passes.skip, passes)
        config = read_config(source)
        check_length(config, recipe.model.max_length)
        folder = None if recipe.model.source == "random" else source
        if folder is None:
            refuse_random(source)
        self.model = make_model(config, recipe.model.dtype)
        foreign = None if folder is None else open_foreign(self.model, folder)
        if foreign is not None:
            check_held(recipe, foreign)
        held: Mapping[str, object] = foreign.layers if foreign else {}
        needed = sum(p.numel() * p.element_size() for name, p in self.model.named_parameters() if name not in held)
        check_memory(needed + (foreign.held_bytes if foreign else 0), f"a {config['model_type']} of this size")
        self.plan = Plan(recipe, config, folder, {}, {}, {}, foreign)

    def add(self, shape: EngineShape) -> None:
        """Put one engine into `plan`, if it is not there yet.

        Raises:
            UsageError, UnsupportedModelError: as above. PassError: a pass failed; names it.
        """
        plan = self.plan
        if shape.name in plan.graphs:
            return
        traced = trace(self.model, shape.batch, shape.length)
        recorder = Recorder()
        instruments: list[Instrument] = [recorder, *([DumpIR(self._dump_ir, shape.name)] if self._dump_ir else [])]
        context = context_for(plan.recipe, shape, plan.foreign)
        run_passes(traced, self._chosen, context, instruments)
        check_shapes(plan.recipe, {shape.name: recorder.records})
        plan.graphs[shape.name], plan.contexts[shape.name] = traced, context
        plan.records[shape.name] = recorder.records


def make_plan(
    recipe: Recipe, progress: Progress, dump_ir: Path | None = None, passes: Sequence[GraphPass] = PIPELINE
) -> tuple[Plan, torch.nn.Module]:
    """Trace and rewrite every engine's graph. Reads the config, no weights.

    Raises:
        UsageError, UnsupportedModelError: recipe and model do not fit, or the model cannot be compiled.
        PassError: a pass failed; names it.
    """
    check_files(recipe)
    tracer = Tracer(recipe, resolve_source(recipe), dump_ir, passes)
    shapes = recipe.engines()
    with progress.stage("trace and passes", total=len(shapes)):
        for shape in shapes:
            progress.update(shape.name)
            tracer.add(shape)
            progress.update(shape.name, advance=1)
    return tracer.plan, tracer.model
