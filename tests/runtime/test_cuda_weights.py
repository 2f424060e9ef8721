"""Weights on their way to the fake GPU: every byte in its place, every digest compared, whatever the sizes are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import ResourceError, VerificationError
from ingot.artifacts.fingerprint import digest_bytes
from ingot.runtime.engines.cuda_weights import WeightStream
from ingot.runtime.weights import WeightsFile, map_weights, read_headers

from .fake_cuda import FakeDriver
from .plan_artifact import safetensors_bytes


def make_file(folder: Path, name: str, size: int, seed: int = 0) -> WeightsFile:
    """A weights file of at least `size` bytes of data."""
    data = np.random.default_rng(seed).normal(size=-(-size // 4)).astype(np.float32)
    path = folder / f"{name}.safetensors"
    path.write_bytes(safetensors_bytes({f"{name}.a": data, f"{name}.b": data[:3]}))
    return read_headers([path])[0]


def stream(files: list[WeightsFile], piece: int, chunk: int, digests: dict[int, str] | None = None) -> FakeDriver:
    """Stream files, checking what lies on the device afterwards."""
    gpu: Any = FakeDriver({}, total=1 << 26)
    gpu.activate()
    addresses = [gpu.allocate(file.size) for file in files]
    whole = {i: digest_bytes(file.path.read_bytes(), chunk) for i, file in enumerate(files)}
    try:
        WeightStream(gpu, files, addresses, whole if digests is None else digests, piece, chunk).run()
    finally:
        assert (gpu.host, gpu.live) == ({}, [])
    for file, address in zip(files, addresses, strict=True):
        assert gpu.view(address, file.size).tobytes() == file.path.read_bytes()
    return gpu


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=4), st.integers(1, 3000), st.sampled_from([512, 1000, 1 << 20])
)
def test_files_of_any_size_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], piece: int, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    stream([make_file(folder, f"w{i}", size, i) for i, size in enumerate(sizes)], piece, chunk)


def test_many_threads_share_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    stream([make_file(tmp_path, "w", 200_000)], piece=700, chunk=1000)


def test_no_files_are_no_work(tmp_path: Path) -> None:
    assert stream([], 4096, 4096).uploads == 0


def test_every_file_with_a_wrong_digest_is_named(tmp_path: Path) -> None:
    files = [make_file(tmp_path, name, 5000) for name in ("one", "two", "three")]
    digests = {i: digest_bytes(file.path.read_bytes(), 1024) for i, file in enumerate(files)}
    with pytest.raises(VerificationError, match=r"weights one\.safetensors, three\.safetensors are not intact"):
        stream(files, 512, 1024, digests | {0: "0" * 64, 2: digests[1]})
    # Without an expectation nothing is compared.
    stream(files, 512, 1024, {1: digests[1]})


def test_a_digest_depends_on_the_order_of_the_chunks(tmp_path: Path) -> None:
    file = make_file(tmp_path, "w", 5000)
    content = file.path.read_bytes()
    digest = digest_bytes(content, 1024)
    file.path.write_bytes(content[:1024] + content[2048:3072] + content[1024:2048] + content[3072:])
    with pytest.raises(VerificationError, match="not intact"):
        stream([file], 512, 1024, {0: digest})


def truncate(file: WeightsFile) -> None:
    os.truncate(file.path, file.size - 100)


def extend(file: WeightsFile) -> None:
    os.truncate(file.path, file.size + 1)


def rename_a_tensor(file: WeightsFile) -> None:
    file.path.write_bytes(file.path.read_bytes().replace(b"w.a", b"w.c"))


def remove(file: WeightsFile) -> None:
    file.path.unlink()


@pytest.mark.parametrize("change", [truncate, extend, rename_a_tensor, remove])
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_a_file_that_changes_behind_its_header_is_refused(
    tmp_path: Path, change: Callable[[WeightsFile], None], piece: int
) -> None:
    file = make_file(tmp_path, "w", 5000)
    change(file)
    gpu: Any = FakeDriver({})
    gpu.activate()
    with pytest.raises(VerificationError, match=r"changed while it was read|is missing"):
        WeightStream(gpu, [file], [gpu.allocate(file.size)], {}, piece, 1024).run()
    assert (gpu.host, gpu.live) == ({}, [])


def test_a_device_that_refuses_stops_all_threads(tmp_path: Path) -> None:
    gpu: Any = FakeDriver({}, total=1 << 26)
    gpu.activate()
    file = make_file(tmp_path, "w", 200_000)
    address = gpu.allocate(file.size)
    gpu.fail["upload"] = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(ResourceError, match="upload"):
        WeightStream(gpu, [file], [address], {}, 1000, 2000).run()
    assert (gpu.host, gpu.live) == ({}, [])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ingot-weights")]


def test_headers_and_mapped_files_say_the_same(tmp_path: Path) -> None:
    file = make_file(tmp_path, "w", 5000)
    mapped = map_weights([file.path])
    content = file.path.read_bytes()
    assert set(mapped) == set(file.tensors)
    for name, tensor in file.tensors.items():
        assert content[tensor.start : tensor.start + tensor.nbytes] == mapped[name].data.tobytes()
        assert (tensor.shape, tensor.dtype) == (mapped[name].shape, mapped[name].dtype)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, (9).to_bytes(8, "little") + b"{broken}" * 4])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(VerificationError, match=r"no safetensors file|malformed"):
        read_headers([tmp_path / "w"])


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    paths = [make_file(tmp_path / name, "w", 10).path for name in ("a", "b") if not (tmp_path / name).mkdir()]
    with pytest.raises(VerificationError, match=r"holds 'w\.a' once more"):
        read_headers(paths)
