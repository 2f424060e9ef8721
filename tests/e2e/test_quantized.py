"""One artifact with every scheme in it and a quantized KV cache: compiled, run by a lean process, and gated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingot.artifacts.errors import GateError
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import check, load_manifest
from ingot.compiler.backends import aoti, cpu_kernels
from ingot.compiler.builder import build
from ingot.compiler.console import SilentProgress
from ingot.compiler.eager_engines import EagerGroup
from ingot.compiler.gate import engine_pairs, plan_tokens, replay_in_child
from ingot.compiler.metrics import compare
from ingot.compiler.model_weights import open_weights
from ingot.compiler.plan import make_plan
from ingot.compiler.recipe import load_recipe
from ingot.runtime import LLM, SamplingParams
from ingot.runtime.replay import Pair, replay

from ..conftest import Demo

RECIPE = """
name = "mixed"
[model]
path = "model"
max_length = 64
[shapes]
decode_batch_sizes = [4]
prefill_lengths = [16]
kv_block_size = 8
kv_cache_dtype = "fp8"
[[quantization.groups]]
scheme = "W8A16"
targets = ["lm_head", "Embedding"]
[[quantization.groups]]
scheme = "W8A8"
targets = ["re:layers[.]0[.]self_attn"]
[[quantization.groups]]
scheme = "FP8"
targets = ["re:layers[.]0[.]mlp"]
[[quantization.groups]]
scheme = "FP8-W8A16"
targets = ["re:layers[.]1[.]self_attn"]
[[quantization.groups]]
scheme = "W4A16"
group_size = 32
symmetric = false
[gate]
prompts = ["Once upon a time", "The quick brown fox", "Ein kleiner"]
max_tokens = 16
accuracy_tokens = 100
"""


@pytest.fixture(scope="module")
def mixed(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recipe, its model, and the artifact `out`."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(demo.model, folder / "model")
    (folder / "recipe.toml").write_text(RECIPE)
    build(load_recipe(folder / "recipe.toml"), folder / "out", progress=SilentProgress())
    return folder


@pytest.fixture(scope="module")
def manifest(mixed: Path) -> Manifest:
    return load_manifest(mixed / "out")


def test_the_artifact_is_whole_and_needs_no_torch(mixed: Path, manifest: Manifest) -> None:
    assert check(mixed / "out") == []
    assert manifest.target.host_library == "none"
    assert manifest.kv_cache.dtype == "float8_e4m3fn"
    assert {"int8", "uint8", "float8_e4m3fn"} <= {t.dtype for t in tensors(mixed / "out", manifest)}
    kept = {"float32" if "cache" not in b.name else b.dtype for e in manifest.engines for b in e.inputs}
    assert kept == {"float32", "float8_e4m3fn"}


def tensors(folder: Path, manifest: Manifest) -> list[Any]:
    from ingot.runtime.weights import map_weights

    return list(map_weights(folder / path for path in manifest.weights).values())


def test_the_engines_compute_what_the_ops_mean(mixed: Path, manifest: Manifest) -> None:
    recipe = load_recipe(mixed / "recipe.toml")
    plan, model = make_plan(recipe, SilentProgress())
    weights = open_weights(model, plan.folder, "float32", 0)
    tokens = plan_tokens(plan, mixed / "out" / "tokenizer.json")
    [pair] = engine_pairs(recipe)
    rows = replay_in_child(mixed / "out", manifest, [pair], tokens)[0]
    group = EagerGroup(plan.graphs, weights.load)
    wanted = replay(group.engines, manifest.kv_cache, Pair(*pair), tokens.sequences, tokens.prompts)
    found: list[np.ndarray] = [
        np.array(next(values for number, values in rows if number == i)) for i in range(len(wanted))
    ]
    distance = compare(wanted, found)
    lost = manifest.gate["pairs"][0]["mean_kl"]
    # Where a sum rounds otherwise, an activation may become the next number of its 8 bits.
    assert lost > 0
    assert distance.mean_kl < lost / 20 and distance.top1 > 0.95


def test_it_generates(mixed: Path) -> None:
    with LLM(mixed / "out") as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        alone = [llm.generate(p, params)[0].outputs[0].token_ids for p in ("Once upon a time", "The quick")]
        together = [o.outputs[0].token_ids for o in llm.generate(["Once upon a time", "The quick"], params)]
    assert alone == together and all(len(ids) == 24 for ids in alone)


def test_a_gate_that_fails_names_the_worst_layers(
    mixed: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = {engine.name: engine.constants for engine in manifest.engines}

    def compile_engine(traced: Any, name: str, output: Path, *args: Any, **options: Any) -> Any:
        shutil.copyfile(mixed / "out" / "engines" / f"{name}.so", output)
        return constants[name]

    def compile_kernels(output: Path, **options: Any) -> None:
        shutil.copyfile(mixed / "out" / "engines" / output.name, output)

    monkeypatch.setattr(aoti, "compile_engine", compile_engine)
    monkeypatch.setattr(cpu_kernels, "compile_kernels", compile_kernels)
    recipe = load_recipe(mixed / "recipe.toml", ["gate.budgets.mean_kl=1e-9"])
    with pytest.raises(GateError) as caught:
        build(recipe, tmp_path / "out", progress=SilentProgress())
    assert "the numeric gate failed" in caught.value.what
    assert "pass 'quantize-" in caught.value.why
    assert "the layers that are off the most: model.layers.1.mlp." in caught.value.why
    assert "(int4, off by " in caught.value.why
    assert not (tmp_path / "out").exists()
