"""An artifact that is not what was built is refused by `verify` and by `run`, and nothing of it has run by then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.fingerprint import digest_file
from ingot.artifacts.manifest import load_manifest
from ingot.artifacts.store import open_artifact
from ingot.runtime import LLM
from ingot.runtime.engines.aoti_host import load_path

from ..conftest import Demo

Ingot = Callable[..., CompletedProcess[str]]
ENGINE = "engines/decode-b1.so"


def flip(root: Path) -> None:
    content = bytearray((root / ENGINE).read_bytes())
    content[len(content) // 2] ^= 1
    (root / ENGINE).write_bytes(content)


def swap(root: Path) -> None:
    """Exchange two engines."""
    first, second = root / ENGINE, root / "engines/decode-b4.so"
    first.rename(root / "x")
    second.rename(first)
    (root / "x").rename(second)


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest, which nothing but itself vouches for."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def named(root: Path) -> list[str]:
    """The flag that accepts whatever the manifest says, as a user would who was told this digest."""
    try:
        return [f"--trust=digest:sha256:{load_manifest(root).digest()}"]
    except VerificationError:
        return []


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "flipped byte in an engine": (flip, [ENGINE, "wrong digest"]),
    "missing weights": (lambda r: (r / "weights/model.safetensors").unlink(), ["weights/model.safetensors", "missing"]),
    "extra file": (lambda r: (r / "engines/more.so").write_bytes(b""), ["engines/more.so", "extra"]),
    "newer schema": (lambda r: edit(r, lambda m: m.update(schema_version=3)), ["schema_version is 3", "upgrade"]),
    "engines swapped": (swap, [ENGINE, "engines/decode-b4.so", "wrong size"]),
    "instructions this machine has not": (
        lambda r: edit(r, lambda m: m["target"].update(isa=["avx2", "avx99"])),
        ["avx99", "does not"],
    ),
    "another system": (lambda r: edit(r, lambda m: m["target"].update(system="plan9")), ["plan9"]),
    "no manifest": (lambda r: (r / "manifest.json").unlink(), ["manifest.json"]),
    "manifest is no JSON": (lambda r: (r / "manifest.json").write_text("{"), ["manifest.json", "not JSON"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_exit_code_4(demo: Demo, ingot: Ingot, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    folder = demo.copy(tmp_path / "artifact")
    damage(folder)
    for command in (["verify", folder], ["run", folder, "Once", "--max-tokens=3", *named(folder)]):
        done = ingot(*command)
        assert (done.returncode, done.stdout) == (4, ""), done.stderr
        assert "Traceback" not in done.stderr
        assert "fix:" in done.stderr
        for word in words:
            assert word in done.stderr


# --- a trap: an engine that leaves a mark as soon as it is loaded ----------------------------------------------------

TRAP = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void spring(void) {
  FILE* file = fopen(getenv("INGOT_TEST_TRAP"), "w");
  if (file) fclose(file);
}
"""


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared object that writes the file named by INGOT_TEST_TRAP when it is loaded."""
    folder = tmp_path_factory.mktemp("trap")
    (folder / "trap.cpp").write_text(TRAP)
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, "-shared", "-fPIC", "trap.cpp", "-o", "trap.so"], cwd=folder, check=True)
    return folder / "trap.so"


def plant(trap: Path, root: Path, place: str) -> None:
    """Put the trap in the place of native code, with that file's size."""
    size = (root / place).stat().st_size
    shutil.copyfile(trap, root / place)
    os.truncate(root / place, max(size, trap.stat().st_size))


def vouch(root: Path, place: str) -> None:
    """Make the manifest list the file as it stands now, as only its maker could."""

    def change(manifest: dict[str, Any]) -> None:
        [entry] = [entry for entry in manifest["files"] if entry["path"] == place]
        entry.update(size=(root / place).stat().st_size, sha256=digest_file(root / place))

    edit(root, change)


def sprung(ingot: Ingot, root: Path, mark: Path) -> tuple[int, bool]:
    """Exit code of a run, and whether the trap was loaded."""
    done = ingot("run", root, "Once", "--max-tokens=3", *named(root), env={**os.environ, "INGOT_TEST_TRAP": str(mark)})
    assert "Traceback" not in done.stderr
    return done.returncode, mark.exists()


@pytest.mark.parametrize("place", ["engines/kernels.so", ENGINE])
def test_no_native_code_is_loaded_before_it_is_verified(
    demo: Demo, ingot: Ingot, trap: Path, tmp_path: Path, place: str
) -> None:
    folder, mark = demo.copy(tmp_path / "artifact"), tmp_path / "mark"
    plant(trap, folder, place)
    assert sprung(ingot, folder, mark) == (4, False)
    # The trap is a good one: where the manifest vouches for it, it is loaded.
    vouch(folder, place)
    assert sprung(ingot, folder, mark) == (4, True)


def test_no_native_code_is_loaded_where_it_does_not_fit(demo: Demo, ingot: Ingot, trap: Path, tmp_path: Path) -> None:
    folder, mark = demo.copy(tmp_path / "artifact"), tmp_path / "mark"
    plant(trap, folder, "engines/kernels.so")
    vouch(folder, "engines/kernels.so")
    edit(folder, lambda m: m["target"].update(isa=["avx99"]))
    assert sprung(ingot, folder, mark) == (4, False)


def test_code_is_verified_when_only_sizes_are_asked_for(
    demo: Demo, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = demo.copy(tmp_path / "artifact"), tmp_path / "mark"
    plant(trap, folder, ENGINE)
    monkeypatch.setenv("INGOT_TEST_TRAP", str(mark))
    with pytest.raises(VerificationError, match=r"decode-b1\.so"):
        LLM(folder, verify="sizes")
    assert not mark.exists()


def test_code_is_loaded_from_the_bytes_that_were_verified(demo: Demo, tmp_path: Path) -> None:
    artifact = open_artifact(demo.copy(tmp_path / "artifact"))
    path, verified = load_path(artifact, ENGINE), artifact.path(ENGINE).read_bytes()
    flip(artifact.root)
    assert path.read_bytes() == verified
    with pytest.raises(VerificationError, match=r"decode-b1\.so is not what was built"):
        load_path(artifact, ENGINE)


# --- engines whose manifest fits the files, but not each other -------------------------------------------------------


def test_an_engine_that_wants_other_weights_is_refused(demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    folder = demo.copy(tmp_path / "artifact")

    def change(manifest: dict[str, Any]) -> None:
        manifest["engines"][0]["constants"][0]["symbol"] = "another"

    edit(folder, change)
    done = ingot("run", folder, "Once", *named(folder))
    assert (done.returncode, done.stdout) == (4, "")
    assert "disagree about its weights" in done.stderr


def test_a_weight_that_no_file_holds_is_refused(demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    folder = demo.copy(tmp_path / "artifact")

    def change(manifest: dict[str, Any]) -> None:
        manifest["engines"][0]["constants"][0]["weight"] = "another"

    edit(folder, change)
    done = ingot("run", folder, "Once", *named(folder))
    assert (done.returncode, done.stdout) == (4, "")
    assert "another" in done.stderr
