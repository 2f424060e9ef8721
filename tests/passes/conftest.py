"""Traces of tiny models, made once per session, and the history of the whole pipeline over each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ingot.compiler.load_model import make_model
from ingot.compiler.pipelines import PIPELINE
from ingot.compiler.random_weights import RandomCheckpoint
from ingot.compiler.trace import trace
from ingot.passes.base import Context, GraphPass, QuantizationGroup
from ingot.passes.graph import TracedGraph, copy_graph
from ingot.passes.instruments import PassRecord, Recorder
from ingot.passes.manager import run_passes
from ingot.passes.quantize.held import QuantizedPart, QuantizedWeight
from ingot.passes.quantize.round_to_nearest import RoundToNearest
from ingot.passes.stages import Stage
from ingot.passes.weights import Load, Quantized, Stored

_COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON},
    "gemma2": {"model_type": "gemma2", **_COMMON, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "n_positions": 64},
    "mixtral": {"model_type": "mixtral", **_COMMON, **_MOE, "num_hidden_layers": 1},
    "gpt_oss": {"model_type": "gpt_oss", **_COMMON, **_MOE, "sliding_window": 6},
}

LENGTH = 8
PREFILL = Context("prefill", 1, LENGTH, max_length=32, block_size=4, num_blocks=17, max_blocks=8)
CUDA = Context("decode", 2, 1, "cuda", max_length=32, block_size=4, num_blocks=17, max_blocks=8)
_W8A16 = (QuantizationGroup("W8A16"),)
_DOWN = Stored("model.layers.0.mlp.down_proj.weight", (32, 48), torch.float32)
_INT4 = RoundToNearest("int4", 16)
# One weight is held quantized by the checkpoint, the others are quantized here.
_HELD = QuantizedWeight(
    "int4", (1, 16), "", QuantizedPart(Quantized(_DOWN, _INT4, "values"), (32, 24), torch.uint8),
    QuantizedPart(Quantized(_DOWN, _INT4, "scale"), (32, 3), torch.float16),
)  # fmt: skip
DECODE = Context(
    "decode", 2, 1, max_length=32, block_size=4, num_blocks=17, max_blocks=8, quantization=_W8A16,
    held={_DOWN.name: _HELD}, kv_cache_dtype="int8",
)  # fmt: skip
# Prefill is not quantized here, so that all its passes are exact and SelectKernels has something to do.
SUBJECTS = [
    ("llama", "float32", DECODE),
    ("gemma2", "bfloat16", PREFILL),
    ("gpt2", "float32", PREFILL),
    ("mixtral", "float32", PREFILL),
    ("gpt_oss", "bfloat16", PREFILL),
    ("llama", "float32", CUDA),
    ("gpt2", "float32", dataclasses.replace(CUDA, quantization=(QuantizationGroup("W4A16", group_size=16),))),
    ("gemma2", "bfloat16", dataclasses.replace(PREFILL, device="cuda")),
]


def subject_name(family: str, dtype: str, ctx: Context) -> str:
    """How a subject is called in test ids."""
    return f"{family}-{dtype}-{ctx.phase}" + ("-cuda" if ctx.device == "cuda" else "")


NAMES = [subject_name(*s) for s in SUBJECTS]


@dataclass
class Step:
    """One pass over one graph: before, after, and after being run again."""

    graph_pass: GraphPass
    before: TracedGraph
    after: TracedGraph
    again: TracedGraph
    stage: Stage
    record: PassRecord
    second: PassRecord


@dataclass
class History:
    """All passes over one trace, with weights to run any of its graphs."""

    ctx: Context
    load: Load
    steps: dict[str, Step]

    @property
    def traced(self) -> TracedGraph:
        """As it was before the first pass."""
        return next(iter(self.steps.values())).before


def _history(family: str, dtype: str, ctx: Context) -> History:
    model = make_model(CONFIGS[family], dtype)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    checkpoint = RandomCheckpoint(shapes, getattr(torch, dtype), 0)
    traced, stage, steps = trace(model, ctx.batch, ctx.length), Stage.TRACED, {}
    before = copy_graph(traced)
    for graph_pass in PIPELINE:
        recorder = Recorder()
        stage = run_passes(traced, [graph_pass], ctx, [recorder], stage)
        after, again = copy_graph(traced), copy_graph(traced)
        run_passes(again, [graph_pass], ctx, [recorder], stage)
        steps[graph_pass.name] = Step(graph_pass, before, after, again, stage, *recorder.records)
        before = after
    return History(ctx, checkpoint.load, steps)


@pytest.fixture(scope="session")
def history() -> Callable[[str], History]:
    """The history of a subject by name; traced when first asked for."""
    made: dict[str, History] = {}

    def get(name: str) -> History:
        if name not in made:
            made[name] = _history(*SUBJECTS[NAMES.index(name)])
        return made[name]

    return get
