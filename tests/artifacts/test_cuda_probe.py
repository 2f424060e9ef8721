"""What an artifact for a GPU finds on a machine: each reason not to run is one sentence that says what to do."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
from typing import Any

import pytest
from ingot.artifacts import cuda_probe
from ingot.artifacts.cuda_probe import CudaHost, check_cuda, probe_cuda
from ingot.artifacts.manifest import Target
from ingot.artifacts.target import check_target

H200 = CudaHost("", 1, (9, 0), "NVIDIA H200", "13.0.3")


def test_a_gpu_that_fits_gives_no_reason() -> None:
    assert check_cuda(("sm_90",), H200) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem": "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)"}, ["no NVIDIA driver", "install"]),
        ({"devices": 0}, ["none is visible", "CUDA_VISIBLE_DEVICES"]),
        ({"compute": (8, 0), "name": "NVIDIA A100"}, ["sm_90", "NVIDIA A100", "sm_80", "build it again for sm_80"]),
        ({"bindings": ""}, ["cuda-bindings", 'pip install "ingot[cuda]"']),
    ],
)
def test_each_reason_is_one_sentence(change: dict[str, Any], words: list[str]) -> None:
    [reason] = check_cuda(("sm_90",), dataclasses.replace(H200, **change))
    assert all(word in reason for word in words)


@pytest.mark.parametrize(
    ("isa", "compute", "fits"),
    [
        (("sm_90",), (9, 0), True),
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_90",), (10, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100",), (10, 3), True),
        (("sm_80", "sm_90"), (9, 0), True),
        ((), (9, 0), False),
        (("avx2",), (9, 0), False),
    ],
)
def test_cubins_run_on_their_own_and_later_ones_of_a_major_version(
    isa: tuple[str, ...], compute: tuple[int, int], fits: bool
) -> None:
    assert (check_cuda(isa, dataclasses.replace(H200, compute=compute)) == []) == fits


def test_a_target_for_a_gpu_asks_for_system_machine_and_gpu_but_no_cpu_flags() -> None:
    host = Target("cpu", "linux", "x86_64", (), "none", "")
    target = Target("cuda", "linux", "x86_64", ("sm_90",), "none", "2.11.0")
    assert check_target(target, host, H200) == []
    assert len(check_target(dataclasses.replace(target, machine="aarch64", isa=("sm_80",)), host, H200)) == 2


class FakeLibrary:
    """libcuda's functions, as ctypes shows them."""

    def __init__(self, init: int = 0, devices: int = 1, attribute: int = 0) -> None:
        self.init, self.devices, self.attribute = init, devices, attribute

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:
        value._obj.value = {75: 9, 76: 0}[which]
        return self.attribute

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def cuGetErrorName(self, status: Any, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_SYSTEM_NOT_READY"
        return 0


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (FakeLibrary(), CudaHost("", 1, (9, 0), "NVIDIA H200", "9.9", (12, 8))),
        (FakeLibrary(init=100), CudaHost(bindings="9.9", driver=(12, 8))),
        (FakeLibrary(devices=0), CudaHost(bindings="9.9", driver=(12, 8))),
    ],
)
def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary, expected: CudaHost) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    assert probe_cuda() == expected


@pytest.mark.parametrize("library", [FakeLibrary(init=802), FakeLibrary(attribute=802)])
def test_a_driver_that_fails_is_a_problem_with_its_name(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert "CUDA_ERROR_SYSTEM_NOT_READY" in probe_cuda().problem


def test_no_driver_and_no_bindings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    host = probe_cuda("libthere-is-none.so.9")
    assert "libthere-is-none.so.9" in host.problem
    assert len(check_cuda(("sm_90",), host)) == 2
    assert cuda_probe.CudaHost() == CudaHost()
