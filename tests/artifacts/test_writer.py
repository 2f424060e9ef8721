"""Writing an artifact: whatever fails and whenever, the destination holds the old artifact or the new one."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts import staging, writer
from ingot.artifacts.errors import ResourceError, UsageError, VerificationError
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import ArtifactWriter, open_artifact

ENGINE = "engines/decode-b1.so"


def content(folder: Path) -> str:
    """Which artifact stands there, verified in full."""
    return open_artifact(folder).path(ENGINE).read_text().split()[1]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_new_artifact(tmp_path: Path, maker: Any) -> None:
    manifest = maker.write(tmp_path / "made" / "on" / "the" / "way" / "demo")
    opened = open_artifact(tmp_path / "made/on/the/way/demo")
    assert opened.manifest == manifest
    assert [entry.path for entry in manifest.files] == sorted(maker.paths)
    assert names(tmp_path / "made/on/the/way") == ["demo"]


def test_equal_content_gives_equal_manifests(tmp_path: Path, maker: Any) -> None:
    assert maker.write(tmp_path / "a").digest() == maker.write(tmp_path / "b" / "c").digest()
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/c/manifest.json").read_bytes()


def test_an_empty_folder_is_filled_and_empty_folders_are_not_shipped(tmp_path: Path, maker: Any) -> None:
    (tmp_path / "demo").mkdir()
    with ArtifactWriter(tmp_path / "demo") as open_writer:
        maker.fill(open_writer.root, "first")
        (open_writer.root / "empty/deep").mkdir(parents=True)
        (open_writer.root / "report/build.log").write_text("a time")
        open_writer.commit(maker.manifest)
    assert content(tmp_path / "demo") == "first"
    assert not (tmp_path / "demo/empty").exists()
    assert (tmp_path / "demo/report/build.log").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_artifact_is_replaced(
    artifact: Path, maker: Any, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    maker.write(artifact, "second")
    assert content(artifact) == "second"
    assert names(artifact.parent) == ["demo"]


def folder_with_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("precious")


def foreign_manifest(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"manifest_version": 3, "name": "a browser extension"}')


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        folder_with_notes,
        foreign_manifest,
        lambda path: path.write_text("a file"),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("elsewhere"),
        lambda path: (path.mkdir(), os.mkfifo(path / "manifest.json")),
    ],
)
def test_what_is_no_artifact_is_never_touched(
    tmp_path: Path, maker: Any, make: Callable[[Path], object], force: bool
) -> None:
    make(tmp_path / "demo")
    before = [(path, path.lstat()) for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(UsageError) as caught:
        maker.write(tmp_path / "demo", force=force)
    assert "demo" in caught.value.what
    assert [(path, path.lstat()) for path in sorted(tmp_path.rglob("*"))] == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / "notes.txt").write_text("precious"),
        lambda root: (root / ENGINE).unlink(),
        lambda root: (root / "manifest.json").write_text(
            (root / "manifest.json").read_text().replace('"schema_version": 2', '"schema_version": 3')
        ),
    ],
)
def test_an_artifact_that_is_not_as_built_is_replaced_by_force_only(
    artifact: Path, maker: Any, spoil: Callable[[Path], object]
) -> None:
    spoil(artifact)
    before = names(artifact)
    with pytest.raises(UsageError, match="--force"):
        maker.write(artifact, "second")
    assert names(artifact) == before
    maker.write(artifact, "second", force=True)
    assert content(artifact) == "second"


def test_a_destination_taken_during_the_build_is_not_touched(tmp_path: Path, maker: Any) -> None:
    with pytest.raises(UsageError), ArtifactWriter(tmp_path / "demo") as open_writer:
        maker.fill(open_writer.root, "first")
        folder_with_notes(tmp_path / "demo")
        open_writer.commit(maker.manifest)
    assert (tmp_path / "demo/notes.txt").read_text() == "precious"
    assert names(tmp_path) == ["demo"]


def test_two_builds_at_once_end_with_one_whole_artifact(tmp_path: Path, maker: Any) -> None:
    with ArtifactWriter(tmp_path / "demo") as first, ArtifactWriter(tmp_path / "demo") as second:
        maker.fill(first.root, "first")
        maker.fill(second.root, "second")  # its start did not sweep the living first one away
        first.commit(maker.manifest)
        assert content(tmp_path / "demo") == "first"
        second.commit(maker.manifest)
    assert content(tmp_path / "demo") == "second"
    assert names(tmp_path) == ["demo"]


def test_a_build_that_wins_the_race_in_the_last_moment(
    tmp_path: Path, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The destination is absent when looked at, and an artifact when the rename comes."""
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        if target == tmp_path / "demo":
            monkeypatch.setattr(os, "rename", rename)
            maker.write(tmp_path / "demo", "first")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    maker.write(tmp_path / "demo", "second")
    assert content(tmp_path / "demo") == "second"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_leaving_by_an_exception_leaves_no_trace(artifact: Path, maker: Any, error: type[BaseException]) -> None:
    for destination in (artifact, artifact.parent / "new/deep/demo"):
        with pytest.raises(error), ArtifactWriter(destination) as open_writer:
            maker.fill(open_writer.root, "second")
            raise error
    assert content(artifact) == "first"
    assert names(artifact.parent) == ["demo"]


def test_no_commit_publishes_nothing_and_one_is_enough(tmp_path: Path, maker: Any) -> None:
    with ArtifactWriter(tmp_path / "a/demo") as open_writer:
        maker.fill(open_writer.root, "x")
    assert names(tmp_path) == []
    with pytest.raises(UsageError):
        open_writer.root  # noqa: B018
    with ArtifactWriter(tmp_path / "demo") as open_writer:
        maker.fill(open_writer.root, "x")
        open_writer.commit(maker.manifest)
        with pytest.raises(UsageError, match="committed already"):
            open_writer.commit(maker.manifest)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / ENGINE).unlink(),  # the manifest names it
        lambda root: (root / "link").symlink_to(ENGINE),
        lambda root: os.mkfifo(root / "pipe"),
        lambda root: os.link(root / ENGINE, root / "engines/again.so"),
        lambda root: (root / "manifest.json").write_text("{}"),
        lambda root: (root / "a b").write_text("x"),
    ],
)
def test_what_would_not_open_is_not_published(artifact: Path, maker: Any, spoil: Callable[[Path], object]) -> None:
    with pytest.raises(VerificationError), ArtifactWriter(artifact) as open_writer:
        maker.fill(open_writer.root, "second")
        spoil(open_writer.root)
        open_writer.commit(maker.manifest)
    assert content(artifact) == "first"
    assert names(artifact.parent) == ["demo"]


def test_a_manifest_that_would_not_open_is_not_published(tmp_path: Path, maker: Any, manifest: Manifest) -> None:
    maker.manifest = dataclasses.replace(manifest, gate={"kl": float("nan")})
    with pytest.raises(VerificationError):
        maker.write(tmp_path / "demo")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("where", ["mkdir", "fsync", "block"])
def test_a_failing_disk_says_what_to_do(
    tmp_path: Path, maker: Any, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    if where != "block":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(ResourceError) as caught, ArtifactWriter(tmp_path / "demo") as open_writer:
        maker.fill(open_writer.root, "first")
        if where == "block":
            fail()
        open_writer.commit(maker.manifest)
    assert caught.value.exit_code == 5
    assert os.strerror(number) in caught.value.why
    assert caught.value.fix
    assert names(tmp_path) == []


@pytest.mark.parametrize("destination", ["/", "/proc", "a\0b", "x" * 300])
def test_impossible_destinations(tmp_path: Path, maker: Any, destination: str) -> None:
    with pytest.raises((UsageError, ResourceError)):
        maker.write(tmp_path / destination)
    assert names(tmp_path) == []


def test_the_exchange_is_used_where_the_system_has_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").touch()
    if not staging.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    assert names(tmp_path / "a") == ["file"]
    with pytest.raises(FileNotFoundError):
        staging.exchange(tmp_path / "a", tmp_path / "missing")
    assert writer.check_destination(tmp_path / "b", force=False) is False


def test_every_file_is_synced_before_the_manifest_and_the_manifest_before_the_rename(
    tmp_path: Path, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = os.rename

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(path.relative_to(tmp_path).as_posix().partition("/new/")[2] or path.name)

    def publish(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", publish)
    maker.write(tmp_path / "demo")
    assert sorted(events[: len(maker.paths)]) == sorted(maker.paths)
    assert events[len(maker.paths)] == "manifest.json"
    assert sorted(events[len(maker.paths) + 1 : -2]) == ["engines", "new", "report", "weights"]
    assert events[-2:] == ["rename", tmp_path.name]
