"""Mixed precision: the assignment is the cheapest there is, losses are the model's, and it beats one form for all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.calibrate.assign import Form, Unit, assign, average_bits
from ingot.compiler.calibrate.sensitivity import divergences, rounded
from ingot.compiler.calibrate.sites import find_sites
from ingot.compiler.calibrate.text import own_samples
from ingot.compiler.console import SilentProgress
from ingot.compiler.families import save_random_model, subjects
from ingot.compiler.load_model import make_model
from ingot.compiler.model_weights import open_weights
from ingot.compiler.pipelines import CLEANUP
from ingot.compiler.reference_model import ReferenceModel
from ingot.compiler.streamed_model import StreamedModel
from ingot.compiler.trace import trace
from ingot.passes.base import Context
from ingot.passes.manager import run_passes

RECIPES = Path(__file__).parents[3] / "recipes"
FORMS = (Form("none", 0, 16.0), Form("W8A16", 0, 8.1), Form("W4A16", 32, 4.5))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5), st.floats(0.01, 2)
)
def test_no_assignment_within_the_budget_is_cheaper(found: list[tuple[int, float, float]], budget: float) -> None:
    units = [Unit((str(i),), n, dict(zip(FORMS, (0.0, a, b)))) for i, (n, a, b) in enumerate(found)]
    chosen = assign(units, budget)
    assert sum(unit.losses[form] for unit, form in zip(units, chosen)) <= budget * (1 + 1e-9)
    # Losses are rounded up by up to a 2,048th of the budget each: what keeps that much less is all considered.
    strict = budget * (1 - len(units) / 2048)
    kept = [
        average_bits(units, forms)
        for forms in itertools.product(FORMS, repeat=len(units))
        if sum(unit.losses[form] for unit, form in zip(units, forms)) <= strict
    ]
    assert average_bits(units, chosen) <= min(kept) + 1e-9


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_divergence_is_that_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """Also where logits are bent behind the head (gemma2), and where the head is tied to the embedding (gpt2)."""
    config = subjects([family])[0].config
    model = save_random_model(config, tmp_path)
    weights = open_weights(make_model(config, "float32"), tmp_path, "float32", 0)
    streamed = StreamedModel(config, "float32", weights.load)
    tokens = torch.randint(3, 120, (3, 16), generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [n for n, p in parameters.items() if p.dim() == 2 and ("1." in n or "head" in n)]
    twins = [n for n, p in parameters.items() if any(p is parameters[name] for name in names)]
    form = Form("W4A16", 32, 4.5)
    chosen = [{names[0]: form}, dict.fromkeys(twins, form), {}]
    found = divergences(streamed, tokens, chosen, dict.fromkeys(twins, False))
    reference = torch.log_softmax(model(tokens).logits.double(), -1)
    for variant, value in zip(chosen, found):
        changed = {id(model.get_parameter(n)): n for n in variant}
        exact = {n: model.get_parameter(n).clone() for n in changed.values()}
        for name, weight in exact.items():
            model.get_parameter(name).copy_(rounded(weight, form, False))
        other = torch.log_softmax(model(tokens).logits.double(), -1)
        for name, weight in exact.items():
            model.get_parameter(name).copy_(weight)
        wanted = float((reference.exp() * (reference - other)).sum(-1).mean())
        assert value == pytest.approx(wanted, rel=1e-3, abs=1e-7)
    assert found[1] > found[0] > 0 and found[2] == pytest.approx(0, abs=1e-7)


def test_it_beats_uniform_int4_at_the_same_bits() -> None:
    """On the bundled model: no more bits than int4 by groups of 32 everywhere, and less KL on other text."""
    folder = RECIPES / "demo_model"
    config = json.loads((folder / "config.json").read_text())
    module = make_model(config, "float32")
    weights = open_weights(module, folder, "float32", 0)
    traced = trace(module, 1, 8)
    run_passes(traced, CLEANUP, Context("prefill", 1, 8))
    coarse, fine, eight = Form("W4A16", 0, 4.1), Form("W4A16", 32, 4.5), Form("W8A16", 0, 8.1)
    units, variants = [], []
    for site in find_sites(traced):
        names = tuple(linear.name for linear in site.linears)
        units.append(Unit(names, sum(x.n * x.k for x in site.linears), {Form("none", 0, 32.0): 0.0}))
        variants += [(units[-1], form) for form in (coarse, fine, eight)]

    def variant(pairs: list[tuple[Unit, Form]]) -> dict[str, Form]:
        chosen = {name: form for unit, form in pairs for name in unit.weights}
        tied = {"model.embed_tokens.weight": chosen["lm_head.weight"]} if "lm_head.weight" in chosen else {}
        return chosen | tied

    writer, model = ReferenceModel(config, "float32", weights.load), StreamedModel(config, "float32", weights.load)
    tokens, unseen = (own_samples(writer, config, n, 48, seed, SilentProgress()) for n, seed in ((6, 3), (16, 4)))
    stored = dict.fromkeys(variant([(unit, fine) for unit in units]), False)
    for (unit, form), loss in zip(variants, divergences(model, tokens, [variant([v]) for v in variants], stored)):
        unit.losses[form] = loss
    uniform = [(unit, fine) for unit in units]
    # The smallest budget that comes out at the bits of the uniform one.
    budgets = [sum(unit.losses[form] for unit, form in uniform) * share for share in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)]
    mixed = next(forms for b in budgets if average_bits(units, forms := assign(units, b)) <= 4.5)
    found = divergences(model, unseen, [variant(list(zip(units, mixed))), variant(uniform)], stored)
    assert found[0] < 0.8 * found[1]
