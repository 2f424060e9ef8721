"""The build cache by itself: keys, entries, locks, eviction, and what it refuses. Nothing is compiled here."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import UsageError
from ingot.compiler import cli
from ingot.compiler.cache import toolchain
from ingot.compiler.cache.entry import Entry, Key
from ingot.compiler.cache.evict import held, trim
from ingot.compiler.cache.keys import PLACES, STAGES, UNREAD, recipe_slice
from ingot.compiler.cache.session import Session
from ingot.compiler.cache.store import CacheStore
from ingot.compiler.recipe import Recipe
from ingot.compiler.recipe_parse import Key as RecipeKey
from ingot.compiler.recipe_parse import keys

ROOT = Path(__file__).parents[2]
KEY = Key("engine", "decode-b1", {"graph": "g", "recipe": {"model.dtype": "float32"}})


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    return CacheStore(tmp_path / "cache")


class Stage:
    """A stage that writes one file and counts how often it had to."""

    def __init__(self, folder: Path, content: bytes = b"code") -> None:
        self.path, self.content, self.made = folder / "engine.so", content, 0

    def run(self, session: Session, key: Key | None = KEY, **options: Any) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        return session.run(key, self._make, {"engine.so": self.path}, **options)

    def _make(self) -> dict[str, Any]:
        self.made += 1
        self.path.write_bytes(self.content)
        return {"constants": [["a", "b"]]}


def changed(recipe: Recipe, key: RecipeKey) -> Recipe:
    """The recipe with one key set to another value of its type."""
    sections = key.path.split(".")
    owner: Any = recipe
    for name in sections[:-1]:
        owner = getattr(owner, name)
    old, kind = getattr(owner, sections[-1]), key.type
    if get_origin(kind) is Literal:
        new = next((choice for choice in get_args(kind) if choice != old), "another")
    elif get_origin(kind) is tuple:
        new = (*old, 7 if get_args(kind)[0] is int else "seven")
    elif isinstance(old, bool):
        new = not old
    else:
        new = f"{old}x" if isinstance(old, str) else (old or 0) + 1
    value: Any = dataclasses.replace(owner, **{sections[-1]: new})
    for depth in range(len(sections) - 2, -1, -1):
        parent: Any = recipe
        for name in sections[:depth]:
            parent = getattr(parent, name)
        value = dataclasses.replace(parent, **{sections[depth]: value})
    return value


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", list(keys(Recipe)), ids=lambda key: key.path)
def test_every_key_of_a_recipe_is_in_the_key_of_some_stage(key: RecipeKey) -> None:
    recipe = Recipe("demo")
    other = changed(recipe, key)
    differ = {stage for stage in STAGES if recipe_slice(recipe, stage) != recipe_slice(other, stage)}
    # Engines are counted by the stages themselves: each has its own shape in its key.
    counted = key.path in ("shapes.decode_batch_sizes", "shapes.prefill_lengths")
    assert bool(differ) == (key.path not in PLACES), f"{key.path} is in the keys of {differ or 'no stage'}"
    assert not counted or differ == {"gate", "accuracy", "speed"}


def test_what_is_declared_unread_exists() -> None:
    known = {key.path for key in keys(Recipe)}
    for stage, names in UNREAD.items():
        assert names <= known, stage
    assert set(UNREAD) == set(STAGES)


def test_a_new_key_belongs_to_every_stage() -> None:
    @dataclasses.dataclass(frozen=True)
    class Newer(Recipe):
        shiny: int = 0

    for stage in STAGES:
        assert recipe_slice(Newer("demo", shiny=1), stage) != recipe_slice(Newer("demo"), stage)


def test_the_back_ends_code_is_all_that_compiling_imports() -> None:
    """Followed from the modules that compile engines: a file missing in SOURCES could change without a new key."""
    told = {path for name in toolchain.SOURCES["engine"] for path in toolchain._files(ROOT / name)}
    waiting, seen = [ROOT / "compiler/backends/aoti.py", ROOT / "compiler/backends/cuda/engine.py"], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1] / Path(*(node.module or "").split("."))
                found = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
                waiting += [item for item in found if item.is_file()]
    # How to run a compiler and open files says nothing of what comes out.
    plumbing = {"artifacts/files.py", "artifacts/cuda_probe.py", "passes/base.py", "passes/stages.py"}
    assert {path.relative_to(ROOT).as_posix() for path in seen - told} <= plumbing


def test_the_environment_enters_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = toolchain.compiler(), toolchain.processor(), toolchain.versions("torch", "none")
    for name in ("HOME", "TMPDIR", "TZ", "USER", "LANG", "CFLAGS", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    assert before == (
        toolchain.compiler(), toolchain.processor(), toolchain.versions("torch", "none")
    )  # fmt: skip
    monkeypatch.setenv("CXX", "g++ -Wall")
    assert toolchain.compiler()["arguments"] == "-Wall"


# --- entries ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_made_once(store: CacheStore, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "a")
    assert stage.run(Session(store)) == stage.run(Session(store)) == {"constants": [["a", "b"]]}
    assert (stage.made, stage.path.read_bytes()) == (1, b"code")
    assert stage.path.stat().st_nlink == 1, "code is never shared"


def test_another_field_is_another_entry_and_is_explained(store: CacheStore, tmp_path: Path) -> None:
    stage, session = Stage(tmp_path / "a"), Session(store, explain=True)
    stage.run(session)
    stage.run(session, Key("engine", "decode-b1", {"graph": "g", "recipe": {"model.dtype": "bfloat16"}}))
    assert [(step.outcome, step.why) for step in session.steps] == [
        ("miss", ["nothing of the stage 'engine' is in the cache"]),
        ("miss", ["recipe.model.dtype: float32 → bfloat16"]),
    ]


def test_without_a_key_or_a_store_everything_is_made(store: CacheStore, tmp_path: Path) -> None:
    stage, session = Stage(tmp_path / "a"), Session(None)
    stage.run(session)
    stage.run(session)
    stage.run(Session(store), None, name=("engine", "x"))
    assert (stage.made, held(store)) == (3, [])
    assert [step.outcome for step in session.steps] == ["off", "off"]


def test_a_stage_that_fails_is_not_kept(store: CacheStore) -> None:
    def make() -> None:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError):
        Session(store).run(KEY, make)
    assert held(store) == []


@pytest.mark.parametrize("name", ["engine.so", "entry.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove", "link", "fifo"])
def test_a_damaged_entry_is_put_in_quarantine_and_made_anew(
    store: CacheStore, tmp_path: Path, name: str, damage: str
) -> None:
    stage = Stage(tmp_path / "a")
    said: list[str] = []
    stage.run(Session(store))
    path = store.path("engine", KEY.digest()) / name
    content = path.read_bytes()
    if damage in ("remove", "link", "fifo"):
        path.unlink()
    if damage == "link":
        path.symlink_to("/etc/hostname")
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage != "remove":
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:-1], "grow": content + b"x"}[damage])
    stage.run(Session(store, log=said.append))
    assert (stage.made, stage.path.read_bytes()) == (2, b"code")
    assert len(os.listdir(store.folder / "quarantine")) == 1
    stage.run(Session(store))
    assert stage.made == 2


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_records_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        Entry.from_bytes(raw)


def test_data_is_shared_and_survives_what_happens_to_the_artifact(store: CacheStore, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "a", b"w" * (2 << 20))
    stage.run(Session(store), share=True)
    assert stage.path.stat().st_nlink == 2
    stage.path.unlink()
    stage.run(Session(store), share=True)
    assert (stage.made, stage.path.stat().st_nlink) == (1, 2)
    stage.path.write_bytes(b"x" * (2 << 20))  # through the link, into the cache
    stage.run(Session(store), share=True)
    assert (stage.made, stage.path.read_bytes()[:1]) == (2, b"w")


def test_a_cache_that_cannot_be_written_costs_time_only(
    store: CacheStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path / "a")
    said: list[str] = []

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert stage.run(Session(store, log=said.append)) is not None
    monkeypatch.undo()
    assert stage.path.read_bytes() == b"code"
    assert "No space left" in said[0]
    assert (held(store), os.listdir(store.folder / "aside")) == ([], [])


# --- locks and eviction ----------------------------------------------------------------------------------------------

_BUILD = """
import sys, time
from pathlib import Path
from ingot.compiler.cache.entry import Key
from ingot.compiler.cache.session import Session
from ingot.compiler.cache.store import CacheStore
folder, out = map(Path, sys.argv[1:3])
def make():
    with open(folder.parent / "made", "a") as file:
        file.write("x")
    time.sleep(float(sys.argv[3]))
    out.write_bytes(b"code")
    return {}
print("ready", flush=True)
Session(CacheStore(folder)).run(Key("engine", "e", {}), make, {"e.so": out})
"""


def test_eight_at_once_make_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _BUILD, str(tmp_path / "cache")]
    builds = [subprocess.Popen([*command, str(tmp_path / f"out{i}"), "0.5"]) for i in range(8)]
    assert [build.wait(60) for build in builds] == [0] * 8
    assert (tmp_path / "made").read_text() == "x"
    assert {(tmp_path / f"out{i}").read_bytes() for i in range(8)} == {b"code"}


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _BUILD, str(tmp_path / "cache"), str(tmp_path / "out")]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE) as first:
        while not (tmp_path / "made").exists():
            time.sleep(0.02)
        second = subprocess.Popen([*command, "0"])
        time.sleep(0.2)
        assert second.poll() is None, "it waits"
        first.kill()
    assert second.wait(30) == 0
    assert (tmp_path / "made").read_text() == "xx"


def test_the_least_recently_used_goes_first_and_nothing_in_use(store: CacheStore, tmp_path: Path) -> None:
    names = [Key("engine", "e", {"n": n}) for n in range(4)]
    for n, key in enumerate(names):
        Stage(tmp_path / "a", b"x" * 1000).run(Session(store), key)
        os.utime(store.path("engine", key.digest()) / "entry.json", (n, n))
    Stage(tmp_path / "a").run(Session(store), names[0])  # used: now the latest
    one = held(store)[0].size
    with store.lock(names[1].digest(), shared=True):
        removed = trim(store, 2 * one + one // 2)
    assert [entry.key for entry in removed] == [names[2].digest(), names[3].digest()]
    assert {entry.key for entry in held(store)} == {names[0].digest(), names[1].digest()}
    assert trim(store, 0) != []
    assert (held(store), os.listdir(store.folder / "aside")) == ([], [])


def test_what_a_killed_build_left_is_removed(store: CacheStore) -> None:
    (store.folder / "aside" / KEY.digest()).mkdir()
    (store.folder / "aside" / KEY.digest() / "half").write_text("x")
    with store.lock(KEY.digest()):
        trim(store, 0)
        assert os.listdir(store.folder / "aside") == [KEY.digest()], "its build may live"
    trim(store, 0)
    assert os.listdir(store.folder / "aside") == []


def test_collecting_and_building_at_once_lose_nothing(store: CacheStore, tmp_path: Path) -> None:
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            trim(store, 0)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        stage = Stage(tmp_path / "a")
        for _ in range(60):
            stage.run(Session(store))
            assert stage.path.read_bytes() == b"code"
    finally:
        stop.set()
        collector.join()
    assert os.listdir(store.folder / "quarantine") == []


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    CacheStore(tmp_path / "cache")
    for mode in (0o770, 0o707):
        (tmp_path / "cache").chmod(mode)
        with pytest.raises(UsageError, match="is refused") as caught:
            CacheStore(tmp_path / "cache")
        assert "others can write" in caught.value.why
    (tmp_path / "cache").chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    with pytest.raises(UsageError, match="is refused"):
        CacheStore(tmp_path / "link")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UsageError) as caught:
        CacheStore(tmp_path / "open" / "cache")
    assert "in its place" in caught.value.why


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 12345, -1)
    with pytest.raises(UsageError) as caught:
        CacheStore(tmp_path / "cache")
    assert "another user" in caught.value.why


def test_a_folder_with_other_things_is_never_taken_for_a_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    tmp_path.chmod(0o700)
    with pytest.raises(UsageError, match="no build cache"):
        CacheStore(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str) -> tuple[int, str]:
        code = cli.main(["cache", *words, "--cache-dir", str(tmp_path)])
        return code, capsys.readouterr().out

    store = CacheStore(tmp_path / "build")
    Stage(tmp_path / "a").run(Session(store))
    code, out = call("ls")
    assert code == 0
    assert "decode-b1" in out
    assert "1 entries" in out
    assert call("verify") == (0, "1 entries are sound, 0 were damaged\n")
    path = store.path("engine", KEY.digest()) / "engine.so"
    path.write_bytes(b"CODE")
    code, out = call("verify")
    assert code == 4
    assert "quarantine" in out
    code, out = call("gc", "--max-size", "1MB")
    assert (code, "1 damaged" in out) == (0, True)
    assert cli.main(["cache", "gc", "--max-size", "lots", "--cache-dir", str(tmp_path)]) == 2
    assert "write a number" in capsys.readouterr().err
