"""Crashes of the writer: an error, Ctrl-C or kill at any call leaves the old artifact or the new one."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts import staging
from ingot.artifacts.errors import IngotError, ResourceError
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import ArtifactWriter, open_artifact

ENGINE = "engines/decode-b1.so"


def content(folder: Path) -> str:
    """Which artifact stands there, verified in full."""
    return open_artifact(folder).path(ENGINE).read_text().split()[1]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


class Fault:
    """Counts the calls that matter for a crash, and lets the k-th one fail; before or after it took effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
        self.calls, self.at, self.after = 0, 0, False
        self.fail: Callable[[], object] = lambda: None
        for name in ("rename", "replace", "fsync", "mkdir", "rmdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        swap = self.wrap(staging.exchange) if exchange else lambda first, second: False
        monkeypatch.setattr(staging, "exchange", swap)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            hit = self.calls == self.at
            if hit and not self.after:
                self.fail()
            result = function(*args, **kwargs)
            if hit and self.after:
                self.fail()
            return result

        return call

    def arm(self, at: int, after: bool, fail: Callable[[], object]) -> None:
        self.calls, self.at, self.after, self.fail = 0, at, after, fail


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fault]:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # digests in one thread: the order of calls is fixed
    yield Fault(monkeypatch, request.param)


@pytest.fixture()
def small(maker: Any, manifest: Manifest) -> Any:
    """Writes artifacts of three files, for tests that write hundreds."""
    engine = dataclasses.replace(manifest.engines[0], libraries=())
    return type(maker)(dataclasses.replace(manifest, engines=(engine,)), [ENGINE, "tokenizer.json", *manifest.weights])


def count_calls(fault: Fault, small: Any, destination: Path) -> int:
    fault.arm(0, False, lambda: None)
    small.write(destination, "zeroth")
    fault.arm(0, False, lambda: None)
    small.write(destination, "first")
    return fault.calls


@pytest.mark.parametrize(
    ("error", "after"),
    [(OSError(errno.ENOSPC, "injected"), False), (KeyboardInterrupt(), True)],
    ids=["error before the call", "Ctrl-C after the call"],
)
def test_an_error_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, small: Any, fault: Fault, error: BaseException, after: bool
) -> None:
    total = count_calls(fault, small, tmp_path / "demo")
    assert total > 10

    def fail() -> None:
        raise error

    seen = set()
    for at in range(1, total + 1):
        before = content(tmp_path / "demo")
        fault.arm(at, after, fail)
        try:
            small.write(tmp_path / "demo", f"try{at}")
        except (IngotError, KeyboardInterrupt) as caught:
            assert isinstance(caught, ResourceError if isinstance(error, OSError) else KeyboardInterrupt)
        fault.arm(0, False, lambda: None)
        assert content(tmp_path / "demo") in (before, f"try{at}")
        seen.add(content(tmp_path / "demo") == before)
    assert seen == {True, False}
    small.write(tmp_path / "demo", "last")
    assert content(tmp_path / "demo") == "last"
    assert names(tmp_path) == ["demo"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, small: Any, fault: Fault, request: pytest.FixtureRequest
) -> None:
    """SIGKILL cleans nothing up. With two renames there is one moment of absence, which the next build mends."""
    total = count_calls(fault, small, tmp_path / "demo")
    atomic = "exchange" in request.node.name
    for at in range(1, total + 1):
        before = content(tmp_path / "demo")
        child = os.fork()
        if child == 0:
            fault.arm(at, False, lambda: os._exit(9))
            try:
                small.write(tmp_path / "demo", f"try{at}")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        fault.arm(0, False, lambda: None)
        if atomic or (tmp_path / "demo").exists():
            assert content(tmp_path / "demo") in (before, f"try{at}")
        else:
            with ArtifactWriter(tmp_path / "demo"):
                assert content(tmp_path / "demo") == before
    small.write(tmp_path / "demo", "last")
    assert content(tmp_path / "demo") == "last"
    assert names(tmp_path) == ["demo"]


def test_an_old_artifact_that_cannot_be_moved_back_is_kept_for_the_next_build(
    artifact: Path, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def one_way(source: Path, target: Path) -> None:
        if target == artifact:
            raise OSError(errno.EIO, "injected")
        rename(source, target)

    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", one_way)
    with pytest.raises(ResourceError):
        maker.write(artifact, "second")
    monkeypatch.setattr(os, "rename", rename)
    assert not artifact.exists()
    with ArtifactWriter(artifact):
        assert content(artifact) == "first"


def test_leftovers_of_a_killed_build_are_swept_and_nothing_else(tmp_path: Path, maker: Any) -> None:
    code = (
        "import os, sys; from ingot.artifacts.store import ArtifactWriter; w = ArtifactWriter(sys.argv[1]);"
        "w.__enter__(); (w.root / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    for destination in ("demo", "demo", "other"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / destination)], check=False)
    assert len(names(tmp_path)) == 2  # the second build of demo swept up after the first
    keep = [".demo.ingot-1-00000000", ".demo.ingot-backup", ".demo.ingot-1-00000001", "demo.ingot-1-00000002"]
    for name in keep:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    (tmp_path / keep[2] / staging.MARKER).write_text("not our words")
    (tmp_path / ".demo.ingot-1-00000003").symlink_to(tmp_path / keep[0])
    with ArtifactWriter(tmp_path / "demo") as living:
        maker.write(tmp_path / "demo")
        assert living.root.is_dir()
    left = names(tmp_path)
    other = [name for name in left if name.startswith(".other.")]
    assert len(other) == 1
    assert left == sorted([*keep, *other, "demo", ".demo.ingot-1-00000003"])
