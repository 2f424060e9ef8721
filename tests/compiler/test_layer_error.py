"""Which layers a quantized build's gate names: those whose own output is off the most, measured one by one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from ingot.compiler.console import SilentProgress
from ingot.compiler.families import recipe_for, subjects
from ingot.compiler.gate import Budget, budget_for
from ingot.compiler.layer_error import LayerError, worst_layers
from ingot.compiler.model_weights import open_weights
from ingot.compiler.pipelines import PIPELINE
from ingot.compiler.plan import Plan, make_plan
from ingot.compiler.recipe import Recipe
from ingot.compiler.recipe_sections import Group, Quantization
from ingot.passes.weights import Load

SPOILT, EXACT = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Load]:
    """A tiny Llama in 4 bits, its first layer in 8; one matrix has a number in every group that drowns the others."""
    folder = tmp_path_factory.mktemp("layers")
    (folder / "config.json").write_text(json.dumps(subjects(["llama"])[0].config))
    groups = (Group("W8A16", ("re:layers[.]0[.]",)), Group("W4A16", ("Linear",), ("lm_head",), 32))
    recipe = dataclasses.replace(recipe_for(folder, "llama", "random"), quantization=Quantization(groups=groups))
    plan, model = make_plan(recipe, SilentProgress())
    weights = open_weights(model, None, "float32", 0)

    def load(name: str) -> torch.Tensor:
        value = weights.load(name).clone()
        if name == f"{SPOILT}.weight":  # steps of 1: nothing but the first number of a group is left
            value = 0.45 * torch.sign(value)
            value[:, ::32] *= 7.5 / 0.45
        if name == f"{EXACT}.weight":  # steps of 1/64
            value = (torch.round(value * 1000).clamp(-100, 100)) / 64
            value[:, 0] = 127 / 64
        return value

    return plan, load


def test_the_spoilt_layer_is_the_worst(planned: tuple[Plan, Load]) -> None:
    layers = worst_layers(*planned, list(range(3, 60)), PIPELINE)
    names = {layer.name for layer in layers}
    assert len(layers) == len(names) == 8, "query, key and value are one product, gate and up another"
    assert "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj" in names
    four = [layer.error for layer in layers if layer.format == "int4"]
    eight = {layer.name: layer.error for layer in layers if layer.format == "int8"}
    assert layers[0].name == SPOILT and layers[0].error > 0.25
    assert len(four) == len(eight) == 4
    assert eight.pop(EXACT) < 1e-6, "a weight that its format holds is off by nothing, whatever its input"
    assert 1e-3 < max(eight.values()) < 0.01 < min(four) and four[1] < 0.15
    assert str(LayerError("a.b", "int4", 0.0512)) == "a.b (int4, off by 5.1%)"


@pytest.mark.parametrize(
    ("groups", "budget"),
    [
        ((), Budget(max_relative_error=1e-4)),
        ((Group("W8A16"),), Budget(mean_kl=0.005, top1=0.97)),
        ((Group("FP8"),), Budget(mean_kl=0.005, top1=0.97)),
        ((Group("W8A8"), Group("none", ("lm_head",))), Budget(mean_kl=0.005, top1=0.97)),
        ((Group("W8A16", ("lm_head",)), Group("W4A16")), Budget(mean_kl=0.05, top1=0.90)),
    ],
)
def test_the_loosest_scheme_sets_the_budget(groups: tuple[Group, ...], budget: Budget) -> None:
    assert budget_for(Recipe("r", quantization=Quantization(groups=groups))) == budget
