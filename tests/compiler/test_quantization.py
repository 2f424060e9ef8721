"""Quantized plans of real families, run eagerly against their unquantized selves; and what is refused before work."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ingot.artifacts.errors import UsageError
from ingot.compiler import quantization
from ingot.compiler.console import SilentProgress
from ingot.compiler.eager_engines import EagerGroup
from ingot.compiler.evaluate import step_inputs
from ingot.compiler.families import MAX_LENGTH, recipe_for, subjects
from ingot.compiler.load_model import make_model
from ingot.compiler.metrics import Distance, compare
from ingot.compiler.model_weights import open_weights
from ingot.compiler.pipelines import PIPELINE
from ingot.compiler.plan import context_for, make_plan
from ingot.compiler.quantization import fitting
from ingot.compiler.recipe import Recipe
from ingot.compiler.recipe_sections import Group, Quantization, Target
from ingot.compiler.trace import trace
from ingot.passes.graph import TracedGraph, copy_graph
from ingot.passes.manager import run_passes
from ingot.passes.quantize.schemes import SCHEMES

TOKENS = [[(7 * i) % 120 + 3 for i in range(16)]]


def stored(traced: TracedGraph) -> set[str]:
    """Names of the graph's weights, whatever layout the target has put them in."""
    return {name.removesuffix("__packed") for name in traced.weights.entries}


class Family:
    """A family's tiny model with lively weights, traced once: the prefill engine of any recipe, run eagerly."""

    def __init__(self, name: str, tmp: Path) -> None:
        (tmp / "config.json").write_text(json.dumps(subjects([name])[0].config))
        self.recipe = recipe_for(tmp, name.replace("_", "-"), "random")
        self.model = make_model(subjects([name])[0].config, "float32")
        self.traced = trace(self.model, 1, 16)
        self.plain = self.logits(self.recipe)[1]

    def load(self, name: str) -> torch.Tensor:
        # Random weights of 0.02 say next to nothing: every logit would be the same.
        value = open_weights(self.model, None, "float32", 0).load(name)
        return value * 5 if value.dim() > 1 else value

    def asking(self, **asked: Any) -> Recipe:
        return dataclasses.replace(self.recipe, quantization=Quantization(**asked))

    def logits(self, recipe: Recipe) -> tuple[TracedGraph, np.ndarray]:
        """The planned graph and the logits [1, vocabulary] of the last of TOKENS."""
        [shape] = [e for e in recipe.engines() if e.phase == "prefill"]
        traced = copy_graph(self.traced)
        run_passes(traced, PIPELINE, context_for(recipe, shape))
        engine = EagerGroup({shape.name: traced}, self.load).engines[shape.name]
        for key, value in step_inputs(TOKENS, [0], 16, -(-MAX_LENGTH // 8), 8).items():
            engine.inputs[key][...] = value.numpy()
        engine.run()
        return traced, engine.logits()

    def distance(self, **asked: Any) -> tuple[TracedGraph, Distance]:
        """From the unquantized logits to those with this quantization."""
        traced, found = self.logits(self.asking(**asked))
        return traced, compare([self.plain], [found])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return functools.cache(lambda name: Family(name, tmp_path_factory.mktemp(name)))


# Measured on these weights: 8 bits up to 0.003, 4 bits up to 0.3.
def check(family: Family, scheme: str) -> None:
    traced, distance = family.distance(scheme=scheme, group_size=32, targets=("Linear", "Embedding"))
    assert distance.finite
    assert 0 < distance.mean_kl < (1.0 if SCHEMES[scheme].bits == 4 else 0.01)
    assert any(name.endswith(f"__{SCHEMES[scheme].format}") for name in stored(traced))


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_scheme_on_a_real_model(family: Callable[[str], Family], scheme: str) -> None:
    check(family("llama"), scheme)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_oss"])
def test_other_families(family: Callable[[str], Family], name: str) -> None:
    """Tied heads, matrices stored the other way round, routers and experts."""
    check(family(name), "W4A16")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_cache(family: Callable[[str], Family], kind: Any) -> None:
    subject = family("llama")
    shapes = dataclasses.replace(subject.recipe.shapes, kv_cache_dtype=kind)
    found = subject.logits(dataclasses.replace(subject.recipe, shapes=shapes))[1]
    assert 0 < compare([subject.plain], [found]).mean_kl < 0.01


def test_groups_mix_and_what_is_merged_agrees(family: Callable[[str], Family]) -> None:
    groups = (
        Group("W8A16", ("Embedding", "re:v_proj")), Group("none", ("re:layers[.]1[.]",)), Group("W4A16", group_size=32),
    )  # fmt: skip
    traced, distance = family("llama").distance(groups=groups)
    assert 0 < distance.mean_kl < 1.0
    first, second = (f"model__layers__{i}__self_attn__" for i in range(2))
    assert {
        f"{first}q_proj__weight__and__k_proj__int4", f"{first}v_proj__weight__int8",
        f"{second}q_proj__weight__and__k_proj", f"{second}v_proj__weight__int8",
    } <= stored(traced)  # fmt: skip


def refused(recipe: Recipe) -> UsageError:
    with pytest.raises(UsageError) as caught:
        make_plan(recipe, SilentProgress())
    return caught.value


def test_a_scheme_without_a_kernel_is_refused_with_those_that_fit(
    family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a target with kernels for int8 and int4 weights alone."""
    assert fitting("cuda") == list(SCHEMES)
    monkeypatch.setattr(quantization, "CUDA_FORMATS", {("int8", ""), ("int4", "")})
    recipe = dataclasses.replace(family("llama").asking(scheme="W8A8"), target=Target("cuda"))
    known = fitting("cuda")
    assert known == ["W8A16", "W4A16"]
    error = refused(recipe)
    assert "'W8A8' has no kernel for cuda" in error.what
    assert error.why.endswith(", ".join(["none", *known]))
    assert fitting("cpu") == list(SCHEMES)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cache_without_a_kernel_is_refused(
    family: Callable[[str], Family], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "CUDA_CACHE_DTYPES", frozenset())
    recipe = family("llama").recipe
    shapes = dataclasses.replace(recipe.shapes, kv_cache_dtype=kind)
    error = refused(dataclasses.replace(recipe, shapes=shapes, target=Target("cuda")))
    assert f"shapes.kv_cache_dtype {kind!r} has no kernel for cuda" in error.what


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does(family: Callable[[str], Family]) -> None:
    error = refused(family("llama").asking(scheme="W4A16", group_size=64))
    assert "quantization.group_size = 64 does not divide the 96 columns" in error.what
    assert "down_proj" in error.what and "group_size = 32" in error.fix and "quantization.ignore" in error.fix


def test_words_without_effect_are_refused(family: Callable[[str], Family]) -> None:
    assert "quantization.ignore has no effect" in refused(family("llama").asking(ignore=("lm_head",))).what
    error = refused(family("llama").asking(scheme="W8A16", targets=("nothing",)))
    assert "reached no weight" in error.what and "'nothing'" in error.why
