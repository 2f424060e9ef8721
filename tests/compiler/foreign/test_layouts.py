"""Every layout, weight by weight: made dense, and in the layout of the ops, it is exactly what its makers load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ingot.compiler.config_check import read_config
from ingot.compiler.families import eager, expected, greedy_tokens, recipe_for
from ingot.compiler.foreign.packing import awq_codes, codes_of
from ingot.compiler.foreign.weights import READERS, ForeignWeights, open_foreign
from ingot.compiler.load_model import make_model
from ingot.compiler.model_weights import ModelWeights, open_weights
from ingot.passes.quantize.held import QuantizedWeight
from ingot.runtime.ops.quantized import dequantize
from torch import Tensor

from .checkpoints import AWQ_ORDER, LLAMA, Made, make_fp8, pack_words
from .conftest import MAKERS

Get = Callable[[str], Made]
every_layout = pytest.mark.parametrize("name", MAKERS)


def opened(folder: Path) -> tuple[ForeignWeights, ModelWeights]:
    model = make_model(read_config(folder), "float32")
    foreign = open_foreign(model, folder)
    assert foreign is not None
    return foreign, open_weights(model, folder, "float32", 0, foreign)


@every_layout
def test_made_dense_it_is_what_others_load(checkpoint: Get, name: str) -> None:
    made = checkpoint(name)
    foreign, weights = opened(made.folder)
    wanted = dict(made.model.named_parameters(remove_duplicate=False))
    assert {*foreign.layers, *foreign.experts} <= set(wanted)
    for parameter, value in wanted.items():
        found = weights.load(parameter)
        # A scale of 16 bits is multiplied in float32 here and in its own dtype there: one rounding.
        torch.testing.assert_close(found.to(value.dtype), value.data, rtol=0, atol=0, msg=parameter)


@every_layout
def test_the_parts_are_as_announced_and_give_the_same_weight(checkpoint: Get, name: str) -> None:
    foreign, weights = opened(checkpoint(name).folder)
    for parameter, held in foreign.held.items():
        parts = [part_of(held, part, weights) for part in ("values", "scale", "zero")]
        assert parts[0] is not None and parts[1] is not None
        wide = dequantize(parts[0], parts[1], parts[2], held.format, list(held.group))
        dense = weights.load(parameter)
        order = torch.arange(dense.shape[1]) if held.columns is None else held.columns.value
        assert torch.equal(wide, dense[:, order]), parameter


def part_of(held: QuantizedWeight, name: str, weights: ModelWeights) -> Tensor | None:
    part = getattr(held, name)
    if part is None:
        return None
    value: Tensor = part.expression.evaluate(weights.load)
    assert (tuple(value.shape), value.dtype) == (tuple(part.shape), part.dtype)
    assert set(part.expression.sources())
    return value


EXPECTED = {
    "ct-int4": ("int4", (1, 32), "", torch.float32, False),
    "ct-int4-channel-bf16": ("int4", (1, 64), "", torch.bfloat16, True),
    "ct-int8": ("int8", (1, 64), "", torch.float32, False),
    "ct-int8-grouped": ("int8", (1, 32), "", torch.float32, False),
    "ct-int8-activations": ("int8", (1, 64), "int8", torch.float32, False),
    "ct-fp8": ("fp8", (1, 64), "fp8", torch.float32, False),
    "ct-fp8-static": ("fp8", (1, 64), "fp8", torch.float32, False),
    "ct-fp8-blocks": ("fp8", (128, 128), "", torch.float32, False),
    "ct-mxfp4": ("mxfp4", (1, 32), "", torch.uint8, False),
    "gptq": ("int4", (1, 32), "", torch.float16, False),
    "gptq-by-activations": ("int4", (1, 32), "", torch.float16, True),
    "gptq-int8": ("int8", (1, 32), "", torch.float32, False),
    "awq": ("int4", (1, 32), "", torch.float16, True),
    "fp8-blocks": ("fp8", (128, 128), "", torch.float32, False),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_nothing_is_kept_in_another_form_than_it_came(checkpoint: Get, name: str) -> None:
    """Formats, groups, the dtype of scales as they were made, zero points only where there are any."""
    foreign, _ = opened(checkpoint(name).folder)
    held = foreign.held["model.layers.1.self_attn.q_proj.weight"]
    found = (held.format, held.group, held.activations, held.scale.dtype, held.zero is not None)
    assert found == EXPECTED[name]
    assert (held.columns is not None) == (name in ("gptq-by-activations", "gptq-int8"))
    assert len(foreign.held) == 14 and foreign.experts == {}
    stored = [
        value for prefix, value in checkpoint(name).tensors.items() if prefix.rpartition(".")[0] in modules(foreign)
    ]
    assert foreign.held_bytes == sum(value.nbytes for value in stored)


def modules(foreign: ForeignWeights) -> set[str]:
    return {layer.prefix for layer in foreign.layers.values()}


def test_what_is_not_done_is_said(checkpoint: Get) -> None:
    notes = {name: next(iter(opened(checkpoint(name).folder)[0].held.values())).note for name in EXPECTED}
    assert notes["ct-fp8"] == notes["gptq"] == ""
    assert "static" in notes["ct-fp8-static"] and "per token" in notes["ct-fp8-static"]
    assert "activations stay as they are" in notes["fp8-blocks"] and notes["ct-fp8-blocks"]


def test_codes_come_out_of_words_in_order() -> None:
    rng = np.random.default_rng(0)
    for bits in (4, 8):
        codes = rng.integers(0, 1 << bits, (3, 64))
        assert torch.equal(codes_of(pack_words(codes, bits), bits).long(), torch.from_numpy(codes))
    assert torch.equal(awq_codes(pack_words(codes % 16, 4, AWQ_ORDER)).long(), torch.from_numpy(codes % 16))


def test_awq_is_read_as_another_library_reads_it(checkpoint: Get) -> None:
    """compressed-tensors has a converter of AutoAWQ's layout of its own."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    made = checkpoint("awq")
    foreign, weights = opened(made.folder)
    converted = AutoAWQConverter(group_size=32).process(dict(made.tensors))
    for parameter in foreign.held:
        prefix = parameter.removesuffix(".weight")
        scale, (n, k) = converted[f"{prefix}.weight_scale"].float(), converted[f"{prefix}.weight_shape"].tolist()
        codes = unpack_from_int32(converted[f"{prefix}.weight_packed"], 4, torch.Size((n, k)))
        zeros = unpack_from_int32(converted[f"{prefix}.weight_zero_point"], 4, scale.shape, packed_dim=0)
        wide = (codes.float() - zeros.float().repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
        assert torch.equal(weights.load(parameter), wide)


def test_fp8_in_blocks_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Transformers makes it dense where there is no GPU; it knows whole blocks only."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
    made = make_fp8(tmp_path / "model", {**LLAMA, **sizes})
    loaded = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    foreign, weights = opened(made.folder)
    assert len(foreign.held) == 14
    for parameter, value in loaded.named_parameters():
        assert torch.equal(weights.load(parameter), value.data), parameter


def test_the_document_names_every_method() -> None:
    text = (Path(__file__).parents[3] / "docs" / "foreign-checkpoints.md").read_text("utf-8")
    assert {method for method in READERS if f"| `{method}` |" in text} == set(READERS)


RUN = (
    "ct-int4-asymmetric", "ct-int8-activations", "ct-fp8", "ct-mxfp4", "ct-mixed", "gptq-by-activations", "gptq-int8",
    "awq", "fp8-blocks", "mxfp4-experts",
)  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_the_graphs_give_the_tokens_of_the_dense_model(checkpoint: Get, tmp_path: Path, name: str) -> None:
    made = checkpoint(name)
    prompts = [np.random.default_rng(5).integers(3, 320, length).tolist() for length in (3, 9, 20)]
    tmp_path.joinpath("root").mkdir()
    with eager(recipe_for(made.folder, "foreign"), tmp_path / "root") as llm:
        alone, batched = greedy_tokens(llm, prompts, 24)
    wanted = expected(made.model, prompts)
    assert alone == batched
    same = sum(a == b for row, other in zip(alone, wanted) for a, b in zip(row, other))
    # Where activations are quantized too, tokens may differ from those of dense weights; the gate has budgets for it.
    quantized = any(held.activations for held in opened(made.folder)[0].held.values())
    assert same > 36 if quantized else same == 72
