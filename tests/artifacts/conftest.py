"""A realistic manifest (the golden file) and a small artifact written with it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import ArtifactWriter

GOLDEN = Path(__file__).parents[1] / "golden" / "manifest-v2.json"


@pytest.fixture(scope="session")
def golden_text() -> str:
    return GOLDEN.read_text(encoding="ascii")


@pytest.fixture()
def golden(golden_text: str) -> dict[str, Any]:
    """The golden manifest as plain JSON, free to be broken."""
    return json.loads(golden_text)


@pytest.fixture(scope="session")
def manifest(golden_text: str) -> Manifest:
    """The golden manifest before the store adds the list of files."""
    return dataclasses.replace(Manifest.from_json(golden_text), files=())


@pytest.fixture(scope="session")
def paths() -> list[str]:
    return [entry["path"] for entry in json.loads(GOLDEN.read_text())["files"]]


class Maker:
    """Writes artifacts whose files all hold `content`, and looks at what stands in a folder."""

    def __init__(self, manifest: Manifest, paths: list[str]) -> None:
        self.manifest, self.paths = manifest, paths

    def fill(self, root: Path, content: str) -> None:
        for path in self.paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(f"{path} {content}")

    def write(self, destination: Path, content: str = "first", force: bool = False) -> Manifest:
        with ArtifactWriter(destination, force=force) as writer:
            self.fill(writer.root, content)
            return writer.commit(self.manifest)


@pytest.fixture()
def maker(manifest: Manifest, paths: list[str]) -> Maker:
    return Maker(manifest, paths)


@pytest.fixture()
def artifact(maker: Maker, tmp_path: Path) -> Path:
    """A good artifact's folder."""
    maker.write(tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing takes most of the time of these tests and changes nothing that they can see."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def no_leftovers() -> Any:
    """No test may leave a descriptor open."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    yield
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before
