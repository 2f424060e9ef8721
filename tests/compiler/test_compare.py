"""`ingot compare`: what may be compared, what the table says, and that speed is really measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts.errors import UsageError
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import ArtifactWriter
from ingot.compiler import cli, compare
from ingot.compiler.compare import Comparison, Row

from ..conftest import Demo

GOLDEN = Path(__file__).parents[1] / "golden" / "manifest-v2.json"
ACCURACY = {
    "scheme": "W8A16", "tokens_digest": "a" * 64,
    "engine": {"mean_kl": 1e-4, "top1": 0.995, "perplexity_ratio": 1.01, "perplexity_ratio_error": 0.002},
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes an artifact with the golden manifest's facts, some of them changed, and files of text."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def artifact(folder: str, texts: dict[str, str] | None = None, **changes: Any) -> Path:
        manifest = Manifest.from_json(GOLDEN.read_text())
        with ArtifactWriter(tmp_path / folder) as writer:
            for entry in manifest.files:
                path = writer.root / entry.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text((texts or {}).get(entry.path, entry.path))
            writer.commit(replace(manifest, files=(), **changes))
        return tmp_path / folder

    return artifact


def main(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    return (code, *capsys.readouterr())


# --- what may be compared --------------------------------------------------------------------------------------------


def test_two_artifacts_of_one_model_become_two_rows(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a"), make("b", name="quantized", gate={"accuracy": ACCURACY, "task": {"exact_match": 0.98}})
    code, out, err = main(capsys, "compare", a, b, "--no-speed")
    assert (code, err) == (0, "")
    assert "tok/s" not in out
    row = next(line for line in out.splitlines() if line.startswith("  quantized"))
    assert "W8A16" in row and "1.00e-04" in row and "99.50%" in row and "1.0100 ± 0.0020" in row and "98.0%" in row
    code, out, _ = main(capsys, "compare", a, b, "--no-speed", "--json")
    found = json.loads(out)
    assert [row["name"] for row in found["rows"]] == [Manifest.from_json(GOLDEN.read_text()).name, "quantized"]
    assert found["rows"][1]["accuracy"]["mean_kl"] == 1e-4
    assert found["rows"][1]["decode_median"] is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architecture": "MistralForCausalLM"}, "architecture is"),
        ({"vocab_size": 7}, "vocab_size is"),
        ({"num_layers": 99}, "num_layers is"),
    ],
)
def test_other_models_are_refused(
    make: Make, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], said: str
) -> None:
    model = Manifest.from_json(GOLDEN.read_text()).model
    code, out, err = main(capsys, "compare", make("a"), make("b", model=replace(model, **changed)), "--no-speed")
    assert (code, out) == (2, "")
    assert "are not of one model" in err and said in err and "fix:" in err


def test_another_tokenizer_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="not of one model") as caught:
        compare.compare([make("a"), make("b", {"tokenizer.json": "another"})], rounds=0)
    assert "tokenizers differ" in str(caught.value)


def test_other_weights_are_refused_unless_asked_for(make: Make) -> None:
    recipe = Manifest.from_json(GOLDEN.read_text()).recipe
    paths = [make("a"), make("b", recipe={**recipe, "weights_digest": "f" * 64})]
    with pytest.raises(UsageError, match="not of one model") as caught:
        compare.compare(paths, rounds=0)
    assert "--other-weights" in str(caught.value)
    found = compare.compare(paths, rounds=0, other_weights=True)
    assert ["other weights" in " ".join(row.notes) for row in found.rows] == [False, True]


def test_one_artifact_is_no_comparison(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = main(capsys, "compare", make("a"), "--no-speed")
    assert code == 2 and "two artifacts or more" in err


@pytest.mark.parametrize("flag", ["--rounds", "--prompt", "--tokens"])
def test_numbers_below_one_are_refused(make: Make, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code, _, err = main(capsys, "compare", make("a"), make("b"), flag, "0")
    assert code == 2 and flag in err


def test_the_page_is_written_or_refused_before_anything_is_measured(
    make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make("a"), make("b", name="other")
    code, out, _ = main(capsys, "compare", a, b, "--no-speed", "--html", tmp_path / "page.html")
    assert code == 0 and f"wrote {tmp_path / 'page.html'}" in out
    assert "</html>" in (tmp_path / "page.html").read_text("utf-8")
    monkeypatch.setattr(compare, "ask_child", lambda *args: pytest.fail("it was run"))
    for wrong in (tmp_path, tmp_path / "nowhere" / "page.html"):
        code, _, err = main(capsys, "compare", a, b, "--html", wrong)
        assert code == 2 and "--html" in err


def test_tests_that_do_not_fit_are_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        compare.compare([make("a"), make("b")], rounds=1, prompt=1 << 20)


def test_figures_of_another_text_are_marked(make: Make) -> None:
    other = {**ACCURACY, "tokens_digest": "b" * 64}
    paths = [make("a", gate={"accuracy": ACCURACY}), make("b", gate={"accuracy": other}), make("c")]
    notes = [row.notes for row in compare.compare(paths, rounds=0).rows]
    assert notes[0] == [] and notes[1] == ["its accuracy was measured on another text"]


def test_artifacts_of_one_name_are_called_after_their_folders(make: Make, tmp_path: Path) -> None:
    rows = compare.compare([make("x/one"), make("x/two")], rounds=0).rows
    assert [row.name for row in rows] == ["one", "two"]
    rows = compare.compare([make("y/one"), make("z/one")], rounds=0).rows
    assert [row.name for row in rows] == [str(tmp_path / "y/one"), str(tmp_path / "z/one")]


def test_an_artifact_for_another_machine_has_no_speed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "check_target", lambda target: ["it needs a GPU"])
    monkeypatch.setattr(compare, "ask_child", lambda *args: pytest.fail("it was run"))
    rows = compare.compare([make("a"), make("b")], rounds=2).rows
    assert all("it needs a GPU" in row.notes[-1] and row.decode == [] for row in rows)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_rounds_go_turn_and_turn_about(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(module: str, request: dict[str, Any]) -> dict[str, float]:
        asked.append(Path(request["artifact"]).name)
        assert (module, request["prompt"], request["tokens"]) == ("ingot.runtime.speed", 5, 3)
        return {"prefill": 10.0 * len(asked), "decode": 1.0 * len(asked), "load_s": 0.1, "peak_bytes": len(asked)}

    monkeypatch.setattr(compare, "check_target", lambda target: [])
    monkeypatch.setattr(compare, "ask_child", answer)
    found = compare.compare([make("a"), make("b")], rounds=3, prompt=5, tokens=3)
    assert asked == ["a", "b"] * 3
    assert [row.decode for row in found.rows] == [[1, 3, 5], [2, 4, 6]]
    assert found.to_dict()["rows"][1]["prefill_median"] == 40
    assert found.rows[1].peak_bytes == 6


def test_the_speed_of_a_real_artifact(demo: Demo) -> None:
    found = compare.compare([demo.artifact, demo.artifact], rounds=1, prompt=20, tokens=8)
    for row in found.rows:
        assert len(row.decode) == len(row.prefill) == 1
        assert min(*row.decode, *row.prefill, *row.load_s) > 0
        assert row.peak_bytes is not None and row.peak_bytes > row.weights_bytes
        assert row.notes == ["lossless: KL and top-1 are of the numeric gate's tokens"]
    # Two layers of two KV heads of 16, keys and values, float32, for 128 tokens.
    assert found.rows[0].memory_bytes - found.rows[0].weights_bytes == 2 * 2 * 2 * 16 * 4 * 128


def test_a_column_without_figures_is_left_out() -> None:
    row = Row("a\x1b", "p", "d", "W4A16", "cpu", 10, 5, 7)
    columns, rows = compare.table(Comparison("m", 5, 3, 0, [row, replace(row, accuracy={"top1": 0.9})]))
    assert columns == ["", "scheme", "weights", "total", "memory", "top-1"]
    assert [cells[-1] for cells in rows] == ["-", "90.00%"]
