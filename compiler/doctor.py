"""`ingot doctor`: what this machine can build and run, what is missing for the rest, and how to get it.

Every check tries the thing itself where that is cheap (the compiler compiles, the cache is opened, the driver is
asked) and asks package metadata otherwise; torch and transformers are not imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.cuda_probe import architecture, probe_cuda
from ..artifacts.errors import IngotError, ResourceError
from ..artifacts.target import cpu_flags
from .backends.commands import run_compiler
from .cache import toolchain
from .cache.evict import held
from .cache.location import open_store
from .console import print_table, size_text

ABILITIES = {
    "run": "run artifacts for the CPU",
    "build": "build for the CPU",
    "run-cuda": "run artifacts for the GPU",
    "build-cuda": "build for the GPU",
}
_ALL = tuple(ABILITIES)
_BUILDS = ("build", "build-cuda")
_GPU = ("run-cuda", "build-cuda")
_INSTALL = {"": "pip install ingot", "compile": 'pip install "ingot[compile]"', "cuda": 'pip install "ingot[cuda]"'}
# package, least version, the extra that brings it, what needs it; a test compares them with pyproject.toml
PACKAGES = (
    ("numpy", "1.26", "", _ALL), ("tokenizers", "0.21", "", _ALL), ("jinja2", "3.1", "", _ALL),
    ("torch", "2.11", "compile", _BUILDS), ("transformers", "5.17", "compile", _BUILDS),
    ("safetensors", "0.5", "compile", _BUILDS), ("cuda-bindings", "12.9", "cuda", _GPU),
)  # fmt: skip
_V3 = ("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm")
_LEAST_DRIVER = (12, 4)
_ROOM_BYTES = 5_000_000_000
_PROGRAM = '#include <omp.h>\n#include <optional>\nextern "C" int threads() { return omp_get_max_threads(); }\n'


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: "ok", "missing", or "low" for what works but may not last.
        needed_for: the abilities that are lost without it; fix: how to get it.
    """

    name: str
    status: str
    found: str
    needed_for: tuple[str, ...] = ()
    fix: str = ""


def doctor(args: argparse.Namespace) -> int:
    """Print the findings and what follows from them; 0 if all that was asked for works, else the code of resources."""
    findings = list(examine(args.cache_dir))
    able = {name: not [f for f in findings if f.status == "missing" and name in f.needed_for] for name in ABILITIES}
    wanted = args.needs or ["run", "build"]
    if args.json:
        print(json.dumps({"able": able, "needs": wanted, "findings": [dataclasses.asdict(f) for f in findings]}))
    else:
        print_table("this machine", ("", "status", "found"), [(f.name, f.status, f.found) for f in findings])
        for finding in findings:
            if finding.status != "ok" and finding.fix:
                print(f"{finding.name}: {finding.fix}")
        if any(f.status != "ok" and f.fix for f in findings):
            print()
        for name, words in ABILITIES.items():
            lacking = [f.name for f in findings if f.status == "missing" and name in f.needed_for]
            print(f"{'can   ' if able[name] else 'cannot'} {words}" + (f": {', '.join(lacking)}" if lacking else ""))
    return 0 if all(able[name] for name in wanted) else ResourceError.exit_code


def examine(cache_dir: Path | None = None) -> Iterator[Finding]:
    """Look at everything, in the order a build would meet it."""
    yield _system()
    yield _python()
    for name, least, extra, needed_for in PACKAGES:
        yield _package(name, least, _INSTALL[extra], needed_for)
    yield _compiler()
    yield _binutils()
    yield _processor()
    yield from _gpu()
    yield _triton()
    yield _torch_for_cuda()
    yield _memory()
    for name, folder in (("disk here", Path.cwd()), ("disk for scratch files", Path(tempfile.gettempdir()))):
        yield _disk(name, folder)
    yield _cache(cache_dir)


def _system() -> Finding:
    found = f"{platform.system()} {platform.machine()}"
    good = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    return Finding("system", "ok" if good else "missing", found, _ALL, "" if good else "use 64-bit Linux")


def _python() -> Finding:
    good = _numbers(platform.python_version()) >= (3, 11)
    fix = "" if good else "install Python 3.11 or newer"
    return Finding("python", "ok" if good else "missing", platform.python_version(), _ALL, fix)


def _package(name: str, least: str, install: str, needed_for: tuple[str, ...]) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", needed_for, install)
    if _numbers(version) < _numbers(least):
        return Finding(name, "missing", f"{version}, older than {least}", needed_for, install)
    return Finding(name, "ok", version, needed_for)


def _compiler() -> Finding:
    """Compiles a small OpenMP library, as a build would."""
    command = shlex.split(os.environ.get("CXX", "g++")) or ["g++"]
    fix = "install g++ 11 or later (Debian: apt-get install g++), or set CXX"
    with tempfile.TemporaryDirectory(prefix="ingot-doctor-") as scratch:
        source = Path(scratch) / "probe.cpp"
        source.write_text(_PROGRAM)
        output = str(source.with_suffix(".so"))
        try:
            run_compiler(
                [*command, "-std=c++17", "-fopenmp", "-shared", "-fPIC", str(source), "-o", output], "a probe", 60
            )
        except ResourceError as error:
            return Finding("C++ compiler", "missing", error.what, ("build",), fix)
    return Finding("C++ compiler", "ok", toolchain.compiler()["version"] or command[0], ("build",))


def _binutils() -> Finding:
    lacking = [name for name in ("nm", "strip", "ld") if shutil.which(name) is None]
    if lacking:
        return Finding("binutils", "missing", f"no {', '.join(lacking)}", ("build",), "apt-get install binutils")
    return Finding("binutils", "ok", "nm, strip, ld", ("build",))


def _processor() -> Finding:
    facts, flags = toolchain.processor(), cpu_flags()
    found = f"{facts.get('model_name', platform.machine())}, {os.cpu_count()} cores"
    if platform.machine() == "x86_64" and (lacking := [flag for flag in _V3 if flag not in flags]):
        words = f"{found}; lacks {', '.join(lacking)}"
        return Finding("processor", "missing", words, ("run", "build"), "use a processor of 2015 or later (x86-64-v3)")
    return Finding("processor", "ok", found, ("run", "build"))


def _gpu() -> Iterator[Finding]:
    host = probe_cuda()
    if host.problem:
        fix = "install NVIDIA's driver for CUDA 12.4 or newer; without a GPU, build for the CPU"
        yield Finding("NVIDIA driver", "missing", host.problem, _GPU, fix)
        return
    version = f"for CUDA {host.driver[0]}.{host.driver[1]}"
    old = host.driver < _LEAST_DRIVER
    yield Finding(
        "NVIDIA driver", "missing" if old else "ok", version, _GPU, "update it to CUDA 12.4 or newer" if old else ""
    )
    if not host.devices:
        yield Finding("GPU", "missing", "none is visible", _GPU, "see CUDA_VISIBLE_DEVICES")
        return
    sm = architecture(10 * host.compute[0] + host.compute[1])
    early = host.compute < (9, 0)
    fix = "builds need compute capability 9.0 (Hopper) or later" if early else ""
    yield Finding("GPU", "missing" if early else "ok", f"{host.name}, {sm}", ("build-cuda",), fix)


def _triton() -> Finding:
    fix = "install a torch built for CUDA, which brings triton"
    return _package("triton", "3.6", fix, ("build-cuda",))


def _torch_for_cuda() -> Finding:
    version = toolchain.versions("torch")["torch"]
    good = bool(version) and "+cpu" not in version
    fix = "" if good else "install torch from https://pytorch.org for your CUDA version"
    found = version or "not installed"
    return Finding("torch for CUDA", "ok" if good else "missing", found, ("build-cuda",), fix)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    low = total < 4_000_000_000
    fix = "a build holds the largest tensor and the compiler: about 2 GB" if low else ""
    return Finding("memory", "low" if low else "ok", size_text(total), (), fix)


def _disk(name: str, folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(name, "missing", f"{folder}: {error.strerror}", _BUILDS, "choose another folder")
    low = free < _ROOM_BYTES
    fix = f"free some space in {folder}: an artifact is as large as its weights" if low else ""
    return Finding(name, "low" if low else "ok", f"{size_text(free)} free in {folder}", (), fix)


def _cache(folder: Path | None) -> Finding:
    try:
        store = open_store(folder)
        found = f"{size_text(sum(entry.size for entry in held(store)))} in {store.folder}"
    except (IngotError, OSError) as error:
        why = error.why if isinstance(error, IngotError) else str(error)
        fix = error.fix if isinstance(error, IngotError) else "choose another folder with --cache-dir"
        return Finding("build cache", "low", why, (), fix)
    return Finding("build cache", "ok", found)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
