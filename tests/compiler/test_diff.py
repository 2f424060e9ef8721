"""`ingot diff`: each section, tensor by tensor, from two artifacts that differ in known places."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import ArtifactWriter
from ingot.compiler.cli import main
from ingot.compiler.diff import diff

GOLDEN = Path(__file__).parents[1] / "golden" / "manifest-v2.json"


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, value in tensors.items():
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(folder: Path, change: Callable[[dict[str, Any]], object] = lambda m: None, **tensors: np.ndarray) -> Path:
    value = json.loads(GOLDEN.read_text())
    paths = [entry["path"] for entry in value["files"]]
    change(value)
    with ArtifactWriter(folder) as writer:
        for path in paths:
            (writer.root / path).parent.mkdir(parents=True, exist_ok=True)
            (writer.root / path).write_text(path)
        for path in value["weights"]:
            (writer.root / path).write_bytes(safetensors(tensors))
        writer.commit(replace(Manifest.from_json(json.dumps(value)), files=()))
    return folder


ONE = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_the_same_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", x=ONE), write(tmp_path / "b", x=ONE)
    assert diff(a, b).equal
    assert main(["diff", str(a), str(b)]) == 0
    assert "the same artifact" in capsys.readouterr().out


def test_each_section(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["model"] = {"max_length": 7}
        manifest["toolchain"]["torch"] = "9.9"
        manifest["engines"][0]["memory_bytes"] = 5
        manifest["passes"].append({"engine": "decode-b1", "name": "new-pass", "changed": 3, "missed": []})

    a = write(tmp_path / "a", same=ONE, other=ONE, gone=ONE)
    b = write(tmp_path / "b", change, same=ONE, other=ONE + 1, shape=ONE.reshape(3, 2))
    result = diff(a, b)
    where = {name: [item.where for item in changes] for name, changes in result.sections.items()}
    assert any(path.startswith("model") for path in where["recipe"])
    assert where["toolchain"] == ["torch"]
    assert where["engines"] == ["decode-b1.memory_bytes"]
    assert where["passes"] == ["decode-b1 new-pass"]
    assert where["weights"] == ["other", "gone", "shape"]
    assert (result.same, result.equal) == (1, False)
    [gone] = [item for item in result.sections["weights"] if item.where == "gone"]
    assert gone.first.startswith("F32 2x3 ") and gone.second == "-"
    files = diff(a, b, weights=False).sections["weights"]
    assert [item.where for item in files] == ["weights/model.safetensors"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", x=ONE), write(tmp_path / "b", x=ONE + 1)
    assert main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "weights: 1 differ" in out and "ingot compare" in out and "recipe" in out
    assert main(["diff", str(a), str(b), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["equal"] is False and facts["sections"]["weights"][0]["where"] == "x"


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"[1,2]", b"\x02" + bytes(7) + b"{}"]
)
def test_weights_that_are_no_safetensors_are_refused_or_empty(tmp_path: Path, content: bytes) -> None:
    a = write(tmp_path / "a", x=ONE)
    value = json.loads(GOLDEN.read_text())
    with ArtifactWriter(tmp_path / "b") as writer:
        for entry in value["files"]:
            (writer.root / entry["path"]).parent.mkdir(parents=True, exist_ok=True)
            (writer.root / entry["path"]).write_bytes(content if entry["path"] in value["weights"] else b"x")
        writer.commit(replace(Manifest.from_json(json.dumps(value)), files=()))
    if content.endswith(b"{}"):
        assert [item.where for item in diff(a, tmp_path / "b").sections["weights"]] == ["x"]
    else:
        with pytest.raises(VerificationError, match=r"model\.safetensors"):
            diff(a, tmp_path / "b")
