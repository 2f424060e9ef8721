"""What surrounds the measuring: choice of models, reuse of artifacts, prompts, child processes, the command line."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.artifacts.errors import ResourceError, UsageError
from ingot.benchmarks import __main__ as command
from ingot.benchmarks import bandwidth, builds, children, run, subjects
from ingot.benchmarks.goals import values
from ingot.benchmarks.results import Build, Limits, Model, Report
from ingot.compiler.recipe import Recipe

from .hand_made import manifest

STORIES = "stories260k"


CPU = [s for s in subjects.SUBJECTS if s.device == "cpu"]


@pytest.mark.parametrize("subject", CPU, ids=lambda s: s.name)
def test_every_subject_has_a_sound_recipe_and_goals_that_can_be_measured(
    subject: subjects.Subject, tmp_path: Path, model: Model
) -> None:
    recipe = builds.open_recipe(subject, tmp_path if subject.stories else None)
    recipe.check_source()
    assert recipe.name == subject.name
    assert 1 in recipe.shapes.decode_batch_sizes
    assert subject.context + subject.generate < recipe.model.max_length
    assert run.peer_source(recipe).exists()
    assert {goal.what for goal in subject.goals} <= set(values(model, Limits(8.0, 0.0, 1000)))


def test_choice() -> None:
    assert [s.name for s in subjects.choose(["demo", STORIES, "demo"], False)] == ["demo", STORIES]
    assert subjects.choose([], False) == CPU
    quick = subjects.choose([], True)
    assert [s.name for s in quick] == [STORIES, "demo", "demo-int8"]
    assert all(s.generate == 32 for s in quick)
    assert subjects.choose(["llama-3.2-1b"], True)[0].peer_generate == 8
    with pytest.raises(UsageError, match="gpt-9"):
        subjects.choose(["gpt-9"], False)


@given(st.integers(1, 2000), st.integers(2, 2000), st.integers(1, 300))
def test_prefill_length_fits(wanted: int, longest: int, chunk: int) -> None:
    length = run.prefill_length(wanted, longest, chunk)
    assert 1 <= length <= wanted
    assert length < longest
    assert length % chunk == 0 or length < chunk


@given(st.integers(1, 600), st.integers(2, 100_000))
def test_prompts_are_valid_and_the_same_every_time(length: int, vocabulary: int) -> None:
    ids = run.prompt_ids(length, vocabulary)
    assert len(ids) == length and ids == run.prompt_ids(length, vocabulary)
    assert all(0 <= i < vocabulary for i in ids)


def test_agreement_counts_up_to_the_first_difference() -> None:
    notes = list(run.agreement({"ingot": [1, 2, 3, 4], "peer": [1, 2, 9, 4, 5], "silent": []}))
    assert notes == ["greedy tokens equal to those of peer: 2 of 4"]


@pytest.fixture
def built(tmp_path: Path) -> tuple[Recipe, Path]:
    """A recipe, and a folder that only has the manifest of an artifact of it."""
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    recipe = Recipe("x", file=tmp_path / "recipe.toml")
    folder = tmp_path / "built"
    folder.mkdir()
    made = replace(manifest(()), recipe={**recipe.to_dict(), "weights_digest": "0"})
    (folder / "manifest.json").write_text(made.to_json())
    return recipe, folder


def test_a_fit_artifact_is_reused(built: tuple[Recipe, Path]) -> None:
    assert builds.stale(*built) == ""


def test_unfit_artifacts_are_not(built: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = built
    assert "another recipe" in builds.stale(replace(recipe, name="y"), folder)
    assert "no artifact" in builds.stale(recipe, tmp_path / "nowhere")
    (folder / "manifest.json").write_text("{")
    assert builds.stale(recipe, folder)


def test_figures_of_another_build_are_not_shown(built: tuple[Recipe, Path]) -> None:
    _, folder = built
    made = manifest(())
    kept = {"manifest": made.digest(), "seconds": 2.5, "peak_bytes": 7, "largest_process_bytes": 5, "stages": {}}
    kept["cold"] = True
    record = folder.with_name("built.build.json")
    record.write_text(json.dumps(kept))
    assert builds._kept(folder, made) == Build(2.5, 7, 5, True)
    assert builds._kept(folder, replace(made, name="other")) == Build(reused=True)
    record.write_text("[]")
    assert builds._kept(folder, made) == Build(reused=True)


def test_a_child_is_run_to_its_end() -> None:
    code = "import sys; b = bytearray(80 << 20); print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = children.run([sys.executable, "-c", code], watch_memory=True)
    assert (done.code, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert 80 << 20 <= done.largest_process_bytes <= done.peak_bytes
    assert done.started <= time.monotonic()
    assert not done.timed_out


def test_a_child_that_takes_too_long_is_ended_with_what_it_started() -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"
    done = children.run([sys.executable, "-c", code], timeout=1.0)
    assert done.timed_out and done.code == -9 and done.seconds < 60
    assert done.stdout == "up\n"


def test_gpus_are_hidden_from_what_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert children.environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert children.environment(device="cuda")["CUDA_VISIBLE_DEVICES"] == "3"


def test_memory_of_a_session_counts_this_process() -> None:
    ballast = np.ones(32 << 20, np.uint8)
    assert children.session_bytes(os.getsid(0)) > ballast.nbytes
    assert children.session_bytes(1 << 30) == 0


ECHO = """
import os
from ingot.benchmarks.children import serve
def die(request): os._exit(7)
def fail(request): raise ValueError("no luck")
def echo(request):
    print("noise on stdout")
    return {"text": request["text"]}
serve({"echo": echo, "fail": fail, "die": die})
"""


def test_a_worker_answers_fails_and_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with children.Worker("echo_worker") as worker:
        assert worker.ask({"op": "echo", "text": "ä\n"}) == {"text": "ä\n"}
        with pytest.raises(ResourceError) as failed:
            worker.ask({"op": "fail"})
        assert "no luck" in failed.value.why
        assert worker.ask({"op": "echo", "text": "still there"})["text"] == "still there"
        with pytest.raises(ResourceError) as dead:
            worker.ask({"op": "die"})
        assert "exit code 7" in dead.value.why
        with pytest.raises(ResourceError):
            worker.ask({"op": "echo", "text": ""})


def test_a_silent_worker_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with children.Worker("sleeper") as worker, pytest.raises(ResourceError, match="no answer"):
        worker.ask({"op": "x"}, timeout=0.2)
    assert worker._process.returncode is not None


def test_every_method_reads_every_byte() -> None:
    found = bandwidth.measure(1 << 20, 2, 2)
    assert len({name for name, _ in found}) == len(found) >= 2
    assert all(gb_s > 0 for _, gb_s in found)


def test_a_missing_checkpoint_is_a_reason_and_not_a_failure(tmp_path: Path) -> None:
    subject = subjects.choose([STORIES], True)[0]
    model = run.begin(subject)
    run.measure(subject, model, run.Options(tmp_path, None, (), 1), lambda text: None)
    assert "--stories" in model.skipped and not model.failed


@pytest.mark.parametrize("interrupt", [False, True])
def test_the_command_keeps_what_is_finished(
    interrupt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(subject: subjects.Subject, model: Model, options: run.Options, say: run.Say) -> None:
        model.open_series("ingot", "tg32", "tok/s").add(100.0)
        if subject.name == "demo":
            if interrupt:
                raise KeyboardInterrupt
            model.failed = "out of luck"

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "read_bandwidth", lambda quick: [])
    file = tmp_path / "r.json"
    code = command.main(["--quick", "--models", "demo-int8", "demo", "--json", str(file), "--artifacts", str(tmp_path)])
    assert code == (130 if interrupt else 5)
    report = Report.from_json(file.read_bytes(), "r.json")
    assert report.interrupted is interrupt
    assert [(m.name, m.series[0].samples) for m in report.models] == [("demo-int8", [100.0]), ("demo", [100.0])]
    assert report.repetitions == 2
    assert "100.00" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--models", "nobody"], ["--repetitions", "-1"], ["--stories", "/nowhere"]])
def test_the_command_refuses_before_it_measures(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    assert "error:" in capsys.readouterr().err
