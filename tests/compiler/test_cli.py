"""The command line: exit codes, messages, what is imported, and that results and progress keep to their streams."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ingot.artifacts import errors
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import ArtifactWriter
from ingot.compiler import artifact_commands, cli, console, trust_commands
from ingot.runtime import CompletionOutput, RequestOutput, SamplingParams
from ingot.runtime.outputs import RequestMetrics
from ingot.runtime.phases import Phases

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/manifest-v2.json"
DEMO = ROOT / "recipes/demo.toml"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls main in this process; gives exit code, stdout and stderr."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def call(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact with the golden manifest's facts and files of text."""
    manifest = Manifest.from_json(GOLDEN.read_text())
    with ArtifactWriter(tmp_path / "demo") as writer:
        for entry in manifest.files:
            path = writer.root / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(entry.path)
        writer.commit(replace(manifest, files=()))
    return tmp_path / "demo"


def fresh(*argv: str, code: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`ingot argv` (or `python -c code`) in a process of its own."""
    command = [sys.executable, "-c", code] if code is not None else [sys.executable, "-m", "ingot.compiler.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


# --- exit codes and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("w", "y", "f"), 2),
        (errors.UnsupportedModelError("w", "y", "f"), 3),
        (errors.VerificationError("w", "y", "f"), 4),
        (errors.GateError("w", "y", "f"), 4),
        (errors.ResourceError("w", "y", "f"), 5),
    ],
)
def test_errors_become_exit_codes(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    monkeypatch.setattr(artifact_commands, "inspect", raising(error))
    assert run("inspect", "x") == (code, "", "error: w\n  why: y\n  fix: f\n")


def raising(error: BaseException) -> Callable[[Any], int]:
    def command(args: Any) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "out of memory"),
        (OSError(28, "No space left on device"), 5, "No space left"),
        (ZeroDivisionError("x"), 1, "internal error: ZeroDivisionError: x"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 5, 'pip install "ingot[compile]"'),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "internal error: ModuleNotFoundError"),
    ],
)
def test_everything_else_is_one_message(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr(artifact_commands, "inspect", raising(error))
    got, out, err = run("inspect", "x")
    assert (got, out) == (code, "")
    assert said in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(artifact_commands, "inspect", raising(errors.ResourceError("w")))
    assert cli.main(["inspect", "x", "--debug"]) == 5
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: w\n")


def test_errors_cannot_steer_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_commands, "inspect", raising(errors.UsageError("a\x1b[2Jb", "c", "d")))
    assert "\x1b" not in run("inspect", "x")[2]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["build"],
        ["build", "none.toml"],
        ["build", str(DEMO), "--set", "nonsense=1"],
        ["build", str(DEMO), "--unknown"],
        ["build", str(DEMO), "--dry"],
        ["run"],
        ["run", "x"],
        ["run", "/none", "hello"],
        ["run", "x", "y", "--max-tokens", "many"],
        ["run", "x", "y", "--seed", "9" * 5000],
        ["inspect", "/none"],
        ["inspect", "a\0b"],
        ["verify", "/none"],
        ["passes", "none.toml"],
        ["passes", str(DEMO), "--set", "skip=['no-such-pass']"],
        ["bisect"],
        ["build", str(DEMO), "--model", "/none"],
        ["build", str(ROOT / "recipes/stories260k.toml")],
        ["build", str(ROOT / "recipes/llama-3.2-1b.toml")],
    ],
)
def test_usage_errors_exit_with_2(run: Run, argv: Sequence[str]) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "fix:" in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["--version"], ["build", "--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 0
        assert "ingot" in capsys.readouterr().out


# --- fresh processes: imports, pipes ---------------------------------------------------------------------------------


LIGHT = ("cli", "console", "artifact_commands", "trust_commands", "ship_options", "accuracy_facts")
HEAVY = "('torch', 'transformers', 'rich', 'typer', 'safetensors', 'huggingface_hub')"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_inspect_and_verify_import_nothing_heavy(artifact: Path, command: str) -> None:
    code = (
        f"import sys; from ingot.compiler.cli import main; code = main([{command!r}, {str(artifact)!r}])\n"
        f"print([m for m in sys.modules if m.split('.')[0] in {HEAVY} or m.startswith('ingot.passes')"
        " or (m.startswith('ingot.compiler.')"
        f" and m.split('.')[2] not in {LIGHT})])"
    )
    done = fresh(code=code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_run_imports_no_compiler(artifact: Path) -> None:
    # The artifact's engines are text, so it stops at loading them: all imports of the front are done by then.
    code = (
        f"import sys; from ingot.compiler.cli import main; main(['run', {str(artifact)!r}, 'x'])\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'rich', 'typer', 'huggingface_hub')"
        " or m.startswith(('ingot.passes', 'torch._inductor', 'torch.export'))"
        " or (m.startswith('ingot.compiler.')"
        f" and m.split('.')[2] not in {LIGHT})])"
    )
    done = fresh(code=code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_reader_that_goes_away(artifact: Path) -> None:
    command = f"{sys.executable} -m ingot.compiler.cli inspect {artifact} --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() in ("141", "0")  # 0: the pipe took it all before the reader went
    assert done.stderr == ""


def test_broken_pipe_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(artifact_commands, "inspect", raising(BrokenPipeError()))
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    assert cli.main(["inspect", "x"]) == 141
    assert capsys.readouterr().err == ""


# --- inspect and verify ----------------------------------------------------------------------------------------------


def test_inspect_says_what_the_artifact_is(run: Run, artifact: Path) -> None:
    code, out, err = run("inspect", artifact)
    assert (code, err) == (0, "")
    for fact in ("LlamaForCausalLM", "135,232", "decode-b1", "merge-projections", "2.1e-07", "avx2", "transformers 5"):
        assert fact in out


def test_inspect_json(run: Run, artifact: Path) -> None:
    code, out, _ = run("inspect", artifact, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["digest"] == Manifest.from_json((artifact / "manifest.json").read_text()).digest()
    decode = next(engine for engine in facts["engines"] if engine["name"] == "decode-b1")
    assert decode["exactness"] == {
        "max_kl": 1.2e-11, "max_relative_error": 2.1e-07, "mean_kl": 3.4e-12, "tokens": 67, "top1": 1.0,
    }  # fmt: skip
    assert decode["size_bytes"] == len("engines/decode-b1.so")
    assert facts["passes"][1] == {"name": "fuse-rms-norm", "changed": 5, "missed": 1, "exact": True}


def test_inspect_survives_reports_of_any_form(run: Run, tmp_path: Path) -> None:
    manifest = Manifest.from_json(GOLDEN.read_text())
    odd: list[tuple[Any, Any]] = [
        ([{}], {}),
        ([{"name": 3, "changed": "x", "missed": {"a": 1}}], {"engines": [1], "passed": "yes", "task": [3]}),
        ([{"name": "\x1b[2J"}], {"engines": {"decode-b1": [1, "\x1b"]}, "task": {"x": True}}),
        ([], {"engines": {"decode-b1": {"\x1b": 1.0}, "x": 3}}),
    ]
    for index, (passes, gate) in enumerate(odd):
        folder = tmp_path / str(index)
        with ArtifactWriter(folder) as writer:
            for entry in manifest.files:
                (writer.root / entry.path).parent.mkdir(parents=True, exist_ok=True)
                (writer.root / entry.path).touch()
            writer.commit(replace(manifest, files=(), passes=passes, gate=gate))
        code, out, _ = run("inspect", folder)
        assert code == 0
        assert "\x1b" not in out


def test_passes_of_several_engines_are_summed() -> None:
    manifest = Manifest.from_json(GOLDEN.read_text())
    record: dict[str, Any] = {"name": "p", "changed": 2, "missed": [{}], "exact": False}
    facts = artifact_commands.describe(replace(manifest, passes=[{"engine": e, **record} for e in ("a", "b")]))
    assert facts["passes"] == [{"name": "p", "changed": 4, "missed": 2, "exact": False}]


def damage_byte(root: Path) -> None:
    (root / "engines/decode-b1.so").write_text("engines/decode-b1.sO")


def remove_weights(root: Path) -> None:
    (root / "weights/model.safetensors").unlink()


def add_file(root: Path) -> None:
    (root / "engines/extra.so").touch()


def newer_schema(root: Path) -> None:
    path = root / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 3'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_byte, "engines/decode-b1.so"),
        (remove_weights, "weights/model.safetensors"),
        (add_file, "engines/extra.so"),
        (newer_schema, "schema"),
    ],
)
def test_verify_says_what_is_wrong_and_what_to_do(
    run: Run, artifact: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(artifact)
    code, out, err = run("verify", artifact)
    assert (code, out) == (4, "")
    assert said in err
    assert "fix:" in err
    code, out, _ = run("verify", artifact, "--json")
    facts = json.loads(out)
    assert (code, facts["ok"]) == (4, False)
    assert any(said in str(finding) for finding in facts["findings"])


def test_verify_a_good_artifact(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_commands, "check", lambda path: [])  # the golden target may not fit this machine
    code, out, err = run("verify", artifact)
    assert (code, err) == (0, "")
    assert "ok" in out
    assert json.loads(run("verify", artifact, "--json")[1])["ok"] is True


# --- run -------------------------------------------------------------------------------------------------------------


@dataclass
class FakeLLM:
    """Stands in for ingot.runtime.LLM: says what it was asked."""

    calls: list[tuple[str, Any, SamplingParams]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    pieces: tuple[str, ...] = ("Once", " more", "\x1b[2J")

    def __call__(self, path: Path, phases: Phases, **options: Any) -> FakeLLM:
        self.options = options
        phases.mark("engines")
        return self

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.7, top_k=5)

    def output(self, text: str, finished: bool = True) -> RequestOutput:
        completion = CompletionOutput(0, text, [1, 2], finish_reason="length" if finished else None)
        return RequestOutput("0", "p", [0], [completion], finished, RequestMetrics(1, 2, 0.0, 12.0, 0.5, 13.0))

    def generate(self, prompt: Any, params: SamplingParams) -> list[RequestOutput]:
        self.calls.append(("generate", prompt, params))
        return [self.output("".join(self.pieces))]

    def chat(self, messages: Any, params: SamplingParams) -> list[RequestOutput]:
        self.calls.append(("chat", messages, params))
        return [self.output("answer")]

    def stream(self, prompt: Any, params: SamplingParams) -> Any:
        self.calls.append(("stream", prompt, params))
        yield from (self.output(piece, i == 2) for i, piece in enumerate(self.pieces))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr("ingot.runtime.LLM", fake)
    return fake


def test_run_streams(run: Run, llm: FakeLLM) -> None:
    code, out, err = run("run", "x", "hello", "--timings")
    assert (code, out) == (0, "Once more\x1b[2J\n")
    *phases, rates = err.splitlines()
    assert rates == "1 prompt tokens, 2 tokens, ttft 12.0 ms, tpot 0.500 ms, 2000.0 tokens/s"
    names = [re.split(r"  +", line.strip())[0] for line in phases]
    assert names == [
        "process start to first token", "python, imports", "engines", "tokenizer, prompt", "prefill, first token",
    ]  # fmt: skip
    seconds = [float(line.split()[-2]) for line in phases]
    assert seconds[0] == pytest.approx(sum(seconds[1:]), abs=0.005)
    assert seconds[-1] == 0.012
    assert llm.calls == [("stream", "hello", SamplingParams(temperature=0.7, top_k=5, max_tokens=128))]


def test_run_on_a_terminal_shows_no_escape_sequences(run: Run, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b" not in run("run", "x", "hello")[1]


def test_run_passes_every_flag_on(run: Run, llm: FakeLLM) -> None:
    given = {"max-tokens": 3, "temperature": 0, "top-p": 0.5, "top-k": 2, "min-p": 0.1, "seed": 9}
    flags = [*(f"--{name}={value}" for name, value in given.items()), "--stop", "a", "--stop", "b"]
    flags += ["--gpu-memory-utilization", "0.5"]
    assert run("run", "x", "hello", "--no-stream", *flags)[0] == 0
    kind, prompt, params = llm.calls[0]
    assert (kind, prompt, llm.options) == ("generate", "hello", {"gpu_memory_utilization": 0.5})
    assert params == SamplingParams(max_tokens=3, temperature=0, top_p=0.5, top_k=2, min_p=0.1, seed=9, stop=["a", "b"])


def test_run_json_is_one_object(run: Run, llm: FakeLLM) -> None:
    out = run("run", "x", "hello", "--json", "--timings")[1]
    facts = json.loads(out)
    assert (facts["text"], facts["token_ids"], facts["finish_reason"]) == ("Once more\x1b[2J", [1, 2], "length")
    assert facts["metrics"]["ttft_ms"] == 12.0
    assert facts["phases"][-1] == {"name": "prefill, first token", "seconds": 0.012, "nbytes": 0}


def test_run_chat(run: Run, llm: FakeLLM) -> None:
    assert run("run", "x", "hi", "--chat", "--no-stream")[1] == "answer\n"
    run("run", "x", "hi", "--chat")
    assert [call[:2] for call in llm.calls] == [
        ("chat", [{"role": "user", "content": "hi"}]),
        ("stream", [{"role": "user", "content": "hi"}]),
    ]


def test_run_reads_stdin(run: Run, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grüß dich\n".encode())))
    assert run("run", "x", "-")[0] == 0
    assert llm.calls[0][1] == "grüß dich\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert run("run", "x", "-")[0] == 2


@pytest.mark.parametrize("flag", ["--temperature=nan", "--temperature=-1", "--top-p=0", "--max-tokens=0", "--stop="])
def test_run_refuses_wrong_parameters(run: Run, llm: FakeLLM, flag: str) -> None:
    code, out, _ = run("run", "x", "hello", flag)
    assert (code, out) == (2, "")


# --- build, passes, bisect, families ---------------------------------------------------------------------------------


def test_dry_run_prints_recipe_and_plan(run: Run) -> None:
    recipe = ROOT / "recipes/llama-3.2-1b.toml"
    code, out, err = run("build", recipe, "--set", "source=random", "--dry-run", "-o", "/tmp/none/out")
    assert (code, err) == (0, "")
    for fact in ("decode-b1", "prefill-c128", "insert-kv-cache", "128256", "/tmp/none/out"):
        assert fact in out
    code, out, _ = run("build", recipe, "--set", "source=random", "--dry-run", "--json")
    plan = json.loads(out)
    assert [engine["name"] for engine in plan["engines"]] == ["decode-b1", "prefill-c128"]
    assert plan["recipe"]["model"]["source"] == "random"
    assert not Path("/tmp/none").exists()


def test_dry_run_says_what_would_stop_the_build(run: Run) -> None:
    code, out, err = run("build", ROOT / "recipes/llama-3.2-1b.toml", "--dry-run")
    assert code == 2
    assert "decode-b1" in out
    assert "revision" in err
    code, _, err = run("build", ROOT / "recipes/qwen3-0.6b.toml", "--dry-run", "--set", "source=random",
                       "--set", "max_length=100000")  # fmt: skip
    assert code == 2
    assert "40960" in err


@dataclass
class FakeResult:
    manifest: Manifest
    stages: dict[str, float]
    steps: list[Any] = field(default_factory=list)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a build in place that only notes what it was asked for."""
    calls: list[dict[str, Any]] = []

    def build(recipe: Any, output: Path, **options: Any) -> FakeResult:
        calls.append({"recipe": recipe, "output": output, **options})
        with options["progress"].stage("trace", total=2):
            options["progress"].update("decode-b1", advance=1)
        return FakeResult(Manifest.from_json(GOLDEN.read_text()), {"trace": 1.25})

    module = ModuleType("build")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ingot.compiler.builder", module)
    return calls


def test_build_passes_everything_on(run: Run, built: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    out = tmp_path / "out"
    code, stdout, err = run(
        "build", DEMO, "-o", out, "--model", tmp_path / "model", "--force", "--dump-ir", tmp_path, "--set", "seed=3"
    )
    assert code == 2
    assert "ambiguous" in err
    flags = ["--model", tmp_path / "model", "--force", "--dump-ir", tmp_path, "--set", "isa=portable"]
    code, stdout, err = run("build", DEMO, "-o", out, *flags)
    assert code == 0
    (call,) = built
    assert (call["output"], call["force"], call["dump_ir"]) == (out, True, tmp_path)
    assert call["recipe"].model_path() == tmp_path / "model"
    assert call["recipe"].target.isa == "portable"
    assert "decode-b1" in stdout
    assert "1.2" in stdout
    assert "trace …" in err
    assert "decode-b1 (1/2)" in err


def test_build_json_prints_one_object_and_no_progress(run: Run, built: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    code, out, err = run("build", DEMO, "-o", tmp_path / "out", "--model", tmp_path / "model", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["path"], facts["stage_seconds"]) == (str(tmp_path / "out"), {"trace": 1.25})


def test_build_default_output(
    run: Run, built: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert run("build", DEMO, "--model", "model")[0] == 0
    assert built[0]["output"] == Path("artifacts/built/demo")


@pytest.mark.parametrize("output", ["model", "model/out", ".", "other"])
def test_build_never_touches_what_it_did_not_make(
    run: Run, built: list[dict[str, Any]], tmp_path: Path, output: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious").touch()
    code, _, err = run("build", DEMO, "-o", tmp_path / output, "--model", tmp_path / "model", "--force")
    assert code == 2
    assert "fix:" in err
    assert (built, (tmp_path / "other/precious").exists()) == ([], True)


def test_passes_lists_the_pipeline_in_order(run: Run) -> None:
    code, out, _ = run("passes", "--json")
    rows = json.loads(out)
    names = [row["name"] for row in rows]
    assert code == 0
    assert names.index("canonicalize") < names.index("insert-kv-cache")
    assert all(row["summary"] and row["needs"] and row["leaves"] for row in rows)
    skipped = json.loads(run("passes", DEMO, "--set", "skip=['fuse-rope']", "--json")[1])
    assert [row["name"] for row in skipped] == [name for name in names if name != "fuse-rope"]
    assert "canonicalize" in run("passes")[1]


@dataclass
class FakeCulprit:
    name: str | None
    detail: str
    missed: bool
    tried: tuple[str, ...] = ("trace: within budget",)


@pytest.mark.parametrize(("name", "missed", "code"), [("fuse-rope", True, 4), (None, True, 4), (None, False, 0)])
def test_bisect_names_the_pass(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str | None, missed: bool, code: int
) -> None:
    module = ModuleType("bisect")
    module.bisect = lambda recipe, progress, **options: FakeCulprit(name, "top1 0.5", missed)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ingot.compiler.bisect", module)
    got, out, _ = run("bisect", DEMO, "--model", tmp_path)
    assert got == code
    assert (f"pass {name!r}" if name else "top1 0.5") in out
    assert json.loads(run("bisect", DEMO, "--model", tmp_path, "--json")[1])["name"] == name


@pytest.mark.parametrize(("exact", "code"), [("yes", 0), ("no", 4)])
def test_families_prints_the_table(run: Run, monkeypatch: pytest.MonkeyPatch, exact: str, code: int) -> None:
    module = ModuleType("families")
    module.run = lambda names, progress, **options: [  # type: ignore[attr-defined]
        {"family": name, "exact": exact} for name in names if name != "none"
    ]
    monkeypatch.setitem(sys.modules, "ingot.compiler.families", module)
    got, out, _ = run("families", "llama", "qwen3")
    assert got == code
    assert "qwen3" in out
    assert run("families", "llama", "none")[0] == 2


# --- progress --------------------------------------------------------------------------------------------------------


def test_plain_progress_writes_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.open_progress() as progress, progress.stage("compile", total=2):
        progress.update("decode-b1")
        progress.update("decode-b1", advance=1)
        progress.update("prefill\x1b-c64")
        progress.log("note")
    out, err = capsys.readouterr()
    lines = [line.split("] ", 1)[1] for line in err.splitlines()]
    assert out == ""
    assert lines[:4] == ["compile …", "compile: decode-b1 (0/2)", "compile: prefill\\x1b-c64 (1/2)", "note"]
    assert lines[4].startswith("compile done in ")


def test_live_progress_draws_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with console.open_progress() as progress, progress.stage("compile [bold]", total=2):
        progress.update("decode-b1", advance=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "compile [bold]" in err


def test_a_stage_that_fails_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), console.open_progress() as progress, progress.stage("compile"):
        raise ZeroDivisionError
    assert "done" not in capsys.readouterr().err


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1_200_000, "1.2 MB"), (3e15, "3000.0 TB")])
def test_size_text(size: float, text: str) -> None:
    assert console.size_text(size) == text
