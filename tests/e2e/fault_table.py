"""Builds under injected faults, and the table of what came of them: `python -m ingot.tests.e2e.fault_table`.

A small model is built once as users build. Then builds run in forked children of a process that has everything loaded,
with compiling replaced by copying what was compiled; in each, one call that touches the output or the cache fails (or
the process is killed there), for every call in turn. Afterwards the output must be absent, the old artifact or the new
one, verified in full; the next build must succeed and equal an undisturbed one; no entry of the cache may be damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EMFILE": errno.EMFILE, "SIGKILL before": -1, "SIGKILL after": -2}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
# 0: done; 5: the machine failed; 130, 143: told to stop. Killed children have the signal's negative number.
_ALLOWED = {0, 5, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
_SOURCE = Path(__file__).with_name("fault_shim.cpp")


@dataclass
class Row:
    """What a kind of fault led to, over all calls it was tried at."""

    cache: str
    output: str
    fault: str
    tried: int = 0
    left: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        left = [str(self.left[state]) for state in ("absent", "old", "new")]
        codes = " ".join(f"{code}:{count}" for code, count in sorted(self.codes.items()))
        return [self.cache, self.output, self.fault, str(self.tried), *left, codes, str(len(self.wrong))]


HEAD = ["cache", "output", "fault", "tried", "absent", "old", "new", "exit codes", "wrong"]


def compile_shim(folder: Path) -> Path:
    """The shim as a shared object in `folder`."""
    library = folder / "fault_shim.so"
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)], check=True)
    return library


class Bench:
    """One model and its finished artifact, and the builds that are disturbed.

    Args:
        recipe, artifact: of a build that went well, see `Demo` in conftest.py. folder: where to work.
    """

    def __init__(self, recipe: Path, artifact: Path, folder: Path) -> None:
        from ingot.artifacts.manifest import load_manifest

        self.recipe, self.artifact, self.folder = recipe, artifact, folder
        self.output, self.cache = folder / "out" / "demo", folder / "cache"
        self.output.parent.mkdir()
        self._shim: Any = ctypes.CDLL(None)
        self._engines = {engine.name: engine.constants for engine in load_manifest(artifact).engines}
        self._replace_slow_parts()
        self.old, self.warm = folder / "old", folder / "warm"
        if code := self.build(["-o", str(self.old), "--set", "gate.max_tokens=4"]):
            raise RuntimeError(f"the old artifact could not be built: exit code {code}")
        shutil.rmtree(self.cache)
        if code := self.build():
            raise RuntimeError(f"an undisturbed build ends with exit code {code}")
        self.new_digest = load_manifest(self.output).digest()
        self.old_digest = load_manifest(self.old).digest()
        shutil.copytree(self.cache, self.warm)

    def _replace_slow_parts(self) -> None:
        """Trace once, take the finished engines for compiled ones, and the logits of one replay for the gate's."""
        from ingot.compiler import gate, workshop
        from ingot.compiler.backends import aoti, cpu_kernels
        from ingot.compiler.plan import Tracer
        from ingot.compiler.recipe import load_recipe

        recipe = load_recipe(self.recipe)
        tracer = Tracer(recipe, recipe.model_path())
        for shape in recipe.engines():
            tracer.add(shape)

        def compile_engine(traced: Any, name: str, output: Path, *args: Any, **options: Any) -> Any:
            _copy(self.artifact / "engines" / f"{name}.so", output)
            return self._engines[name]

        def compile_kernels(output: Path, **options: Any) -> None:
            _copy(self.artifact / "engines" / output.name, output)

        replay, known = gate.replay_in_child, {}

        def replay_once(root: Path, manifest: Any, pairs: Any, tokens: Any) -> Any:
            key = str((pairs, tokens))
            if key not in known:
                found = replay(root, manifest, pairs, tokens)
                known[key] = [[(number, values.copy()) for number, values in rows] for rows in found]
            return known[key]

        workshop.Tracer = lambda *args: tracer  # type: ignore[assignment, misc]
        aoti.compile_engine, aoti.missing_symbols = compile_engine, lambda *args: []  # type: ignore[assignment]
        cpu_kernels.compile_kernels = compile_kernels  # type: ignore[assignment]
        gate.replay_in_child = replay_once  # type: ignore[assignment]
        # Once here, so that every child knows the logits.
        self._in_this_process(["-o", str(self.folder / "first")])
        self._in_this_process(["-o", str(self.folder / "first"), "--set", "gate.max_tokens=4"])
        shutil.rmtree(self.cache)

    def _in_this_process(self, words: list[str]) -> int:
        from ingot.compiler import cli

        command = ["build", str(self.recipe), "-o", str(self.output), "--cache-dir", str(self.cache), "--json", *words]
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
            return cli.main(command)

    def start(self, words: list[str] = [], k: int = 0, fault: int = 0, counted: Path | None = None) -> int:  # noqa: B006
        """Begin a build in a forked child, with call number k to fail; the child's process number."""
        if child := os.fork():
            return child
        code = 99
        try:
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if fault or counted:
                roots = [os.fsencode(f"{path}/") for path in (self.output.parent, self.cache)]
                self._shim.ingot_fault_arm(ctypes.c_long(k), fault, *roots)
            code = self._in_this_process(words)
            if counted:
                self._shim.ingot_fault_calls.restype = ctypes.c_long
                calls = self._shim.ingot_fault_calls()
                counted.write_text(str(calls))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 99
        finally:
            os._exit(code)

    def build(self, words: list[str] = [], k: int = 0, fault: int = 0, counted: Path | None = None) -> int:  # noqa: B006
        """A build as by `start`, waited for: its exit code, or minus the signal that ended it."""
        _, status = os.waitpid(self.start(words, k, fault, counted), 0)
        return os.waitstatus_to_exitcode(status)

    def reset(self, cache: str, output: str) -> None:
        """Put the cache ("cold", "warm") and the output ("none", "old") into their state before a build."""
        for folder in (self.output.parent, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
        self.output.parent.mkdir()
        if cache == "warm":
            shutil.copytree(self.warm, self.cache, copy_function=shutil.copy2)
            self.cache.joinpath("build").chmod(0o700)
        if output == "old":
            shutil.copytree(self.old, self.output)

    def calls(self, cache: str, output: str) -> int:
        """How many calls of an undisturbed build can fail."""
        self.reset(cache, output)
        if self.build(counted=self.folder / "count"):
            raise RuntimeError("an undisturbed build failed")
        return int((self.folder / "count").read_text())

    def judge(self, row: Row, where: str, code: int) -> None:
        """Look at what a disturbed build left, build again, and note it."""
        row.tried += 1
        row.codes[code] += 1
        if code not in _ALLOWED:
            row.wrong.append(f"{where}: exit code {code}")
        state = self._state()
        row.left[state] += 1
        if state not in ("absent", "old", "new") or (state == "absent" and row.output == "old"):
            row.wrong.append(f"{where}: the output is {state}")
        if again := self.build():
            row.wrong.append(f"{where}: the next build ends with exit code {again}")
        elif (state := self._state()) != "new":
            row.wrong.append(f"{where}: the next build's output is {state}")
        if extra := [name for name in os.listdir(self.output.parent) if name != "demo"]:
            row.wrong.append(f"{where}: {extra} is left beside the output")
        if damaged := self._damaged():
            row.wrong.append(f"{where}: {damaged} damaged entries in the cache")

    def _state(self) -> str:
        from ingot.artifacts.errors import IngotError
        from ingot.artifacts.store import open_artifact

        if not os.path.lexists(self.output):
            return "absent"
        try:
            digest = open_artifact(self.output).manifest.digest()
        except IngotError as error:
            return f"broken: {error.what}"
        return {self.new_digest: "new", self.old_digest: "old"}.get(digest, "another artifact")

    def _damaged(self) -> int:
        from ingot.compiler.cache.store import CacheStore

        store = CacheStore(self.cache / "build")
        for stage, key in store.entries():
            if (entry := store.read(stage, key)) is not None:
                store.verify(entry)
        return len(os.listdir(store.folder / "quarantine"))


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def every_call(bench: Bench, cache: str, output: str, fault: str, step: int = 1, first: int = 1) -> Row:
    """Let each call fail in turn (or each `step`-th)."""
    row = Row(cache, output, fault)
    for k in range(first, bench.calls(cache, output) + 1, step):
        bench.reset(cache, output)
        code = bench.build(k=k, fault=FAULTS[fault])
        bench.judge(row, f"call {k}", code)
    return row


def random_times(bench: Bench, cache: str, output: str, name: str, count: int, seed: int = 0) -> Row:
    """Stop a build by a signal at random times."""
    rng = random.Random(seed)
    row = Row(cache, output, f"{name} at random")
    bench.reset(cache, output)
    begin = time.monotonic()
    bench.build()
    length = time.monotonic() - begin
    for _ in range(count):
        bench.reset(cache, output)
        child = bench.start()
        after = rng.uniform(0, length)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, SIGNALS[name])
        _, status = os.waitpid(child, 0)
        bench.judge(row, f"after {after:.3f} s", os.waitstatus_to_exitcode(status))
    return row


def rows(bench: Bench, step: int, random_count: int, only: str) -> Iterator[Row]:
    """The whole table, or the rows in whose name, such as "cold/old/EIO", `only` stands."""
    for cache, output in (("cold", "none"), ("cold", "old"), ("warm", "old")):
        for fault in FAULTS:
            if only not in f"{cache}/{output}/{fault}":
                continue
            yield every_call(bench, cache, output, fault, step)
    for name in SIGNALS:
        if only not in f"cold/old/{name} at random":
            continue
        yield random_times(bench, "cold", "old", name, random_count)


def main() -> int:
    """Prepare, preload the shim, print the table; 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--step", type=int, default=1, help="try each STEP-th call only")
    parser.add_argument("--random", type=int, default=100, help="how many kills at random times, per signal")
    parser.add_argument("--only", default="", help='rows in whose name this stands: "cold/old/EIO", "at random"')
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepared is None:
        with tempfile.TemporaryDirectory(prefix="ingot-faults-") as scratch:
            from ..conftest import make_demo

            folder = Path(scratch)
            demo = make_demo(folder / "demo", "--cache-dir", folder / "demo-cache")
            if demo.build.returncode:
                print(demo.build.stderr, file=sys.stderr)
                return 1
            environment = {**os.environ, "LD_PRELOAD": str(compile_shim(folder)), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "ingot.tests.e2e.fault_table", "--prepared", scratch]
            command += ["--step", str(options.step), "--random", str(options.random), "--only", options.only]
            return subprocess.run(command, env=environment, check=False).returncode
    (options.prepared / "work").mkdir()
    bench = Bench(
        options.prepared / "demo" / "recipe.toml", options.prepared / "demo" / "artifact", options.prepared / "work"
    )
    form = "  ".join(["{:<5}", "{:<6}", "{:<18}", "{:>5}", "{:>6}", "{:>5}", "{:>5}", "{:<24}", "{:>5}"])
    print(form.format(*HEAD), flush=True)
    failed = 0
    for row in rows(bench, options.step, options.random, options.only):
        print(form.format(*row.cells()), flush=True)
        failed += len(row.wrong)
        for line in row.wrong[:10]:
            print(f"      {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
