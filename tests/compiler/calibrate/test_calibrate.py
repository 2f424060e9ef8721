"""GPTQ and AWQ on a trained model, the bundled one: nearer than rounding to nearest, layer by layer and in all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.compiler.calibrate.layers import Method
from ingot.compiler.calibrate.run import CalibratedWeights, _in_place, calibrate, part_name
from ingot.compiler.calibrate.sites import Linear, Site, find_sites
from ingot.compiler.calibrate.store import FolderStore
from ingot.compiler.calibrate.text import own_samples
from ingot.compiler.console import SilentProgress
from ingot.compiler.load_model import make_model
from ingot.compiler.model_weights import ModelWeights, open_weights
from ingot.compiler.pipelines import CLEANUP
from ingot.compiler.reference_model import ReferenceModel
from ingot.compiler.streamed_model import StreamedModel
from ingot.compiler.trace import trace
from ingot.passes.base import Context
from ingot.passes.manager import run_passes
from ingot.passes.quantize.int4_grid import Int4Grid, decode
from ingot.runtime.ops.quantized import dequantize
from torch import Tensor

DEMO = Path(__file__).parents[3] / "recipes" / "demo_model"
Load = Callable[[str], Tensor]


@dataclass
class Subject:
    """The bundled model, calibration text, other text, and what is asked of it."""

    config: dict[str, Any]
    weights: ModelWeights
    sites: list[Site]
    tokens: Tensor
    unseen: Tensor

    @property
    def linears(self) -> list[Linear]:
        return [linear for site in self.sites for linear in site.linears if not linear.apart]

    def logits(self, load: Load) -> Tensor:
        model = ReferenceModel(self.config, "float32", load)
        found = model.logits(self.unseen.tolist(), [0] * len(self.unseen))
        return torch.stack([torch.from_numpy(x) for x in found])

    def inputs(self, load: Load, names: list[str]) -> dict[str, Tensor]:
        """Inputs of the layers that read these weights."""
        model, seen = ReferenceModel(self.config, "float32", load), {}
        for name in names:
            module = model.model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
        model.logits(self.unseen.tolist(), [0] * len(self.unseen))
        return seen


@pytest.fixture(scope="module")
def subject() -> Subject:
    config = json.loads((DEMO / "config.json").read_text())
    module = make_model(config, "float32")
    weights = open_weights(module, DEMO, "float32", 0)
    traced = trace(module, 1, 8)
    run_passes(traced, CLEANUP, Context("prefill", 1, 8))
    model = ReferenceModel(config, "float32", weights.load)
    tokens, unseen = (own_samples(model, config, n, 96, seed, SilentProgress()) for n, seed in ((64, 1), (32, 2)))
    return Subject(config, weights, find_sites(traced), tokens, unseen)


def quantized(subject: Subject, algorithm: Any, folder: Path, **options: Any) -> CalibratedWeights:
    methods = {x.name: Method(algorithm, Int4Grid(32), **options) for x in subject.linears}
    model = StreamedModel(subject.config, "float32", subject.weights.load)
    return calibrate(
        model, subject.weights.load, subject.tokens, subject.sites, methods, FolderStore(folder), SilentProgress()
    )


def dense(subject: Subject, made: CalibratedWeights) -> Load:
    """What a model with these weights computes with."""
    names = {x.name for x in subject.linears}

    def load(name: str) -> Tensor:
        if name not in names:
            return made.load(name)
        return dequantize(
            made.load(part_name(name, "values")), made.load(part_name(name, "scale")), None, "int4", [1, 32]
        )

    return load


def divergence(wanted: Tensor, found: Tensor) -> float:
    p, q = torch.log_softmax(wanted.double(), -1), torch.log_softmax(found.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def nearest(subject: Subject) -> Load:
    rounded = {x.name: decode(*Int4Grid(32).quantize(subject.weights.load(x.name).float())) for x in subject.linears}
    return lambda name: rounded[name] if name in rounded else subject.weights.load(name)


@pytest.mark.parametrize(("algorithm", "options"), [("gptq", {}), ("gptq", {"activation_order": True}), ("awq", {})])
def test_it_beats_rounding_to_nearest(
    algorithm: str, options: dict[str, Any], subject: Subject, nearest: Load, tmp_path: Path
) -> None:
    load = dense(subject, quantized(subject, algorithm, tmp_path, **options))
    wanted = subject.logits(subject.weights.load)
    assert divergence(wanted, subject.logits(load)) < 0.95 * divergence(wanted, subject.logits(nearest))
    # The first layer's inputs, quantized or not, are the model's own.
    store, layer = FolderStore(tmp_path), "model.layers.0"
    assert store.has(layer)
    linears = {x.name: x for x in subject.linears if x.name.startswith(f"{layer}.")}
    names = list(linears)
    assert len(names) == 7
    ratios = {}
    for name, inputs in subject.inputs(subject.weights.load, names).items():
        weight = subject.weights.load(name).float()
        errors = [
            (inputs @ (found - weight).t()).square().sum()
            for found in (_in_place(store, layer, linears[name]), nearest(name))
        ]
        ratios[name] = float(errors[0] / errors[1])
    assert max(ratios.values()) < 1.0, ratios
    assert sum(ratios.values()) / len(ratios) < 0.9, ratios


def test_an_interrupted_run_goes_on(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantized(subject, "gptq", tmp_path / "whole")
    from ingot.compiler.calibrate import run

    done: list[int] = []
    original = run.quantize_layer

    def counted(*args: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args)

    monkeypatch.setattr(run, "quantize_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        quantized(subject, "gptq", tmp_path / "parts")
    # One of the two finished layers is damaged: it is done again, the other is not.
    damaged = sorted((tmp_path / "parts").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    done[:] = []
    monkeypatch.setattr(run, "quantize_layer", lambda *args: (done.append(1), original(*args))[1])
    again = quantized(subject, "gptq", tmp_path / "parts")
    assert len(done) == 4
    for linear in subject.linears:
        for output in ("values", "scale"):
            name = part_name(linear.name, output)
            assert torch.equal(whole.load(name), again.load(name)), name
    done[:] = []
    quantized(subject, "gptq", tmp_path / "parts")
    assert done == []
