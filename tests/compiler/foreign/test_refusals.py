"""What is not understood, or contradicts itself, is refused by name, and before weights are read where headers tell."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.artifacts.errors import IngotError, UnsupportedModelError, UsageError
from ingot.compiler.config_check import read_config
from ingot.compiler.console import SilentProgress
from ingot.compiler.families import recipe_for
from ingot.compiler.foreign.fields import module_pattern
from ingot.compiler.foreign.weights import make_reader, open_foreign
from ingot.compiler.load_model import make_model
from ingot.compiler.model_weights import open_weights
from ingot.compiler.plan import make_plan

from .checkpoints import LLAMA, QWEN3, Made, make_gptq

Get = Callable[[str], Made]
CT: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"], "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
        }},
    },
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}


def ct(weights: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    """CT with changes to its only group; what is not a key of a group is one of the whole."""
    top = {key: group.pop(key) for key in list(group) if key not in ("input_activations", "output_activations")}
    old = CT["config_groups"]["group_0"]
    return {
        **CT,
        "config_groups": {"group_0": {**old, "weights": {**old["weights"], **(weights or {})}, **group}},
        **top,
    }


# The config, and what its refusal must name.
UNKNOWN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "method": ({"quant_method": "aqlm"}, ("quant_method", "'aqlm'", "'gptq'")),
    "no method": ({}, ("quant_method", "missing")),
    "no table": ("gptq", ("no table",)),
    "gptq bits": ({**GPTQ, "bits": 3}, ("bits = 3", "4, 8")),
    "gptq bits in words": ({**GPTQ, "bits": "4"}, ("bits = '4'",)),
    "gptq format": ({**GPTQ, "checkpoint_format": "marlin"}, ("checkpoint_format = 'marlin'", "gptq_v2")),
    "gptq marlin": ({**GPTQ, "is_marlin_format": True}, ("is_marlin_format",)),
    "gptq formats disagree": ({**GPTQ, "checkpoint_format": "gptq", "format": "gptq_v2"}, ("disagree",)),
    "gptq key": ({**GPTQ, "rotation": "hadamard"}, ("rotation", "unknown")),
    "gptq asymmetric int8": ({**GPTQ, "bits": 8, "sym": False}, ("sym = False",)),
    "gptq pack dtype": ({**GPTQ, "pack_dtype": "int64"}, ("pack_dtype = 'int64'",)),
    "gptq override": ({**GPTQ, "dynamic": {".*up_proj": {"bits": 2}}}, ("dynamic", "bits = 2")),
    "gptq override key": ({**GPTQ, "dynamic": {".*up_proj": {"what": 2}}}, ("what", "unknown")),
    "gptq pattern": ({**GPTQ, "dynamic": {"-:(a+)+b": {}}}, ("pattern", "never end")),
    "gptq group size": ({**GPTQ, "group_size": 10**9}, ("group_size", "no size")),
    "awq bits": ({**AWQ, "bits": 8}, ("bits = 8",)),
    "awq version": ({**AWQ, "version": "gemv"}, ("version = 'gemv'", "gemm")),
    "awq backend": ({**AWQ, "backend": "llm-awq"}, ("backend = 'llm-awq'",)),
    "awq without zero points": ({**AWQ, "zero_point": False}, ("zero_point = False",)),
    "fp8 blocks": ({**FP8, "weight_block_size": [64, 64]}, ("weight_block_size", "[64, 64]")),
    "fp8 format": ({**FP8, "fmt": "e5m2"}, ("fmt = 'e5m2'",)),
    "fp8 activations": ({**FP8, "activation_scheme": "per-head"}, ("activation_scheme", "per-head")),
    "fp8 experts": ({**FP8, "expert_dtype": "fp4"}, ("expert_dtype = 'fp4'",)),
    "mxfp4 key": ({"quant_method": "mxfp4", "swizzle": 1}, ("swizzle", "unknown")),
    "ct format": (ct(format="marlin-24"), ("format = 'marlin-24'",)),
    "ct nvfp4": (ct({"type": "float"}, format="nvfp4-pack-quantized"), ("nvfp4-pack-quantized",)),
    "ct bits": (ct({"num_bits": 3}), ("num_bits = 3",)),
    "ct strategy": (ct({"strategy": "tensor_group"}), ("strategy = 'tensor_group'",)),
    "ct no strategy": (ct({"strategy": None}), ("strategy",)),
    "ct asymmetric int8": (ct({"num_bits": 8, "symmetric": False}), ("asymmetric int8",)),
    "ct int4 unpacked": (ct(format="int-quantized"), ("int4", "int-quantized", "pack-quantized")),
    "ct fp8 in groups": (ct({"num_bits": 8, "type": "float"}, format="float-quantized"), ("fp8", "group")),
    "ct blocks": (ct({"strategy": "block", "block_structure": [2, 4]}), ("blocks of [2, 4]",)),
    "ct mxfp4 groups": (ct({"type": "float", "group_size": 64}, format="mxfp4-pack-quantized"), ("mxfp4", "64")),
    "ct dynamic weights": (ct({"dynamic": True}), ("dynamic = True",)),
    "ct key": (ct({"rotate": 1}), ("weights.rotate", "unknown")),
    "ct kv cache": (ct(kv_cache_scheme={"num_bits": 8}), ("kv_cache_scheme",)),
    "ct transform": (ct(transform_config={"r1": {}}), ("transform_config",)),
    "ct sparse": (ct(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config.format",)),
    "ct status": (ct(quantization_status="initialized"), ("quantization_status = 'initialized'",)),
    "ct outputs": (ct(output_activations={"num_bits": 8}), ("output_activations",)),
    "ct activations": (ct(input_activations={"strategy": "attn_head"}), ("strategy = 'attn_head'",)),
    "ct asymmetric activations": (ct(input_activations={"symmetric": False}), ("symmetric = False",)),
    "ct presets": (ct(config_groups={"W4A16": ["Linear"]}), ("W4A16", "no table")),
    "ct pattern": (ct(ignore=["re:.*.*.*.*.*lm"]), ("pattern", "never end")),
    "ct broken pattern": (ct(ignore=["re:("]), ("pattern",)),
    "ct ignore": (ct(ignore="lm_head"), ("ignore", "no list")),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_the_unknown_is_refused_by_name(case: str) -> None:
    config, words = UNKNOWN[case]
    with pytest.raises((UsageError, UnsupportedModelError)) as caught:
        make_reader(config, "config.json: quantization_config")
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "quantization_config" in text and caught.value.fix


def test_what_only_tells_how_it_was_made_is_read_over() -> None:
    for config in (
        {**GPTQ, "damp_percent": 0.1, "meta": {"quantizer": "x"}, "true_sequential": True, "static_groups": False},
        {**AWQ, "modules_to_not_convert": None, "exllama_config": {"version": 2}},
        ct(sparsity_config={}, transform_config={}, kv_cache_scheme=None, version="0.9", global_compression_ratio=1.5),
        {**FP8, "scale_fmt": "ue8m0", "ignored_layers": ["lm_head"]},
        # As older versions of the libraries write them, every default spelled out.
        ct(
            {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}},
            quantization_status="frozen",
            kv_cache_scheme=None,
            output_activations=None,
            input_activations={
                "block_structure": None,
                "dynamic": True,
                "group_size": None,
                "num_bits": 8,
                "observer": "memoryless",
                "observer_kwargs": {},
                "strategy": "token",
                "symmetric": True,
                "type": "int",
            },
        ),
        {
            **GPTQ,
            "batch_size": 1,
            "block_name_to_quantize": None,
            "cache_block_outputs": True,
            "dataset": None,
            "exllama_config": {"version": 1},
            "max_input_length": None,
            "model_seqlen": None,
            "tokenizer": None,
            "module_name_preceding_first_block": None,
            "modules_in_block_to_quantize": [["self_attn.q_proj"]],
            "pad_token_id": None,
            "use_cuda_fp16": False,
            "use_exllama": True,
        },
    ):
        assert make_reader(config, "quantization_config").method == config["quant_method"]


@pytest.mark.parametrize("text", ["(a*)*", "(a|b)+c", r"(.)\1", "(?P<x>a)(?P=x)", "a*" * 5, "a" * 501, "(", "[z-a]"])
def test_a_pattern_that_may_never_end_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        module_pattern(text, "here")


@pytest.mark.parametrize(
    "text", [r"model\.layers\.([2-9]\d*|[1-9]\d+)\..*", ".*self_attn.(q|k|v)_proj$", "^(?!.*(gate|head)).*", r"a\(b\)*"]
)
def test_patterns_of_other_people_work_and_end(text: str) -> None:
    pattern, start = module_pattern(text, "here"), time.perf_counter()
    pattern.match("model.layers.12." + "q" * 500)
    assert time.perf_counter() - start < 5


# --- a checkpoint that disagrees with its own config -----------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def look(made: Made) -> None:
    """What a build does before it reads a weight."""
    made.save(made.quantization())
    look_at(made.folder)


def look_at(folder: Path) -> None:
    model = make_model(read_config(folder), "float32")
    open_weights(model, folder, "float32", 0, open_foreign(model, folder))


def change(name: str, value: Any) -> Callable[[Made], None]:
    """Change a tensor (None: take it out), or a key of the config."""

    def apply(made: Made) -> None:
        if name in GPTQ or name == "modules_to_not_convert":
            made.save({**made.quantization(), name: value})
        elif value is None:
            del made.tensors[name]
        else:
            made.tensors[name] = value(made.tensors.get(name))

    return apply


SHAPES: dict[str, tuple[str, Callable[[Made], None], tuple[str, ...]]] = {
    "group size": ("gptq", change("group_size", 16), (f"{Q}.qzeros is [2, 8]", "[4, 8]", "groups of 16")),
    "odd group size": ("gptq", change("group_size", 48), (Q, "48", "do not divide", "64 columns")),
    "bits": ("gptq", change("bits", 8), (f"{Q}.qweight is [8, 64]", "[16, 64]", "8 bits")),
    "scales missing": ("gptq", change(f"{Q}.scales", None), (f"{Q}.scales is missing", "4 bits")),
    "zeros missing": ("awq", change(f"{Q}.qzeros", None), (f"{Q}.qzeros is missing",)),
    "g_idx missing": ("gptq-by-activations", change(f"{Q}.g_idx", None), (f"{Q}.g_idx is missing",)),
    "scales of integers": ("gptq", change(f"{Q}.scales", torch.Tensor.int), (f"{Q}.scales holds torch.int32",)),
    "neither": ("gptq", change(f"{Q}.qweight", None), (f"{Q}.weight is missing", "leaves this module as it is")),
    "ignored and missing": ("ct-int4", change("lm_head.weight", None), ("lm_head.weight is missing", "as it is")),
    "ignored and quantized": ("gptq", change("modules_to_not_convert", ["q_proj"]), (f"{Q}.qweight is stored",)),
    "fp8 and ignored": ("fp8-blocks", change("modules_to_not_convert", [Q]), (f"{Q}.weight holds fp8", "as it is")),
    "targeted and dense": (
        "ct-int4", change(f"{Q}.weight_packed", None), (f"{Q}.weight_packed is missing", "groups of 32"),
    ),
    "untargeted and quantized": (
        "ct-int4", change("lm_head.weight_scale", lambda _: torch.ones(320, 2)), ("lm_head.weight_scale is stored",),
    ),
    "fp8 scale": (
        "fp8-blocks", change(f"{Q}.weight_scale_inv", lambda old: old[:, :1]),
        (f"{Q}.weight_scale_inv is [1, 1]", "[1, 2]"),
    ),
    "fp8 scale missing": ("fp8-blocks", change(f"{Q}.weight_scale_inv", None), (f"{Q}.weight_scale_inv is missing",)),
    "packed too short": (
        "ct-int4-asymmetric", change(f"{Q}.weight_packed", lambda old: old[:, 1:]), (f"{Q}.weight_packed is [64, 7]",),
    ),
    "zero points along k": (
        "ct-int4-asymmetric", change(f"{Q}.weight_zero_point", lambda old: old.t()),
        (f"{Q}.weight_zero_point", "[8, 2]"),
    ),
    "a tensor too many": ("awq", change(f"{Q}.g_idx", lambda _: torch.zeros(64).int()), (f"{Q}.g_idx is not part",)),
    "experts": (
        "mxfp4-experts",
        change("model.layers.0.mlp.experts.down_proj_scales", lambda old: old[:, 1:]),
        ("down_proj_scales is [4, 63, 3]", "[4, 64, 3]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_a_checkpoint_that_disagrees_with_its_config(copied: Get, case: str) -> None:
    name, damage, words = SHAPES[case]
    made = copied(name)
    damage(made)
    with pytest.raises(UsageError) as caught:
        look(made)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nothing_quantized_at_all(copied: Get) -> None:
    made = copied("gptq")
    made.tensors = dict(made.model.state_dict())
    with pytest.raises(UsageError, match="no weight is quantized"):
        look(made)


def test_a_quantized_head_that_shares_its_weight(copied: Get) -> None:
    made = copied("gptq-by-activations")  # its config ties the two
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        made.tensors[f"lm_head.{part}"] = made.tensors[f"{Q}.{part}"].clone()
    with pytest.raises(IngotError, match="lm_head"):
        look(made)


def test_experts_one_by_one(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    made = make_gptq(tmp_path / "model", {**LLAMA, "model_type": "qwen3_moe", **experts})
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.experts.gate_up_proj is stored expert by expert"):
        look(made)


def test_random_weights_have_no_quantization_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": GPTQ}))
    with pytest.raises(UsageError, match="means nothing to random weights"):
        make_plan(recipe_for(tmp_path, "random", "random"), SilentProgress())


# --- numbers that no quantizer makes ---------------------------------------------------------------------------------


def put(name: str, value: float) -> Callable[[Made], None]:
    """One element of a tensor becomes `value`."""

    def apply(made: Made) -> None:
        changed = made.tensors[name].clone()
        changed.view(-1)[1 if changed.numel() > 1 else 0] = value
        made.tensors[name] = changed

    return apply


NUMBERS: dict[str, tuple[str, Callable[[Made], None], tuple[str, ...]]] = {
    "zero scale": ("gptq", put(f"{Q}.scales", 0.0), (Q, "scale is zero")),
    "zero scale of awq": ("awq", put(f"{Q}.scales", 0.0), (Q, "scale is zero")),
    "zero scale of ct": ("ct-int8", put(f"{Q}.weight_scale", 0.0), (Q, "scale is zero")),
    "zero scale of a block": ("fp8-blocks", put(f"{Q}.weight_scale_inv", 0.0), (Q, "scale is zero")),
    "NaN scale": ("ct-int4", put(f"{Q}.weight_scale", float("nan")), (f"{Q}.weight_scale", "NaN")),
    "infinite scale": ("gptq", put(f"{Q}.scales", float("inf")), (f"{Q}.scales", "infinity")),
    "NaN exponent": ("ct-mxfp4", put(f"{Q}.weight_scale", 255), (Q, "scale is NaN")),
    "NaN value": ("fp8-blocks", put(f"{Q}.weight", float("nan")), (f"{Q}.weight", "NaN")),
    "symmetric with another zero": ("gptq", put(f"{Q}.qzeros", 0x77777776), (Q, "zero point is not 8", "sym")),
    "zero point out of range": ("gptq-by-activations", put(f"{Q}.qzeros", 0x7FFFFFF7), (Q, "stored zero point is 15")),
    "other shape": ("ct-int4", put(f"{Q}.weight_shape", 63), (Q, "weight_shape is [64, 63]")),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_no_quantizer_makes(copied: Get, case: str) -> None:
    name, damage, words = NUMBERS[case]
    made = copied(name)
    damage(made)
    made.save(made.quantization())
    model = make_model(read_config(made.folder), "float32")
    foreign = open_foreign(model, made.folder)
    weights = open_weights(model, made.folder, "float32", 0, foreign)
    assert foreign is not None
    held = foreign.held[f"{Q}.weight"]
    parts = [part.expression for part in (held.values, held.scale, held.zero) if part is not None]
    for read in (lambda: weights.load(f"{Q}.weight"), lambda: [part.evaluate(weights.load) for part in parts]):
        with pytest.raises(UsageError) as caught:
            read()
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("value", "word"), [(9, "group 0 to 9"), (-1, "group -1 to"), (1, "not all 32 columns")])
def test_columns_of_groups_that_are_not_there(copied: Get, value: int, word: str) -> None:
    made = copied("gptq")
    put(f"{Q}.g_idx", value)(made)
    with pytest.raises(UsageError, match=word):
        look(made)


def test_a_scale_of_experts_that_bfloat16_cannot_hold(copied: Get) -> None:
    made, name = copied("mxfp4-experts"), "model.layers.0.mlp.experts.down_proj"
    put(f"{name}_scales", 254)(made)
    made.save(made.quantization())
    model = make_model(read_config(made.folder), "float32")
    weights = open_weights(model, made.folder, "float32", 0, open_foreign(model, made.folder))
    with pytest.raises(UsageError, match="2\\^127 or NaN"):
        weights.load(name)


def test_overrides_of_single_modules(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: the first pattern that fits wins, with a minus it leaves a module as it is."""
    made = make_gptq(tmp_path / "model", QWEN3, skip="k_proj")
    quantization = made.quantization()
    made.save({**quantization, "bits": 8, "dynamic": {**quantization["dynamic"], "+:model.*": {"bits": 4}}})
    look_at(made.folder)
    made.save({**quantization, "dynamic": {}})
    look_at(made.folder)  # what is stored dense is dense
