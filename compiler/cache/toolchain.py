"""The tools and the code a stage is made with, found without importing any of them.

Versions come from package metadata; the C++ compiler is asked for its version and digested; Ingot's own source is
digested, since between two releases it changes without a version. The environment enters nowhere but as the choice of
the compiler, which is then identified by its content.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from ...artifacts.cuda_probe import probe_cuda
from ...artifacts.target import CPUINFO, cpu_flags

_ROOT = Path(__file__).resolve().parents[2]
_SUFFIXES = (".py", ".cpp", ".h")
_FLOORS = ("artifacts", "runtime", "passes", "compiler")
# What a stage's code is: folders and files of the package. Only what compiles engines is told apart from the rest,
# since compiling takes longest; a test compares it with what the back ends import.
SOURCES: dict[str, tuple[str, ...]] = {
    "trace": _FLOORS,
    "weights": _FLOORS,
    "kernels": ("compiler/backends/cpu_kernels.py", "compiler/backends/commands.py", "runtime/ops/cpu"),
    "engine": (
        "artifacts/errors.py", "artifacts/kernel_plan.py", "artifacts/manifest.py", "artifacts/strict.py",
        "compiler/backends", "passes/graph.py", "passes/weights.py", "runtime/ops",
    ),
    "gate": _FLOORS,
    "accuracy": _FLOORS,
    "speed": _FLOORS,
    "task": _FLOORS,
}  # fmt: skip


def versions(*packages: str) -> dict[str, str]:
    """Version by package, "" where one is not installed; and Python's."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@functools.cache
def code_digest(stage: str) -> str:
    """Digest of Ingot's own source that a stage runs."""
    digest = hashlib.sha256()
    for path in sorted({path for name in SOURCES[stage] for path in _files(_ROOT / name)}):
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    built = _ROOT / "artifacts" / "built"
    return [found for found in path.rglob("*") if found.suffix in _SUFFIXES and built not in found.parents]


def compiler() -> dict[str, str]:
    """The C++ compiler: first line of its version, digest of its program, and arguments that stand in CXX behind it."""
    program, *arguments = shlex.split(os.environ.get("CXX", "g++")) or ["g++"]
    found = shutil.which(program)
    if found is None:
        return {"version": "", "digest": "", "arguments": shlex.join(arguments)}
    try:
        done = subprocess.run(
            [found, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=30
        )
        version = next(iter(done.stdout.splitlines()), "")
        content = hashlib.sha256(Path(found).resolve().read_bytes()).hexdigest()
    except (OSError, subprocess.SubprocessError):  # told when it is needed
        version = content = ""
    return {"version": version[:200], "digest": content, "arguments": shlex.join(arguments)}


def processor() -> dict[str, str]:
    """What decides the code made for the machine at hand: the processor's model and its instructions."""
    try:
        lines = CPUINFO.read_text("ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("vendor_id", "cpu family", "model", "stepping", "model name"):
            facts.setdefault(name.strip().replace(" ", "_"), value.strip())
    return {**facts, "machine": platform.machine(), "flags": " ".join(sorted(cpu_flags()))}


def gpu() -> dict[str, str]:
    """The first visible GPU: its name and compute capability."""
    host = probe_cuda()
    return {"name": host.name, "compute": "{}.{}".format(*host.compute), "problem": host.problem}
