"""Trust policies: their words, the record of what was built here, and that others cannot write it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ingot.artifacts.errors import ResourceError, UsageError
from ingot.artifacts.trust import Trust, key_folder, record_build, state_folder, was_built_here

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home of its own."""
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_default_is_local_or_configured_and_not_asked_of_everything() -> None:
    trust = Trust.parse(None)
    assert (trust.local, trust.configured, trust.explicit) == (True, True, False)
    assert trust.keys == () and trust.digests == frozenset()


def test_words_are_alternatives() -> None:
    trust = Trust.parse(["local", "signed:/a/b:c.pub", f"digest:sha256:{DIGEST}", "signed:d.pem"])
    assert trust == Trust(True, False, (Path("/a/b:c.pub"), Path("d.pem")), frozenset({DIGEST}), True)
    assert Trust.parse("signed").configured


@pytest.mark.parametrize(
    "word", ["", "Local", "any", "signed:", "digest:", DIGEST, f"digest:{DIGEST}", f"digest:sha256:{DIGEST[:-1]}",
             f"digest:sha256:{DIGEST.upper()}", f"digest:sha256:{DIGEST}\n", "local,signed", "digest:md5:00"],
)  # fmt: skip
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="cannot trust"):
        Trust.parse(word)


def test_an_empty_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        Trust.parse([])


def test_what_was_recorded_was_built_here(home: Path) -> None:
    assert "not built here" in was_built_here(DIGEST)
    record_build(DIGEST)
    record_build(DIGEST)
    assert was_built_here(DIGEST) == ""
    assert "not built here" in was_built_here(DIGEST.replace("0", "1"))
    assert os.listdir(state_folder()) == [DIGEST]
    assert state_folder().is_relative_to(home)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_record_that_others_can_write_proves_nothing(place: str) -> None:
    record_build(DIGEST)
    path = state_folder() / (DIGEST if place == "file" else "")
    path.chmod(0o777)
    assert "written by others" in was_built_here(DIGEST)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_record_of_another_user_proves_nothing() -> None:
    record_build(DIGEST)
    os.chown(state_folder() / DIGEST, 12345, 12345)
    assert "another user" in was_built_here(DIGEST)


@pytest.mark.parametrize("kind", ["symlink", "folder"])
def test_a_record_that_is_no_file_proves_nothing(home: Path, kind: str) -> None:
    state_folder().mkdir(parents=True)
    if kind == "symlink":
        (home / "elsewhere").touch()
        (state_folder() / DIGEST).symlink_to(home / "elsewhere")
    else:
        (state_folder() / DIGEST).mkdir()
    assert was_built_here(DIGEST) != ""


def test_a_record_that_cannot_be_written_is_a_resource_error(home: Path) -> None:
    (home / ".local").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot remember"):
        record_build(DIGEST)
    assert was_built_here(DIGEST) != ""


def test_configured_keys_are_those_in_the_folder() -> None:
    key_folder().mkdir(parents=True, mode=0o755)
    for name in ("b.pub", "a.pem", "readme.txt"):
        (key_folder() / name).touch()
    assert [key.name for key in Trust.parse("signed").public_keys()] == ["a.pem", "b.pub"]
    assert [key.name for key in Trust.parse(["signed:x", "signed"]).public_keys()] == ["x", "a.pem", "b.pub"]
    assert Trust.parse("local").public_keys() == ()


def test_keys_in_a_folder_that_others_can_write_are_refused() -> None:
    key_folder().mkdir(parents=True)
    key_folder().chmod(0o777)
    with pytest.raises(UsageError, match="cannot be trusted"):
        Trust.parse(None).public_keys()


def test_relative_base_folders_are_ignored(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    assert state_folder() == home / ".local/state/ingot/built"


def test_a_user_without_a_home_has_built_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert was_built_here(DIGEST) != ""
    assert Trust.parse(None).public_keys() == ()
