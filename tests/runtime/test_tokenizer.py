"""Broken tokenizers and texts become errors, panics of the Rust library included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ingot.artifacts.errors import UsageError, VerificationError
from ingot.runtime.tokenizer import Tokenizer, _panics_as

from .conftest import byte_level_tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_text_survives_the_round_trip(path: Path) -> None:
    tokenizer = Tokenizer(path, 320)
    ids = tokenizer.encode("Bär 😀", add_special_tokens=True, limit=100)
    assert ids[0] == 0 and tokenizer.decode(ids[1:]) == "Bär 😀"
    assert tokenizer.special_ids == {0, 1} and tokenizer.token(1) == "</s>" and tokenizer.token(10**6) is None


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"nonsense", b"\xff\xfe", b"[" * 10_000, b'{"model": {"type": "BPE"}}']
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(VerificationError, match="not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", 320)


def test_a_broken_pattern_is_refused_at_load_or_at_use(path: Path) -> None:
    value = json.loads(path.read_text())
    value["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(?<name"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(value))
    with pytest.raises((VerificationError, UsageError)):
        Tokenizer(path, 320).encode("Hello", add_special_tokens=True, limit=10)


def test_panics_become_errors_and_interrupts_pass() -> None:
    class PanicException(BaseException):
        """As pyo3's: not an Exception."""

    with pytest.raises(VerificationError, match="broken"), _panics_as(lambda why: VerificationError(f"broken: {why}")):
        raise PanicException("index out of range")
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), _panics_as(lambda why: VerificationError(why)):
            raise error


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(path: Path) -> None:
    with pytest.raises(UsageError, match="5000000 characters is too long"):
        Tokenizer(path, 320).encode("a" * 5_000_000, add_special_tokens=True, limit=64)


def test_lone_surrogates_are_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be encoded"):
        Tokenizer(path, 320).encode("a\ud800b", add_special_tokens=True, limit=64)


def test_ids_beyond_the_models_vocabulary_are_refused_at_use(path: Path) -> None:
    tokenizer = Tokenizer(path, 100)
    with pytest.raises(UsageError, match="vocabulary ends at 99"):
        tokenizer.encode("Once upon a time", add_special_tokens=True, limit=64)
