"""The accuracy report: how a text is cut, what is measured, what fails a build, what is shown."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.artifacts.errors import UsageError
from ingot.artifacts.manifest import load_manifest
from ingot.compiler import accuracy, accuracy_facts
from ingot.compiler.console import SilentProgress
from ingot.compiler.model_weights import open_weights
from ingot.compiler.plan import Plan, make_plan
from ingot.compiler.recipe import load_recipe
from ingot.compiler.task import _reference_match

from ..conftest import Demo


@pytest.fixture(scope="module")
def planned(demo: Demo) -> tuple[Plan, Any]:
    """The demo's plan, and what loads its weights."""
    plan, model = make_plan(load_recipe(demo.recipe, ["gate.accuracy_tokens=300"]), SilentProgress())
    return plan, open_weights(model, plan.folder, "float32", 0).load


# --- a text in windows -----------------------------------------------------------------------------------------------


@given(
    st.integers(0, 400), st.lists(st.integers(-3, -1), max_size=3), st.integers(1, 300), st.integers(8, 600)
)  # fmt: skip
def test_every_position_is_predicted_once_behind_its_own_context(
    length: int, lead: list[int], positions: int, longest: int
) -> None:
    ids = list(range(length))
    windows = accuracy.cut("text", ids, lead, positions, longest)
    predicted = [t for s, p in zip(windows.sequences, windows.prompts) for t in s[p:]]
    skipped = max(min(longest, 512) // 8 - len(lead), 0 if lead else 1)
    assert predicted == ids[skipped : skipped + positions]
    assert windows.positions == len(predicted)
    for sequence, prompt in zip(windows.sequences, windows.prompts):
        assert prompt >= 1
        assert sequence[: len(lead)] == lead
        assert len(sequence) <= min(longest, 512)
        text = sequence[len(lead) :]
        assert text == list(range(text[0], text[0] + len(text)))


def test_a_text_is_read_with_the_tokenizers_own_beginning(demo: Demo, planned: tuple[Plan, Any]) -> None:
    windows = accuracy.accuracy_windows(planned[0], demo.model / "tokenizer.json", 10_000)
    assert windows.positions == 300
    assert all(sequence[0] == 1 and 1 not in sequence[1:] for sequence in windows.sequences)
    assert windows.source == "accuracy.txt"
    without = accuracy.accuracy_windows(planned[0], None, 10_000)
    assert (without.source, without.positions) == ("random tokens", 300)
    assert without.digest == accuracy.accuracy_windows(planned[0], None, 10_000).digest != windows.digest


def test_a_text_that_is_too_short_is_refused(demo: Demo, planned: tuple[Plan, Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon")
    (tmp_path / "recipe.toml").write_text(demo.recipe.read_text() + 'accuracy_text = "short.txt"\n')
    recipe = load_recipe(tmp_path / "recipe.toml", [], str(demo.model))
    plan = replace(planned[0], recipe=recipe)
    with pytest.raises(UsageError, match="too short") as caught:
        accuracy.accuracy_windows(plan, demo.model / "tokenizer.json", 10_000)
    assert "short.txt" in str(caught.value)
    off = replace(plan, recipe=replace(recipe, gate=replace(recipe.gate, accuracy_tokens=0)))
    assert accuracy.accuracy_windows(off, demo.model / "tokenizer.json", 10_000).positions == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "float32"),
        (["model.dtype=bfloat16"], "bfloat16"),
        (["quantization.scheme=W8A16"], "W8A16"),
        (["quantization.scheme=W4A16", "quantization.group_size=32", "quantization.symmetric=false"],
         "W4A16 g32 rtn asymmetric"),
        (["quantization.scheme=W4A16", "quantization.group_size=0"], "W4A16 per channel rtn"),
    ],
)  # fmt: skip
def test_a_scheme_has_a_name(demo: Demo, settings: list[str], said: str) -> None:
    assert accuracy.scheme(load_recipe(demo.recipe, settings)) == said


def test_groups_are_named_in_order(demo: Demo, tmp_path: Path) -> None:
    groups = '[[quantization.groups]]\nscheme = "W4A16"\ngroup_size = 64\ntargets = ["re:.*mlp.*"]\n'
    groups += '[[quantization.groups]]\nscheme = "none"\ntargets = ["lm_head"]\n'
    groups += '[[quantization.groups]]\nscheme = "W8A16"\n'
    (tmp_path / "recipe.toml").write_text(demo.recipe.read_text() + groups)
    assert accuracy.scheme(load_recipe(tmp_path / "recipe.toml")) == "W4A16 g64 rtn + W8A16"


def test_the_bundled_text_is_long_enough_for_a_large_vocabulary() -> None:
    words = accuracy.ACCURACY_TEXT.read_text("utf-8")
    # Tokenizers of 128,000 words take some four characters of English a token.
    assert len(words) / 4.3 > 2048 + 64


@pytest.mark.parametrize(
    ("settings", "parameters", "wanted"),
    [
        ([], 10_000_000, 2048), ([], 1_000_000_000, 512), (["target.device=cuda"], 1_000_000_000, 2048),
        (["gate.accuracy_tokens=0"], 10_000_000, 0), (["gate.accuracy_tokens=4096"], 1_000_000_000, 4096),
    ],
)  # fmt: skip
def test_how_many_tokens_are_predicted(demo: Demo, settings: list[str], parameters: int, wanted: int) -> None:
    assert accuracy.tokens_wanted(load_recipe(demo.recipe, settings), parameters) == wanted


# --- what is measured ------------------------------------------------------------------------------------------------


def test_a_lossless_artifact_loses_nothing(demo: Demo, planned: tuple[Plan, Any]) -> None:
    plan, load = planned
    windows = accuracy.accuracy_windows(plan, demo.model / "tokenizer.json", 10_000)
    report = accuracy.measure(plan, load, demo.artifact, load_manifest(demo.artifact), windows)
    found = report["engine"]
    assert found["tokens"] == report["positions"] == 300
    assert found["max_kl"] < 1e-6
    assert (found["top1"], report["eager"], report["windows"]) == (1.0, None, 3)
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert report["engines"] == ["prefill-c16", "decode-b1"]
    assert sum(bucket["count"] for bucket in report["kl_by_position"]) == 300
    json.dumps(report, allow_nan=False)


def test_what_other_weights_lose_is_what_transformers_says(demo: Demo, planned: tuple[Plan, Any]) -> None:
    """Against a reference with coarser weights: KL, top-1, perplexity and Δp by plain PyTorch over the same windows."""
    from transformers import AutoModelForCausalLM

    plan, load = planned
    plan = replace(plan, recipe=replace(plan.recipe, model=replace(plan.recipe.model, dtype="bfloat16")))

    def coarse(name: str) -> torch.Tensor:
        return (load(name) * 8).round() / 8

    windows = accuracy.accuracy_windows(plan, demo.model / "tokenizer.json", 10_000)
    report = accuracy.measure(plan, coarse, demo.artifact, load_manifest(demo.artifact), windows)
    sound = AutoModelForCausalLM.from_pretrained(demo.model, dtype="float32", attn_implementation="eager").eval()
    worse = AutoModelForCausalLM.from_pretrained(demo.model, dtype="float32", attn_implementation="eager").eval()
    kl, same, nll, base, delta = [], [], [], [], []
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.copy_((parameter * 8).round() / 8)
        for sequence, prompt in zip(windows.sequences, windows.prompts):
            ids = torch.tensor([sequence])
            p, q = (m(ids).logits[0, prompt - 1 : -1].double().log_softmax(-1) for m in (worse, sound))
            following = ids[0, prompt:, None]
            kl += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).tolist()
            same += (p.argmax(-1) == q.argmax(-1)).double().tolist()
            nll += (-q.gather(1, following)[:, 0]).tolist()
            base += (-p.gather(1, following)[:, 0]).tolist()
            delta += (q.gather(1, following).exp() - p.gather(1, following).exp())[:, 0].tolist()
    found = report["engine"]
    wanted = torch.tensor(kl, dtype=torch.float64)
    assert wanted.mean() > 1e-3, "the planted loss is one"
    assert found["mean_kl"] == pytest.approx(float(wanted.mean()), rel=1e-3)
    assert found["p99_kl"] == pytest.approx(float(wanted.quantile(0.99)), rel=1e-3)
    assert found["top1"] == pytest.approx(sum(same) / len(same), abs=1 / 300)
    gap = torch.tensor(nll, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    assert found["perplexity_ratio"] == pytest.approx(float(gap.mean().exp()), rel=1e-4)
    assert found["perplexity_ratio_error"] == pytest.approx(float(gap.mean().exp() * gap.std() / 300**0.5), rel=1e-2)
    assert found["rms_delta_p"] == pytest.approx(float(torch.tensor(delta).square().mean().sqrt()), rel=1e-3)
    assert report["eager"]["dtype"] == "bfloat16"
    assert 0 < report["eager"]["mean_kl"] < found["mean_kl"]
    worst = report["worst"][0]
    place = sum(len(s) - p for s, p in zip(windows.sequences[: worst["window"]], windows.prompts))
    place += worst["position"] - windows.prompts[worst["window"]]
    assert kl[place] == pytest.approx(max(kl), rel=1e-3)
    assert worst["kl"] == found["max_kl"]


def test_the_references_share_of_a_task_is_that_of_greedy_decoding(
    demo: Demo, planned: tuple[Plan, Any], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    plan, load = planned
    model = AutoModelForCausalLM.from_pretrained(demo.model, dtype="float32", attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    shutil.copy(demo.model / "tokenizer.json", tmp_path)
    prompts = [tokenizer.encode(text).ids for text in ("Once", "The quick", "lazy dog", "stars", "who liked to", "a")]
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3)
        said.append(out[0, len(prompt) :].tolist())
    answers = [tokenizer.decode(tokens[:2], skip_special_tokens=False) for tokens in said]
    for ends in ([], [said[0][2]], sorted({tokens[2] for tokens in said})):
        (tmp_path / "generation.json").write_text(json.dumps({"eos_token_ids": ends}))
        right = [
            tokens[2] in ends and tokenizer.encode(answer, add_special_tokens=False).ids == tokens[:2]
            for tokens, answer in zip(said, answers)
        ]
        assert _reference_match(plan, tmp_path, load, prompts, answers) == sum(right) / len(right)
    assert any(right)
    wrong = [answer + "x" for answer in answers]
    assert _reference_match(plan, tmp_path, load, prompts, wrong) == 0


# --- what fails a build, and what is shown ---------------------------------------------------------------------------


def report(**figures: float) -> dict[str, Any]:
    """A report of W8A16 in which everything is well but `figures`."""
    engine = {
        "tokens": 2048, "mean_kl": 1e-4, "mean_kl_error": 1e-5, "median_kl": 1e-6, "p99_kl": 1e-3, "p999_kl": 1e-2,
        "max_kl": 0.02, "top1": 0.99, "top1_error": 0.002, "perplexity": 4.0, "reference_perplexity": 4.0,
        "perplexity_ratio": 1.0, "perplexity_ratio_error": 1e-4, "rms_delta_p": 1e-3, "rms_delta_p_error": 1e-4,
        "finite": True,
    }  # fmt: skip
    return {"scheme": "W8A16", "reference": "r", "text": "t", "positions": 2048, "engine": {**engine, **figures},
            "eager": None}  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({}, ""),
        ({"mean_kl": 0.0051, "mean_kl_error": 0.0001}, ""),  # within two standard errors
        ({"mean_kl": 0.0053, "mean_kl_error": 0.0001}, "mean KL"),
        ({"top1": 0.96, "top1_error": 0.004}, "top-1 agreement"),
        ({"finite": False, "mean_kl": None}, "not finite"),
    ],
)
def test_a_loss_beyond_the_budget_is_told(demo: Demo, figures: dict[str, Any], said: str) -> None:
    recipe = load_recipe(demo.recipe, ["scheme=W8A16"])
    missed = accuracy.shortfalls(recipe, report(**figures))
    assert said in "; ".join(missed)
    assert bool(missed) == bool(said)


def test_the_models_own_rounding_is_no_fault(demo: Demo) -> None:
    recipe = load_recipe(demo.recipe, ["model.dtype=bfloat16"])
    found = report(mean_kl=0.004, top1=0.975)
    assert len(accuracy.shortfalls(recipe, found)) == 2
    found["eager"] = {"dtype": "bfloat16", **report(mean_kl=0.0041, top1=0.974)["engine"]}
    assert accuracy.shortfalls(recipe, found) == []


def test_facts_are_read_from_anything() -> None:
    found = report()
    found["eager"] = {"dtype": "bfloat16", "mean_kl": 2e-4, "top1": "high", "perplexity": float("nan")}
    gate = {"accuracy": found, "task": {"exact_match": 0.975, "items": 200, "reference_exact_match": 0.985}}
    assert accuracy_facts.accuracy_of(gate) is found
    assert accuracy_facts.columns(found) == ["artifact", "eager bfloat16"]
    rows = {name: cells for name, *cells in accuracy_facts.rows(found)}
    assert rows["mean KL"] == ["1.00e-04 ± 1.00e-05", "2.00e-04"]
    assert rows["top-1 agreement"] == ["99.00% ± 0.20%", ""]
    assert accuracy_facts.task_text(gate) == "97.5% exact of 200 (eager float32: 98.5%)"
    assert accuracy_facts.headline(gate)["mean_kl"] == 1e-4
    lossless = {"pairs": [{"mean_kl": 1e-12, "top1": 1.0}, {"mean_kl": 3e-12, "top1": 0.99}, "x"]}
    assert accuracy_facts.headline(lossless) == {"mean_kl": 3e-12, "top1": 0.99}
    broken: list[dict[str, Any]] = [{}, {"accuracy": 3}, {"accuracy": {"engine": []}}, {"task": [1], "pairs": {"a": 1}}]
    for hostile in broken:
        assert accuracy_facts.accuracy_of(hostile) is None
        assert accuracy_facts.headline(hostile) == {}
        assert accuracy_facts.task_text(hostile) == ""
