"""The stages of a CUDA build and the cache, with the back end replaced: no GPU, nothing compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts.manifest import Buffer
from ingot.compiler import stages as module
from ingot.compiler.cache.session import Session
from ingot.compiler.cache.store import CacheStore
from ingot.compiler.console import SilentProgress
from ingot.compiler.facts import BuildFacts, EngineFacts, WeightFacts
from ingot.compiler.recipe import Recipe
from ingot.compiler.recipe_sections import Target
from ingot.compiler.stages import Stages

RECIPE = Recipe("demo", target=Target(device="cuda"))
NAMES = [shape.name for shape in RECIPE.engines()]


def facts(graph: str = "g") -> BuildFacts:
    buffers = (Buffer("tokens", (1,), "int64"),)
    outputs = (Buffer("next_tokens", (1,), "int64"), Buffer("logits", (1, 320), "float32"))
    known = EngineFacts(graph, buffers, outputs, {"w": WeightFacts((4, 4), "float32", "stored")}, {}, [], {})
    return BuildFacts(RECIPE, None, dict.fromkeys(NAMES, known))


class Compiler:
    """In the place of the back end: one cubin that all engines share, and a plan each."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, plan: Any, root: Path, progress: Any, tuning: Path | None) -> dict[str, Any]:
        self.made += 1
        cubin = "engines/kernels/linear-0123456789ab.cubin"
        (root / cubin).parent.mkdir(parents=True)
        (root / cubin).write_bytes(b"cubin")
        for name in NAMES:
            (root / "engines" / f"{name}.plan.json").write_text(name)
        engine = {"weights": ("w",), "libraries": (cubin,), "arena_bytes": 1024}
        return {"engines": dict.fromkeys(NAMES, engine), "tuning": {"linear": {"warps": 4}}}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(module, "compile_cuda", made)
    monkeypatch.setattr(Stages, "_graph", lambda *args: None)
    monkeypatch.setattr(module.toolchain, "gpu", lambda: {"name": "H100", "compute": "9.0", "problem": ""})
    return made


def engines(tmp_path: Path, folder: str, graph: str = "g", tuning: Path | None = None) -> Any:
    config = tmp_path / "config.json"
    config.write_text("{}")
    root = tmp_path / folder
    (root / "engines").mkdir(parents=True)
    shop: Any = lambda: type("Workshop", (), {"plan": lambda self: None})()  # noqa: E731
    session = Session(CacheStore(tmp_path / "cache"))
    return Stages(RECIPE, config, session, shop, SilentProgress(), tuning=tuning).engines(facts(graph), root)


def test_plans_and_cubins_come_back_where_they_were(compiler: Compiler, tmp_path: Path) -> None:
    first, second = engines(tmp_path, "one"), engines(tmp_path, "two")
    assert compiler.made == 1
    assert first == second
    assert [entry.file for entry in second.entries] == [f"engines/{name}.plan.json" for name in NAMES]
    assert second.tuning == {"linear": {"warps": 4}}
    for path in ("engines/kernels/linear-0123456789ab.cubin", *(entry.file for entry in second.entries)):
        assert (tmp_path / "two" / path).read_bytes() == (tmp_path / "one" / path).read_bytes()


def test_another_graph_gpu_or_tuning_is_compiled_anew(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines(tmp_path, "one")
    engines(tmp_path, "two", graph="h")
    assert compiler.made == 2
    choices = tmp_path / "tuning.json"
    choices.write_text("{}")
    engines(tmp_path, "three", tuning=choices)
    engines(tmp_path, "four", tuning=choices)
    assert compiler.made == 3
    monkeypatch.setattr(module.toolchain, "gpu", lambda: {"name": "H200", "compute": "9.0", "problem": ""})
    engines(tmp_path, "five")
    assert compiler.made == 4


def test_a_graph_without_words_is_compiled_each_time(compiler: Compiler, tmp_path: Path) -> None:
    engines(tmp_path, "one", graph="")
    engines(tmp_path, "two", graph="")
    assert compiler.made == 2
