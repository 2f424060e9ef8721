"""Does an artifact fit this machine? Answered from the operating system and package metadata, before native code runs.

A missing CPU instruction would kill the process and a library of another version would fail in the middle of a load;
here each becomes a sentence. Nothing is imported that is asked about: torch's version comes from its metadata. What a
GPU must be is asked in cuda_probe.py.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from .cuda_probe import CudaHost, check_cuda
from .errors import VerificationError
from .manifest import Target

CPUINFO = Path("/proc/cpuinfo")

# The flags that decide which kernels run, in /proc/cpuinfo's words: x86-64 first, then 64-bit Arm.
KNOWN_ISA = (
    *("ssse3", "sse4_1", "sse4_2", "popcnt", "bmi1", "bmi2", "avx", "avx2", "fma", "f16c"),
    *("avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq", "avx512_vp2intersect"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("abm", "movbe", "adx", "aes", "vaes", "pclmulqdq", "vpclmulqdq", "gfni", "sha_ni", "rdrand", "rdseed", "clwb"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The flags all processors share, as Linux names them; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    processors = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return frozenset.intersection(*processors) if processors else frozenset()


def torch_version() -> str:
    """The installed torch's version, for example "2.13.0+cpu"; empty when there is none. Imports nothing."""
    try:
        return importlib.metadata.version("torch") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def host_target(cpuinfo: Path = CPUINFO) -> Target:
    """This machine as a target: its CPU flags out of `KNOWN_ISA`, no host library, torch's version if installed."""
    flags = cpu_flags(cpuinfo)
    machine = platform.machine().lower()
    return Target(
        device="cpu",
        system=platform.system().lower(),
        machine=_MACHINES.get(machine, machine),
        isa=tuple(flag for flag in KNOWN_ISA if flag in flags),
        host_library="none",
        torch=torch_version(),
    )


def check_target(target: Target, host: Target | None = None, cuda: CudaHost | None = None) -> list[str]:
    """The reasons why an artifact built for `target` does not run here, each a sentence; empty when it fits.

    `host` stands in for this machine: its flags, and its torch version ("" for no torch). `cuda` for its GPU.
    """
    flags = cpu_flags() if host is None else frozenset(host.isa)
    here = host_target() if host is None else host
    reasons = []
    if target.device not in ("cpu", "cuda"):
        reasons.append(f"it is built for the device {target.device}; this Ingot knows cpu and cuda")
    if target.system != here.system:
        reasons.append(f"it is built for {target.system}; this system is {here.system}")
    if target.machine != here.machine:
        reasons.append(f"it is built for {target.machine} processors; this machine is {here.machine}")
    elif target.device != "cuda" and (missing := [flag for flag in target.isa if flag not in flags]):
        reasons.append(f"it needs the CPU instructions {', '.join(missing)}, which this machine does not offer")
    if target.host_library == "libtorch":
        reasons += _check_torch(target.torch, here.torch)
    if target.device == "cuda":
        reasons += check_cuda(target.isa, cuda)
    return reasons


def _check_torch(wanted: str, found: str) -> list[str]:
    # Engines are linked against libtorch's C++ symbols, which hold within a minor version and not beyond.
    release = _release(wanted)
    command = f'`pip install "torch=={release}.*"`'
    if not found:
        return [f"it needs torch {release}, which is not installed: {command}"]
    if _release(found) != release:
        return [f"it needs torch {release}, found {found}: {command}, or build it again with this torch"]
    return []


def _release(version: str) -> str:
    """major.minor of a version."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def require_target(target: Target, what: str) -> None:
    """Refuse an artifact that does not fit this machine; `what` names it.

    Raises:
        VerificationError: with every reason `check_target` finds.
    """
    if reasons := check_target(target):
        fix = "run it on a machine that fits, build it again on one like this, or follow the hints above"
        raise VerificationError(f"{what} does not fit this machine", "; ".join(reasons), fix)
