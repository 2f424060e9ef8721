"""Where AWQ may put its scales: in every family a random one, taken out where it is said to be, leaves the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ingot.compiler.calibrate.sites import Site, find_sites
from ingot.compiler.families import save_random_model, subjects
from ingot.compiler.load_model import make_model
from ingot.compiler.pipelines import CLEANUP
from ingot.compiler.trace import trace
from ingot.passes.base import Context
from ingot.passes.manager import run_passes


def sites_of(config: dict[str, object]) -> list[Site]:
    traced = trace(make_model(config, "float32"), 1, 8)
    run_passes(traced, CLEANUP, Context("prefill", 1, 8))
    return find_sites(traced)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "cohere", "opt", "deepseek_v3"]
)
def test_a_scale_that_is_folded_changes_nothing(family: str, tmp_path: Path) -> None:
    config = subjects([family])[0].config
    model = save_random_model(config, tmp_path)
    tokens = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    state, generator, folded = model.state_dict(), torch.Generator().manual_seed(1), 0
    for site in sites_of(config):
        assert bool(site.reason) == (site.fold is None)
        if site.fold is None or any(linear.apart for linear in site.linears):
            continue
        fold, folded = site.fold, folded + 1
        size = fold.linear.n if fold.linear is not None else len(state[fold.weight])
        source = torch.rand(size, generator=generator) + 0.5
        touched = torch.zeros(size, dtype=torch.bool)
        touched[fold.rows] = True
        source = torch.where(touched, source, 1.0)
        weight = state[fold.weight]
        if fold.linear is None:
            weight.copy_((weight + fold.offset) / source - fold.offset)
        else:
            weight.copy_(weight / (source if fold.linear.transposed else source[:, None]))
        if fold.bias:
            state[fold.bias].div_(source)
        for linear in site.linears:
            column = source[fold.rows]
            state[linear.name].mul_(column[:, None] if linear.transposed else column)
    assert folded >= 4
    assert torch.allclose(model(tokens).logits, before, atol=1e-4 * float(before.abs().max()), rtol=0)


def test_what_lies_before_each_layer() -> None:
    found = {linear.name: site for site in sites_of(subjects(["llama"])[0].config) for linear in site.linears}
    layer = "model.layers.0."
    attention, values = found[f"{layer}self_attn.q_proj.weight"], found[f"{layer}self_attn.o_proj.weight"]
    assert [linear.name.split(".")[-2] for linear in attention.linears] == ["q_proj", "k_proj", "v_proj"]
    assert attention.fold is not None and attention.fold.weight == f"{layer}input_layernorm.weight"
    assert values.fold is not None and values.fold.weight == f"{layer}self_attn.v_proj.weight"
    # Two query heads read each key head's values: 64 channels of 32 rows, a head of 16 twice each.
    assert values.fold.rows.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


def test_reasons() -> None:
    reasons = {site.linears[0].name: site.reason for site in sites_of(subjects(["gpt2"])[0].config)}
    assert "takes no scale" in reasons["transformer.h.0.mlp.c_proj.weight"]
    assert (
        next(s for s in sites_of(subjects(["gpt2"])[0].config) if s.linears[0].apart).linears[0].name
        == "lm_head.weight"
    )
    reasons = {site.linears[0].name: site.reason for site in sites_of(subjects(["mixtral"])[0].config)}
    assert "is read by" in reasons["model.layers.0.mlp.gate.weight"]
