"""What this machine offers to artifacts for NVIDIA GPUs: driver, device, compute capability, Python bindings.

Asked of the driver itself through ctypes, without making a context or importing anything: a reason not to run becomes
a sentence before a byte of device memory is taken. CUDA_VISIBLE_DEVICES is the driver's own to respect.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from dataclasses import dataclass

# Of CUdevice_attribute, a stable part of the driver's interface.
_MAJOR, _MINOR = 75, 76
_INSTALL = '`pip install "ingot[cuda]"`'


@dataclass(frozen=True)
class CudaHost:
    """The first visible GPU and what is needed to use it.

    `problem` says why the driver could not be asked, empty if it could; `compute` is (major, minor) and `name` the
    model of device 0; `bindings` is the version of cuda-bindings, empty if not installed; `driver` is the CUDA
    version that the driver is for, (0, 0) if it does not say.
    """

    problem: str = ""
    devices: int = 0
    compute: tuple[int, int] = (0, 0)
    name: str = ""
    bindings: str = ""
    driver: tuple[int, int] = (0, 0)


def probe_cuda(library: str = "libcuda.so.1") -> CudaHost:
    """Ask the driver and the package metadata; never raises."""
    try:
        bindings = importlib.metadata.version("cuda-bindings") or ""
    except importlib.metadata.PackageNotFoundError:
        bindings = ""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return CudaHost(f"there is no NVIDIA driver ({library} cannot be loaded)", bindings=bindings)
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)
    if status := driver.cuInit(0):
        # 100 is CUDA_ERROR_NO_DEVICE: an answer, not a failure.
        problem = "" if status == 100 else f"the NVIDIA driver does not start (cuInit: {_error(driver, status)})"
        return CudaHost(problem, bindings=bindings, driver=version)
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value == 0:
        return CudaHost(bindings=bindings, driver=version)
    name = ctypes.create_string_buffer(128)
    status = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or driver.cuDeviceGetName(name, len(name), device)
    )
    if status:
        problem = f"the NVIDIA driver does not answer ({_error(driver, status)})"
        return CudaHost(problem, count.value, bindings=bindings, driver=version)
    model = name.value.decode(errors="replace")
    return CudaHost("", count.value, (major.value, minor.value), model, bindings, version)


def architecture(capability: int) -> str:
    """What Triton compiles for: from Hopper on with the features of one capability, whose code runs there alone."""
    return f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"


def check_cuda(isa: tuple[str, ...], host: CudaHost | None = None) -> list[str]:
    """The reasons why cubins for these compute capabilities ("sm_90") do not run here, each a sentence.

    A cubin runs on its own compute capability and on later ones of the same major version; one for "sm_90a" on 9.0
    alone. `host` stands in for this machine.
    """
    host = probe_cuda() if host is None else host
    built = ", ".join(isa) or "no compute capability"
    reasons = []
    if host.problem:
        reasons.append(f"it needs an NVIDIA GPU ({built}), but {host.problem}: install the driver")
    elif host.devices == 0:
        reasons.append(f"it needs an NVIDIA GPU ({built}), and none is visible: see CUDA_VISIBLE_DEVICES")
    elif not any(_runs(name, host.compute) for name in isa):
        here = "sm_{}{}".format(*host.compute)
        reasons.append(f"it is built for {built}; this GPU ({host.name}) is {here}: build it again for {here}")
    if not host.bindings:
        reasons.append(f"it needs cuda-bindings, which is not installed: {_INSTALL}")
    return reasons


def _runs(built: str, here: tuple[int, int]) -> bool:
    found = re.fullmatch(r"sm_([0-9]+)([0-9])(a?)", built)
    if found is None:
        return False
    compute = (int(found[1]), int(found[2]))
    return compute == here if found[3] else compute[0] == here[0] and compute[1] <= here[1]


def _error(driver: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
    return (text.value or b"").decode(errors="replace") or f"error {status}"
