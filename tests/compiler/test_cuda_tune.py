"""The tuner's memory: what it believes of a cache, and what it does when nothing runs. Nothing is launched."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.artifacts.errors import ResourceError
from ingot.runtime.ops.cuda.spec import Config, Operands, TensorSpec

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

OPERANDS = Operands({"x": TensorSpec((1, 8), (8, 1), "bfloat16")}, {}, {}, frozenset({"x"}))
CONFIGS: list[Config] = [{"block": 1}, {"block": 2}, {"block": 4}]


class _Provider:
    """Stands for a provider's module."""

    __file__ = __file__

    def candidates(self, operands: Operands) -> list[Config]:
        return CONFIGS


PROVIDER: Any = _Provider()


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Sequence[float]], Any]:
    """Measures the given times for the three configurations and keeps them; returns a tuner over the same cache."""
    from ingot.compiler.backends.cuda import tune
    from ingot.compiler.backends.cuda.lower import Call

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "compile_ahead", lambda store, calls: None)

    def measured(times: Sequence[float]) -> Any:
        monkeypatch.setattr(tune, "measure", lambda *arguments: list(times))
        store: Any = None
        tuner = tune.Tuner(store, tmp_path / "deep" / "tuning.json")
        tuner.prepare([[Call("op", PROVIDER, OPERANDS)]])
        tuner.save()
        return tune.Tuner(store, tmp_path / "deep" / "tuning.json")

    return measured


def test_the_fastest_is_taken_and_remembered(tuned: Callable[[Sequence[float]], Any]) -> None:
    tuner = tuned([3.0, 1.0, 2.0])
    assert tuner("op", PROVIDER, OPERANDS) == {"block": 2}
    assert list(tuner.chosen.values()) == [{"block": 2}]


def test_what_cannot_run_is_not_taken(tuned: Callable[[Sequence[float]], Any]) -> None:
    assert tuned([float("inf"), float("inf"), 9.0])("op", PROVIDER, OPERANDS) == {"block": 4}


def test_nothing_that_runs_is_an_error(tuned: Callable[[Sequence[float]], Any]) -> None:
    with pytest.raises(ResourceError, match="no configuration of op"):
        tuned([float("inf")] * 3)


@pytest.mark.parametrize("content", ["", "[]", "5", '{"a"', "[" * 100_000, "\x00\xff"])
def test_a_cache_that_is_none_is_measured_anew(
    tuned: Callable[[Sequence[float]], Any], tmp_path: Path, content: str
) -> None:
    path = tmp_path / "deep" / "tuning.json"
    path.parent.mkdir()
    path.write_text(content)
    assert tuned([3.0, 1.0, 2.0])("op", PROVIDER, OPERANDS) == {"block": 2}


@pytest.mark.parametrize("entry", [5, [], {}, {"config": 3}, {"config": {}}, {"config": {"block": 3}}])
def test_a_choice_that_is_no_candidate_is_not_believed(
    tuned: Callable[[Sequence[float]], Any], tmp_path: Path, entry: object
) -> None:
    tuned([3.0, 1.0, 2.0])
    path = tmp_path / "deep" / "tuning.json"
    path.write_text(json.dumps({key: entry for key in json.loads(path.read_text())}))
    assert tuned([3.0, 2.0, 1.0])("op", PROVIDER, OPERANDS) == {"block": 4}


class _Company:
    """A stopwatch for which the last of two launches is slow beside a first one of more than block 1."""

    def __init__(self, calls: Sequence[Operands], context: int) -> None:
        self._count = len(calls)

    def __enter__(self) -> _Company:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def time(self, store: object, lowerings: Sequence[Config]) -> float:
        first, *others = (int(config["block"]) for config in lowerings)
        return first + sum(10 / block + 100 * (first == 1) for block in others)


def test_a_layer_chooses_by_its_time_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.compiler.backends.cuda import tune
    from ingot.compiler.backends.cuda.lower import Call

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "compile_ahead", lambda store, calls: None)
    # Alone the first configuration is the fastest of each.
    monkeypatch.setattr(tune, "measure", lambda *arguments: [1.0, 2.0, 3.0])
    monkeypatch.setattr(tune, "Stopwatch", _Company)
    monkeypatch.setattr(_Provider, "lower", lambda self, operands, config: config, raising=False)
    store: Any = None
    tuner = tune.Tuner(store)
    attention, product = (Call(op, PROVIDER, OPERANDS) for op in ("ingot.attention_step", "ingot.fused_linear"))
    tuner.prepare([[product, attention, product, attention, product], [product]])
    assert tuner(attention.op, PROVIDER, OPERANDS) == {"block": 2}
    assert tuner(product.op, PROVIDER, OPERANDS) == {"block": 4}


def test_a_layer_goes_from_attention_to_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.compiler.backends.cuda.lower import Call
    from ingot.compiler.backends.cuda.tune import layers

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    a, b, c = (Call(op, PROVIDER, OPERANDS) for op in ("ingot.attention_step", "ingot.b", "ingot.c"))
    assert layers([b, a, b, a, b, a, c, a, b]) == [[a, b], [a, c]]
    assert layers([b, c]) == layers([b, a, c]) == []
