"""Calibration text: what a file gives, what a model writes, and the files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ingot.artifacts.errors import UsageError
from ingot.compiler.calibrate.text import own_samples, read_samples
from ingot.compiler.console import SilentProgress
from ingot.compiler.families import save_random_model, subjects
from ingot.compiler.load_model import make_model
from ingot.compiler.model_weights import open_weights
from ingot.compiler.reference_model import ReferenceModel


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_pieces_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(100)))
    found = read_samples(file, encode, 4, 20, seed=0)
    whole = torch.tensor(encode(file.read_text())).view(5, 20)
    assert found.shape == (4, 20)
    assert all(any(torch.equal(piece, row) for row in whole) for piece in found)
    assert len({tuple(row.tolist()) for row in found}) == 4
    assert torch.equal(found, read_samples(file, encode, 4, 20, seed=0))
    assert any(not torch.equal(found, read_samples(file, encode, 4, 20, seed=s)) for s in range(1, 6))
    assert torch.equal(read_samples(file, encode, 5, 20, seed=3), whole)


def test_files_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("short")
    with pytest.raises(UsageError, match="too short") as caught:
        read_samples(file, encode, 2, 4, seed=0)
    assert "5 tokens are 1 samples of 4, and 2 are asked for" in caught.value.why
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(tmp_path / "none.txt", encode, 1, 4, seed=0)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(file, encode, 1, 1, seed=0)
    with pytest.raises(UsageError, match="tokenizer"):
        read_samples(file, None, 1, 1, seed=0)


def test_a_model_writes_by_its_own_probabilities(tmp_path: Path) -> None:
    config = {**subjects(["llama"])[0].config, "bos_token_id": 1, "eos_token_id": [2, 3]}
    save_random_model(config, tmp_path)
    weights = open_weights(make_model(config, "float32"), tmp_path, "float32", 0)
    model = ReferenceModel(config, "float32", weights.load)
    found = own_samples(model, config, 300, 6, 7, SilentProgress())
    assert torch.equal(found, own_samples(model, config, 300, 6, 7, SilentProgress()))
    assert (found[:, 0] == 1).all()
    # Where a text ended another begins.
    ended = (found[:, :-1] == 2) | (found[:, :-1] == 3)
    assert ended.any() and (found[:, 1:][ended] == 1).all()
    # Tokens drawn first are spread as the model says, and not as it says of another beginning.
    likely = torch.softmax(torch.from_numpy(model.logits([[1]], [0])[0])[0].double(), -1)
    share = torch.bincount(found[:, 1], minlength=len(likely)).double() / 300
    other = torch.softmax(torch.from_numpy(model.logits([[9]], [0])[0])[0].double(), -1)
    assert (share - likely).abs().sum() < (share - other).abs().sum()
    # The cache changes nothing: each drawn token is possible, and later ones depend on all before.
    assert found[:, 1:].max() < len(likely)
