"""A checkpoint of several formats, built by the command line: one artifact through weights, engines, gate, runtime."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from ingot.artifacts.errors import UnsupportedModelError, UsageError
from ingot.artifacts.manifest import load_manifest
from ingot.compiler.cache.inputs import Inputs
from ingot.compiler.console import SilentProgress
from ingot.compiler.families import expected, recipe_for
from ingot.compiler.gate import budget_for
from ingot.compiler.plan import make_plan
from ingot.compiler.recipe import Recipe
from ingot.compiler.recipe_sections import Passes, Quantization, Target
from ingot.runtime import LLM
from ingot.runtime.complete import greedy_tokens
from ingot.runtime.ops.packed import pack_groups, pack_weight
from safetensors import safe_open

from .checkpoints import Made

Get = Callable[[str], Made]
RECIPE = """
name = "mixed"
[model]
path = "model"
max_length = 64
[shapes]
decode_batch_sizes = [1]
prefill_lengths = [16]
kv_block_size = 8
[gate]
prompts = ["a", "b"]
max_tokens = 8
accuracy_tokens = 64
"""


@pytest.fixture(scope="module")
def artifact(
    checkpoint: Get, ingot: Callable[..., CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """fp8 query, key and output projections, int4 with zero points elsewhere, a dense LM head."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(checkpoint("ct-mixed").folder, folder / "model")
    (folder / "recipe.toml").write_text(RECIPE)
    done = ingot("build", folder / "recipe.toml", "-o", folder / "artifact", timeout=900)
    assert done.returncode == 0, done.stderr
    return folder / "artifact"


def test_the_artifact_holds_the_checkpoints_own_bytes(artifact: Path, checkpoint: Get) -> None:
    stored = checkpoint("ct-mixed").tensors
    with safe_open(artifact / "weights" / "model.safetensors", "pt") as file:
        down, layer = "model__layers__0__mlp__down_proj__weight", "model.layers.0.mlp.down_proj"
        codes = stored[f"{layer}.weight_packed"].view(torch.uint8)
        assert torch.equal(file.get_tensor(f"{down}__int4__packed"), pack_weight(codes, "int4"))
        scales = stored[f"{layer}.weight_scale"]
        assert torch.equal(file.get_tensor(f"{down}__scale__packed"), pack_groups(scales))
        merged = file.get_tensor("model__layers__0__self_attn__q_proj__weight__and__k_proj__fp8")
        parts = [stored[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk"]
        assert torch.equal(merged.view(torch.uint8), torch.cat(parts).view(torch.uint8))


def test_the_gate_judges_it_as_closely_as_a_dense_one(artifact: Path) -> None:
    """The reference has the same weights, made dense: nothing was lost but the order of additions."""
    manifest = load_manifest(artifact)
    assert manifest.gate["budget"] == {"max_relative_error": 1e-4}
    assert manifest.gate["accuracy"]["scheme"] == "fp8 int4 (checkpoint)"
    kept = [entry for entry in manifest.passes if entry["name"] == "keep-quantized"]
    assert kept and all(entry["facts"]["held"] == {"fp8": 20480, "int4": 40960} for entry in kept)


def test_it_writes_the_dense_models_tokens(artifact: Path, checkpoint: Get) -> None:
    prompts = [[5, 9, 200], list(range(30, 50))]
    with LLM(artifact) as llm:
        alone, batched = greedy_tokens(llm, prompts, 24)
    assert alone == batched == expected(checkpoint("ct-mixed").model, prompts)


def test_quantized_activations_have_the_budgets_of_a_quantized_build(checkpoint: Get) -> None:
    for name, activations in (("ct-int8", False), ("ct-int8-activations", True)):
        recipe = recipe_for(checkpoint(name).folder, "budget")
        plan, _ = make_plan(recipe, SilentProgress())
        assert plan.kept == ["int8"] and plan.kept_activations == (["int8"] if activations else [])
        assert (budget_for(recipe, activations).mean_kl is not None) is activations


def test_a_cached_trace_belongs_to_the_checkpoint_that_it_was_made_for(copied: Get) -> None:
    """How columns are ordered is in the weights and decides the graph."""
    made = copied("gptq-by-activations")
    recipe = recipe_for(made.folder, "cached")
    before = Inputs(recipe, made.folder).held
    made.tensors["model.layers.0.mlp.up_proj.g_idx"] = torch.arange(64, dtype=torch.int32) // 32
    made.save(made.quantization())
    assert before and Inputs(recipe, made.folder).held not in ("", before)
    config = json.loads((made.folder / "config.json").read_text())
    del config["quantization_config"]
    (made.folder / "config.json").write_text(json.dumps(config))
    assert Inputs(recipe, made.folder).held == ""


def scheme(recipe: Recipe, *targets: str) -> Recipe:
    return dataclasses.replace(recipe, quantization=Quantization("W8A16", targets))


def test_a_recipes_scheme_reaches_what_is_dense_alone(checkpoint: Get) -> None:
    recipe = recipe_for(checkpoint("gptq").folder, "both")
    plan, _ = make_plan(scheme(recipe, "Linear"), SilentProgress())
    for graph in plan.graphs.values():
        assert any("__int4" in name for name in graph.weights.entries)
        (head,) = (name for name in graph.weights.entries if "__int8" in name)
        assert head.startswith("lm_head__weight")
    with pytest.raises(UsageError, match="reached no weight"):
        make_plan(scheme(recipe, "q_proj"), SilentProgress())


def test_a_gpu_has_no_kernel_for_it(checkpoint: Get) -> None:
    """Until it has, and unless its weights are made dense."""
    recipe = dataclasses.replace(recipe_for(checkpoint("ct-mxfp4").folder, "gpu"), target=Target(device="cuda"))
    with pytest.raises(UnsupportedModelError, match="no kernel for cuda") as caught:
        make_plan(recipe, SilentProgress())
    assert "mxfp4 weights" in caught.value.why and "keep-quantized" in caught.value.fix
    plan, _ = make_plan(dataclasses.replace(recipe, passes=Passes(("keep-quantized",))), SilentProgress())
    assert not any("__mxfp4" in name for graph in plan.graphs.values() for name in graph.weights.entries)


def test_the_command_line_refuses_by_name(
    checkpoint: Get, ingot: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("gptq").folder, tmp_path / "model")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for options in ((), ("--dry-run",)):
        done = ingot("build", tmp_path / "recipe.toml", "-o", tmp_path / "artifact", *options)
        assert done.returncode == 3
        assert "bits = 3" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "artifact").exists()
