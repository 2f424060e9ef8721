"""Opening an artifact refuses everything that is not exactly what was built, before anything of it could run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from ingot.artifacts.errors import UsageError, VerificationError
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import ArtifactWriter, check, open_artifact
from ingot.artifacts.target import host_target

ENGINE = "engines/decode-b1.so"
WEIGHTS = "weights/model.safetensors"


@pytest.fixture()
def manifest(manifest: Manifest) -> Manifest:
    """One that fits the machine the test runs on, so that `check` has nothing to say about the target."""
    return dataclasses.replace(manifest, target=dataclasses.replace(host_target(), isa=()))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.rename(path.parent.parent.parent / "moved")
    make(path)


def swap_engines(root: Path) -> None:
    first, second = root / ENGINE, root / "engines/decode-b4.so"  # names of equal length: sizes agree
    first.rename(root / "x")
    second.rename(first)
    (root / "x").rename(second)


def set_in_manifest(root: Path, old: str, new: str) -> None:
    text = (root / "manifest.json").read_text()
    assert old in text
    (root / "manifest.json").write_text(text.replace(old, new))


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's path may be 108 bytes long only
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # what is done, the path that is named, a word of the reason
    "flipped byte in an engine": (lambda root: flip(root / ENGINE), ENGINE, "wrong digest"),
    "flipped byte in the weights": (lambda root: flip(root / WEIGHTS), WEIGHTS, "wrong digest"),
    "longer": (lambda root: (root / ENGINE).write_text("x" * 1000), ENGINE, "wrong size"),
    "truncated": (lambda root: os.truncate(root / WEIGHTS, 3), WEIGHTS, "wrong size"),
    "empty": (lambda root: os.truncate(root / WEIGHTS, 0), WEIGHTS, "wrong size"),
    "missing weights": (lambda root: (root / WEIGHTS).unlink(), WEIGHTS, "missing"),
    "missing folder": (lambda root: shutil.rmtree(root / "engines"), ENGINE, "missing"),
    "extra file": (lambda root: (root / "notes.txt").write_text("x"), "notes.txt", "extra"),
    "extra engine": (lambda root: (root / "engines/evil.so").write_text("x"), "engines/evil.so", "extra"),
    "extra hidden file": (lambda root: (root / ".env").write_text("x"), ".env", "extra"),
    "extra file in report": (lambda root: (root / "report/x").write_text("x"), "report/x", "extra"),
    "extra folder": (lambda root: (root / "engines/more").mkdir(), "engines/more", "extra"),
    "extra name with control characters": (lambda root: (root / "a\x1b[2J").write_text("x"), "\\x1b[2J", "extra"),
    "extra name that is no UTF-8": (lambda root: open(os.fsencode(root) + b"/\xff", "w").close(), "udcff", "extra"),
    "extra FIFO": (lambda root: os.mkfifo(root / "pipe"), "pipe", "extra"),
    "dangling symlink": (lambda root: (root / "link").symlink_to("nowhere"), "link", "extra"),
    "engine is a symlink": (
        lambda root: replace_by(root / ENGINE, lambda path: path.symlink_to(root.parent / "moved")),
        ENGINE,
        "symbolic link",
    ),
    "folder is a symlink": (
        lambda root: ((root / "engines").rename(root.parent / "e"), (root / "engines").symlink_to(root.parent / "e")),
        "engines",
        "symbolic link",
    ),
    "engine is a hard link": (lambda root: os.link(root / ENGINE, root.parent / "other"), ENGINE, "hard link"),
    "library is a hard link": (
        lambda root: os.link(root / "engines/kernels.so", root.parent / "other"),
        "engines/kernels.so",
        "hard link",
    ),
    "engine is a FIFO": (lambda root: replace_by(root / ENGINE, os.mkfifo), ENGINE, "FIFO"),
    "weights are a FIFO": (lambda root: replace_by(root / WEIGHTS, os.mkfifo), WEIGHTS, "FIFO"),
    "engine is a socket": (lambda root: replace_by(root / ENGINE, bind_socket), ENGINE, "socket"),
    "engine is a folder": (lambda root: replace_by(root / ENGINE, os.mkdir), ENGINE, "a folder"),
    "log is a FIFO": (lambda root: os.mkfifo(root / "report/build.log"), "report/build.log", "FIFO"),
    "folder is a file": (
        lambda root: (shutil.rmtree(root / "engines"), (root / "engines").write_text("x")),
        "engines",
        "not a folder",
    ),
    "engines swapped": (swap_engines, ENGINE, "wrong digest"),
    "manifest is a symlink": (
        lambda root: (
            (root / "manifest.json").rename(root.parent / "m"),
            (root / "manifest.json").symlink_to(root.parent / "m"),
        ),
        "manifest.json",
        "symbolic link",
    ),
    "manifest is a FIFO": (
        lambda root: ((root / "manifest.json").unlink(), os.mkfifo(root / "manifest.json")),
        "manifest.json",
        "FIFO",
    ),
    "manifest is not JSON": (lambda root: (root / "manifest.json").write_text("{"), "manifest.json", "not JSON"),
    "newer schema": (
        lambda root: set_in_manifest(root, '"schema_version": 2', '"schema_version": 3'),
        "manifest.json",
        "schema_version is 3",
    ),
    "absolute path": (lambda root: set_in_manifest(root, '"report/gate.json"', '"/etc/passwd"'), "files", "relative"),
    "path that leaves": (lambda root: set_in_manifest(root, '"report/gate.json"', '"../gate"'), "files", "relative"),
    "digest rewritten": (
        lambda root: set_in_manifest(root, open_artifact(root).manifest.files[0].sha256, "0" * 64),
        "chat_template.jinja",
        "wrong digest",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_refused_and_named(artifact: Path, name: str) -> None:
    tamper, path, reason = TAMPERINGS[name]
    assert check(artifact) == []
    tamper(artifact)
    with pytest.raises(VerificationError) as caught:
        open_artifact(artifact)
    text = str(caught.value)
    assert path in text
    assert reason in text
    assert caught.value.fix
    findings = check(artifact)
    assert any(path in str(finding) and reason in str(finding) for finding in findings)
    assert all(finding.problem and finding.fix for finding in findings)
    with pytest.raises(VerificationError):  # only content is left to "full"
        open_artifact(artifact, verify="sizes" if "digest" not in reason else "full")


def test_a_good_artifact_opens(artifact: Path, maker: object) -> None:
    opened = open_artifact(artifact)
    assert opened.root == artifact.resolve()
    assert opened.path(ENGINE).read_text() == f"{ENGINE} first"
    assert opened.manifest.to_json() == (artifact / "manifest.json").read_text()
    assert open_artifact(str(artifact), verify="sizes") == opened


def test_report_files_with_times_are_the_only_unlisted_ones(artifact: Path) -> None:
    digest = open_artifact(artifact).manifest.digest()
    (artifact / "report/provenance.json").write_text("{}")
    (artifact / "report/build.log").write_text("x")
    assert open_artifact(artifact).manifest.digest() == digest
    assert check(artifact) == []


def test_data_may_be_hard_linked(artifact: Path) -> None:
    os.link(artifact / WEIGHTS, artifact.parent / "store")
    assert open_artifact(artifact)


def test_an_artifact_may_be_reached_through_a_link_and_copied(artifact: Path) -> None:
    (artifact.parent / "current").symlink_to(artifact)
    assert open_artifact(artifact.parent / "current").root == artifact.resolve()
    shutil.copytree(artifact, artifact.parent / "copy")
    assert open_artifact(artifact.parent / "copy").manifest == open_artifact(artifact).manifest


def test_all_bad_files_are_named_at_once(artifact: Path) -> None:
    flip(artifact / ENGINE)
    flip(artifact / WEIGHTS)
    with pytest.raises(VerificationError) as caught:
        open_artifact(artifact)
    assert ENGINE in str(caught.value)
    assert WEIGHTS in str(caught.value)
    (artifact / "tokenizer.json").unlink()
    (artifact / "extra").mkdir()
    assert {finding.path for finding in check(artifact)} == {ENGINE, WEIGHTS, "tokenizer.json", "extra"}


def test_thousands_of_extra_files_make_a_short_message(artifact: Path) -> None:
    for index in range(300):
        (artifact / f"x{index}").touch()
    with pytest.raises(VerificationError) as caught:
        open_artifact(artifact)
    assert "300 files" in caught.value.what
    assert len(str(caught.value)) < 5000


def test_sizes_leave_the_digest_to_the_caller(artifact: Path) -> None:
    flip(artifact / ENGINE)
    opened = open_artifact(artifact, verify="sizes")
    opened.verify([WEIGHTS, "tokenizer.json"])
    with pytest.raises(VerificationError, match=r"decode-b1\.so"):
        opened.verify([ENGINE, WEIGHTS])


@pytest.mark.parametrize("path", ["", "..", "../x", "/etc/hosts", "report/build.log", "engines", "manifest.json", "\0"])
def test_only_listed_files_have_a_path(artifact: Path, path: str) -> None:
    with pytest.raises(VerificationError):
        open_artifact(artifact).path(path)


def test_what_is_no_artifact_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "file", "file/x", "loop", "a\0b"):
        with pytest.raises(UsageError) as usage:
            open_artifact(tmp_path / name)
        assert "ingot build -o" in usage.value.fix
        with pytest.raises(UsageError):
            check(tmp_path / name)
    with pytest.raises(VerificationError, match="not an Ingot artifact"):
        open_artifact(tmp_path / "folder")
    with pytest.raises(UsageError, match="verify"):
        open_artifact(tmp_path / "folder", verify="none")  # type: ignore[arg-type]


def test_check_says_that_it_does_not_fit_this_machine(tmp_path: Path, maker: object, manifest: Manifest) -> None:
    target = dataclasses.replace(manifest.target, machine="vax", system="vms")
    with ArtifactWriter(tmp_path / "alien") as writer:
        maker.fill(writer.root, "x")  # type: ignore[attr-defined]
        writer.commit(dataclasses.replace(manifest, target=target))
    assert open_artifact(tmp_path / "alien")  # looking at it is fine anywhere
    assert [("vax" in str(f)) or ("vms" in str(f)) for f in check(tmp_path / "alien")] == [True, True]


def test_a_manifest_of_another_artifact_does_not_fit(artifact: Path, maker: object) -> None:
    maker.write(artifact.parent / "other", "other")  # type: ignore[attr-defined]
    shutil.copy(artifact.parent / "other" / ENGINE, artifact / ENGINE)
    with pytest.raises(VerificationError, match="wrong digest"):
        open_artifact(artifact)
    assert json.loads((artifact / "manifest.json").read_text())["name"] == "demo"
