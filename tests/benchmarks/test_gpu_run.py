"""Measuring on a GPU with workers that make their times up: what is asked, kept, resumed, and left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts.errors import ResourceError, UsageError
from ingot.artifacts.manifest import CacheLayer
from ingot.benchmarks import __main__ as command
from ingot.benchmarks import builds, command_line, gpu_run, run, subjects
from ingot.benchmarks.budget import Budget, OutOfTime
from ingot.benchmarks.gpu_ceilings import Ceilings, gpu_ceilings
from ingot.benchmarks.results import Build, Matmul, Model, Pass, Report
from ingot.benchmarks.workload import decode, prefill
from ingot.runtime.weights import StoredTensor, WeightsFile

from .hand_made import engine, manifest

GPU = [s for s in subjects.SUBJECTS if s.device == "cuda"]
WEIGHTS = ("lm_head__weight", "down")
LOADS = (decode(16, tokens=4), decode(16, 4, tokens=4), decode(500, tokens=4, peers=False), prefill(32))


@dataclass
class Fake:
    """Stands in for every child. `times` are seconds by "op batch"; a message in their place is an error."""

    times: dict[str, float | str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    starts: list[float | str] = field(default_factory=lambda: [9.0, 1.0, 2.0])
    max_length: int = 64

    def worker(self, module: str, *arguments: str, device: str = "cpu") -> FakeWorker:
        assert device == "cuda"
        name = module.rpartition(".")[2]
        self.opened.append(name)
        return FakeWorker(self, name)

    def start(self, name: str, program: list[str], device: str, timeout: float) -> tuple[float, int]:
        found = self.starts.pop(0)
        if isinstance(found, str):
            raise ResourceError(found)
        return found, 1000


@dataclass
class FakeWorker:
    fake: Fake
    name: str

    def ask(self, request: Mapping[str, Any], timeout: float = 0.0) -> dict[str, Any]:
        assert timeout > 0
        rows = len(request["prompts"]) if "prompts" in request else request.get("batch", 1)
        key = f"{request['op']} {rows}"
        self.fake.asked.append((self.name, key))
        found = self.fake.times.get(key, 0.5)
        if isinstance(found, str):
            raise ResourceError(found)
        return {"seconds": found}

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        return None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    layers = (CacheLayer((2, 8), (2, 8), 0),)
    built = manifest(WEIGHTS, layers)
    tensors = {"lm_head__weight": (100, 8), "down": (8, 32)}
    stored = {n: StoredTensor(0, 2 * a * b, (a, b), "bfloat16") for n, (a, b) in tensors.items()}

    def ensure(*arguments: object) -> tuple[object, Build]:
        engines = (*built.engines[1:], engine("decode-b4", "decode", 4, 1, WEIGHTS))
        facts = replace(built.model, max_length=made.max_length)
        return replace(built, engines=engines, model=facts), Build(10.0, 100, 100, reused=True)

    monkeypatch.setattr(gpu_run, "ensure_artifact", ensure)
    monkeypatch.setattr(gpu_run, "newer_sources", lambda folder: False)
    monkeypatch.setattr(gpu_run, "describe", lambda *arguments: None)
    monkeypatch.setattr(gpu_run, "read_headers", lambda paths: [WeightsFile(Path(), 0, b"", stored)])
    monkeypatch.setattr(gpu_run, "Worker", made.worker)
    monkeypatch.setattr(gpu_run, "start_once", made.start)
    return made


def subject() -> subjects.Subject:
    return replace(next(s for s in GPU if s.name == "llama-3.2-1b"), workloads=LOADS, goals=())


def options(**keys: Any) -> run.Options:
    return run.Options(Path(), None, keys.pop("peers", ()), 2, **keys)


def measured(fake: Fake, model: Model | None = None, **keys: Any) -> Model:
    chosen = subject()
    model = run.begin(chosen) if model is None else model
    gpu_run.measure_gpu(chosen, model, options(**keys), lambda text: None)
    return model


@pytest.mark.parametrize("chosen", GPU, ids=lambda s: s.name)
def test_every_gpu_subject_has_engines_and_room_for_its_tests_and_goals_of_them(chosen: subjects.Subject) -> None:
    recipe = builds.open_recipe(chosen, None)
    recipe.check_source()
    assert (recipe.name, recipe.target.device, recipe.model.dtype) == (chosen.name, "cuda", "bfloat16")
    shapes, block = recipe.shapes, recipe.shapes.kv_block_size
    for load in chosen.workloads:
        assert load.length <= recipe.model.max_length
        assert load.phase == "prefill" or load.batch in shapes.decode_batch_sizes
        assert load.phase == "decode" or load.tokens in shapes.prefill_lengths
        # Should the cache be as large as was compiled, and no larger, all rows fit.
        assert load.batch * -(-load.length // block) * block <= shapes.kv_cache_tokens
    names = {load.name for load in chosen.workloads}
    assert len(names) == len(chosen.workloads)
    assert {goal.test for goal in chosen.goals} <= {"", *names}
    assert chosen.folder == f"{chosen.name}-cuda"


def test_everything_is_measured_one_process_after_the_other(fake: Fake) -> None:
    fake.times = {"decode 1": 0.5, "batch 4": 1.0, "prefill 1": 0.25}
    model = measured(fake)
    assert not model.failed
    found = {(s.engine, s.test): s for s in model.series}
    one, four = found["ingot", "tg4 @ d16"], found["ingot", "tg4 @ d16 b4"]
    assert (one.samples, one.per_step, four.samples, four.per_step) == ([8.0, 8.0], 1, [16.0, 16.0], 4)
    # Weights once; for each row 18.5 tokens on average, of 2 heads, 8 + 8 wide, in two bytes.
    weights, cache = 2 * (800 + 256), 2 * 32 * 18.5
    assert (one.read_bytes, four.read_bytes) == (weights + cache, weights + 4 * cache)
    assert found["ingot", "pp32"].samples == [128.0, 128.0]
    assert found["ingot", "pp32"].flops > 2 * 256 * 32
    assert found["ingot", "start"].samples == [1.0, 2.0]
    assert fake.opened == ["ours"]
    assert [note for note in model.notes if "without it" in note] == [
        "tg4 @ d500: not measured, the artifact was built without it"
    ]


def test_peers_get_the_same_tests_but_those_kept_from_them(fake: Fake, tmp_path: Path) -> None:
    model = measured(fake, peers=("transformers", "gpt-fast"), gpt_fast=tmp_path, peer_batches=(1,), parts=("peers",))
    assert fake.opened == ["gpt_fast_peer", "transformers_gpu_peer"]
    assert {(s.engine, s.test) for s in model.series} == {
        ("gpt-fast", "tg4 @ d16"), ("transformers eager", "pp32"), ("transformers compiled", "tg4 @ d16"),
        ("transformers compiled", "pp32"),
    }  # fmt: skip
    every = measured(fake, peers=("transformers",), parts=("peers",))
    assert ("transformers compiled", "tg4 @ d16 b4") in {(s.engine, s.test) for s in every.series}
    assert all(s.read_bytes or s.flops for s in every.series)


def test_a_failure_is_noted_and_the_rest_goes_on_in_a_fresh_worker(fake: Fake) -> None:
    fake.times = {"batch 4": "out of luck"}
    model = measured(fake, parts=("speed",))
    assert "out of luck" in model.failed and "tg4 @ d16 b4" in model.failed
    assert {s.test for s in model.series} == {"tg4 @ d16", "pp32"}
    assert fake.opened == ["ours", "ours"]


def test_a_peers_failure_is_a_note(fake: Fake) -> None:
    fake.times = {"compiled prefill 1": "no such kernel"}
    model = measured(fake, peers=("transformers",), parts=("peers",))
    assert not model.failed
    assert any("no such kernel" in note for note in model.notes)


def test_a_start_that_fails_is_the_models_failure(fake: Fake) -> None:
    fake.starts = ["no GPU"]
    assert measured(fake, parts=("start",)).failed == "no GPU"


def test_what_an_earlier_run_has_in_full_is_not_measured_again(fake: Fake) -> None:
    model = measured(fake, parts=("speed",))
    model.series[-1].samples.pop()
    fake.asked.clear()
    measured(fake, model, parts=("speed",))
    assert {key for _, key in fake.asked} == {"prefill 1"}
    assert all(len(s.samples) == 2 for s in model.series)


def test_only_the_tests_that_were_named(fake: Fake) -> None:
    model = measured(fake, tests=("pp32",), parts=("speed",))
    assert [s.test for s in model.series] == ["pp32"]


def test_nothing_is_begun_when_the_time_is_used_up(fake: Fake) -> None:
    model = measured(fake, budget=Budget(0))
    assert not model.failed and not model.series and not fake.opened
    assert "time was used up" in model.notes[0]
    with pytest.raises(OutOfTime):
        Budget(0).require("anything")
    assert Budget(100).require("anything") <= 100 < Budget().left


def test_time_that_runs_out_leaves_what_is_measured(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(Budget):
        @property
        def left(self) -> float:
            return 100.0 if len(fake.asked) < 3 else 0.0

    model = measured(fake, budget=Clock())
    assert [(s.test, len(s.samples)) for s in model.series] == [("tg4 @ d16", 2)]
    assert "time was used up" in model.notes[-1]


def test_gpt_fast_refuses_what_it_has_no_model_for(fake: Fake, tmp_path: Path) -> None:
    chosen = replace(next(s for s in GPU if s.name == "qwen3-8b"), workloads=LOADS, goals=())
    model = run.begin(chosen)
    given = options(peers=("gpt-fast",), gpt_fast=tmp_path, parts=("peers",))
    gpu_run.measure_gpu(chosen, model, given, lambda text: None)
    assert model.notes[-1] == "gpt-fast: it has no qwen3 models"


def test_the_command_measures_the_ceilings_and_completes_a_file(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Ceilings("", "Some GPU", 10**11, 5 * 10**7, [Pass("read", 4000.0)], [Matmul("mm", 700.0)])
    monkeypatch.setattr(command, "gpu_ceilings", lambda quick, timeout: found)
    file, fake.max_length = tmp_path / "r.json", 1024
    words = ["--device", "cuda", "--models", "llama-3.2-1b", "--peers", "none", "--json", str(file), "--resume"]
    words += ["--repetitions", "2", "--tests", "pp512", "--commit", "abc"]
    assert command.main([*words, "--parts", "speed"]) == 0
    assert command.main([*words, "--parts", "start"]) == 0
    report = Report.from_json(file.read_bytes(), "r.json")
    assert [s.test for s in report.models[0].series] == ["pp512", "start", "peak"]
    assert (report.read_gb_s, report.matmul_tflop_s, report.machine.gpu) == (4000.0, 700.0, "Some GPU")
    assert report.commit == "abc"
    assert "Some GPU" in capsys.readouterr().out
    assert command.main([*words, "--commit", "def", "--parts", "build"]) == 0
    assert not Report.from_json(file.read_bytes(), "r.json").models[0].series


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda", "--models", "demo"], "no model"),
        (["--device", "cuda", "--tests", "pp7"], "no test"),
        (["--device", "cuda", "--peers", "gpt-fast"], "gpt-fast"),
        (["--device", "cuda", "--gpt-fast", "/nowhere"], "not gpt-fast"),
        (["--resume"], "--resume"),
    ],
)
def test_what_cannot_be_asked_for(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command_line.understand(words)


def test_the_words_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "generate.py").write_text("")
    words = ["--device", "cuda", "--gpt-fast", str(tmp_path), "--set", "model.max_length=4096", "--parts", "build"]
    asked = command_line.understand(words)
    assert asked.options.peers == ("transformers", "gpt-fast")
    assert asked.options.parts == ()
    assert [s.name for s in asked.subjects] == [s.name for s in GPU]
    assert all(s.settings[-1] == "model.max_length=4096" for s in asked.subjects)
    assert command_line.understand([]).options.peers == ("transformers",)
    quick = command_line.understand(["--device", "cuda", "--quick"]).subjects
    assert [s.name for s in quick] == ["qwen3-0.6b"]
    assert quick[0].workloads[0].name == "tg32 @ d1024"


def test_query_heads_come_from_the_config(tmp_path: Path) -> None:
    chosen = next(s for s in GPU if s.name == "llama-3.1-8b")
    assert gpu_run.query_heads(builds.open_recipe(chosen, None)) == 32
    assert json.loads(run.peer_source(builds.open_recipe(chosen, None)).read_text())["num_attention_heads"] == 32


def test_without_a_gpu_the_ceilings_are_a_problem_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = gpu_ceilings(quick=True, timeout=120)
    assert "sees no GPU" in found.problem and not found.reads and not found.matmuls
