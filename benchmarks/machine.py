"""Facts about the machine, the versions and the source tree that a result would be worthless without."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from .results import Machine

ROOT = Path(__file__).resolve().parent.parent
# Those that decide which kernels run.
_FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_bf16", "asimd")


def describe_machine() -> Machine:
    """This machine, as far as Linux says; elsewhere fields stay empty."""
    cores = core_count()
    facts = dict(line.split(":", 1) for line in _read("/proc/cpuinfo").splitlines() if ":" in line)
    words = {key.strip(): value.strip() for key, value in facts.items()}
    present = (words.get("flags") or words.get("Features") or "").split()
    kilobytes = next((x.split()[1] for x in _read("/proc/meminfo").splitlines() if x.startswith("MemTotal")), "0")
    cpu = words.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in words:
        cpu += f" (family {words['cpu family']}, model {words.get('model', '?')})"
    load = os.getloadavg()[0]
    flags = [f for f in _FLAGS if f in present]
    return Machine(cpu, cores, cores, l3_bytes(), int(kilobytes) * 1024, flags, platform.platform(), round(load, 2))


def core_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def l3_bytes() -> int:
    """The last-level cache of the first core, or 32 MiB where the system does not say."""
    text = _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
    return int(text[:-1]) * unit if unit and text[:-1].isdigit() else 32 << 20


def versions() -> dict[str, str]:
    """Versions of what takes part; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in ("ingot", "numpy", "tokenizers", "torch", "transformers", "triton", "cuda-bindings"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def commit() -> tuple[str, bool]:
    """The source tree's commit ("" if there is none), and whether files differ from it."""
    head = _git("rev-parse", "HEAD")
    return (head, bool(_git("status", "--porcelain", "--untracked-files=no"))) if head else ("", False)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""
