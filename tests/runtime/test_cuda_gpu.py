"""Kernel plans on a real GPU: graph and plain launches agree, memory comes back, and what does not fit is refused.

The "model" is a chain of tokens, t -> (7 t + 3) mod vocabulary, in Triton kernels compiled on the spot: whatever the
runtime gets wrong with inputs, order of steps, weights or graphs breaks the chain. A step of decode-b1 is one launch,
which moves on to the next token itself; in decode-b4 another launch does that, which reads the tokens back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingot.artifacts.cuda_probe import probe_cuda
from ingot.artifacts.errors import ResourceError, VerificationError
from ingot.artifacts.kernel_plan import PLAN_VERSION, KernelPlan, PlanKernel, PlanLaunch, ZeroRegion
from ingot.artifacts.manifest import EngineEntry, Manifest
from ingot.artifacts.store import OpenArtifact
from ingot.runtime.core import Core
from ingot.runtime.engines.cuda import OUT_OF_MEMORY, CudaError, Driver
from ingot.runtime.engines.cuda_weights import WeightStream
from ingot.runtime.engines.plan import PlanGroup
from ingot.runtime.engines.plan_layout import buffer_bytes
from ingot.runtime.loader import load_engines, open_verified
from ingot.runtime.params import SamplingParams
from ingot.runtime.weights import read_headers

from .fake_engine import VOCAB
from .plan_artifact import ARENA, BIAS, plan_manifest, pointer, safetensors_bytes, write_plan_artifact
from .test_batching import make_request

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HOST = probe_cuda()
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(HOST.problem) or not HOST.devices or not HOST.bindings, reason="needs a CUDA GPU"),
]
MAJOR, MINOR = HOST.compute if HOST.devices else (9, 0)
ARCH = f"sm_{MAJOR}{MINOR}"
PARAMS = SamplingParams(temperature=0, max_tokens=30)


@triton.jit
def step_kernel(
    tokens, positions, last_index, bias, counter, logits, next_tokens, sampled_logits,
    LENGTH: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    """One program per row: logits = bias, raised at the chain's next token; -1 where what must be zero is not."""
    gdc_launch_dependents()
    gdc_wait()
    row = tl.program_id(0)
    column = 0
    if LENGTH > 1:
        column = tl.load(last_index)
    token = tl.load(tokens + row * LENGTH + column)
    position = tl.load(positions + row * LENGTH + column)
    live = position >= 0
    following = tl.where(tl.load(counter) == 0, (token * 7 + 3) % VOCAB, -1)
    v = tl.arange(0, BLOCK)
    values = tl.load(bias + v, mask=v < VOCAB) + tl.where(v == following, 100.0, 0.0)
    tl.store(logits + row * VOCAB + v, values, mask=(v < VOCAB) & live)
    tl.store(next_tokens + row, following, mask=live)
    tl.store(sampled_logits + row, tl.load(bias + tl.maximum(following, 0)) + 100.0, mask=live)
    if ADVANCE:
        tl.store(tokens + row, following, mask=live)
        tl.store(positions + row, position + 1, mask=live)


@triton.jit
def advance_kernel(next_tokens, tokens, positions, BATCH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: tokens = next_tokens and positions + 1 in rows that have a position."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, BLOCK)
    position = tl.load(positions + row, mask=row < BATCH, other=-1)
    tl.store(tokens + row, tl.load(next_tokens + row, mask=position >= 0, other=0), mask=position >= 0)
    tl.store(positions + row, position + 1, mask=position >= 0)


@dataclasses.dataclass(frozen=True)
class Compiled:
    symbol: str
    cubin: bytes
    threads: int
    shared_bytes: int
    carveout: int = -1


@functools.cache
def compiled(function: Any, signature: tuple[str, ...], constants: tuple[int | bool, ...], arch: int) -> Compiled:
    names = function.arg_names
    types = dict(zip(names, (*signature, *("constexpr",) * len(constants)), strict=True))
    values = {(i,): c for i, c in enumerate(constants, len(signature))}
    source = ASTSource(fn=function, signature=types, constexprs=values, attrs={})
    options = {"num_warps": 4, "launch_pdl": True}
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata = found.metadata
    return Compiled(metadata.name, found.asm["cubin"], 32 * metadata.num_warps, metadata.shared)


def step(length: int, advance: bool = False) -> Compiled:
    types = ("*i64", "*i64", "*i64", "*fp32", "*i32", "*fp32", "*i64", "*fp32")
    return compiled(step_kernel, types, (length, VOCAB, 64, advance), 10 * MAJOR + MINOR)


def foreign() -> Compiled:
    """A kernel for another major version."""
    return compiled(advance_kernel, ("*i64",) * 3, (1, 1, False), 80 if MAJOR != 8 else 90)


def advance(batch: int) -> Compiled:
    return compiled(advance_kernel, ("*i64",) * 3, (batch, triton.next_power_of_2(batch), True), 10 * MAJOR + MINOR)


def kernels_of(entry: EngineEntry) -> dict[str, Compiled]:
    if entry.phase == "decode" and entry.batch == 1:
        return {"step-advance": step(1, advance=True)}
    found = {f"step-{entry.length}": step(entry.length)}
    return found | ({f"advance-{entry.batch}": advance(entry.batch)} if entry.phase == "decode" else {})


def chain_plan(entry: EngineEntry, shared_bytes: int = 0) -> KernelPlan:
    of = {b.name: pointer("input", b.name, buffer_bytes(b)) for b in entry.inputs}
    of |= {b.name: pointer("output", b.name, buffer_bytes(b)) for b in entry.outputs}
    nothing = pointer("null", "", 0)
    results = [of["logits"], of["next_tokens"], of["sampled_logits"]]
    given = [of["tokens"], of["positions"], of.get("last_index", nothing), pointer("weight", "bias", 4 * VOCAB)]
    arguments = [[*given, pointer("arena", "", 4), *results], [of["next_tokens"], of["tokens"], of["positions"]]]
    kernels = tuple(
        PlanKernel(
            name, f"engines/kernels/{name}.cubin", k.symbol, k.threads, k.shared_bytes + shared_bytes, k.carveout
        )
        for name, k in kernels_of(entry).items()
    )
    launches = tuple(
        # Behind its own parameters a Triton kernel takes two more pointers.
        PlanLaunch(i, (entry.batch if i == 0 else 1, 1, 1), (*arguments[i], nothing, nothing), i > 0, "", 0)
        for i in range(len(kernels))
    )
    return KernelPlan(PLAN_VERSION, ARCH, ARENA, (ZeroRegion(0, 256),), kernels, launches)


def chain_manifest() -> Manifest:
    manifest = plan_manifest(batches=(1, 4), chunks=(4, 8))
    engines = tuple(
        dataclasses.replace(e, libraries=tuple(f"engines/kernels/{name}.cubin" for name in kernels_of(e)))
        for e in manifest.engines
    )
    return dataclasses.replace(manifest, engines=engines, target=dataclasses.replace(manifest.target, isa=(ARCH,)))


def write(folder: Path, shared_bytes: int = 0, cubins: dict[str, bytes] | None = None) -> OpenArtifact:
    """The chain as an artifact, opened; `cubins` in the place of some of its own."""
    manifest = chain_manifest()
    entries = {entry.name: entry for entry in manifest.engines}
    files = {name: k.cubin for e in manifest.engines for name, k in kernels_of(e).items()} | (cubins or {})
    write_plan_artifact(
        folder, lambda name, _: chain_plan(entries[name], shared_bytes), manifest, b"unused",
        files={f"engines/kernels/{name}.cubin": content for name, content in files.items()},
    )  # fmt: skip
    return open_verified(folder, "full")


def chain(prompt: list[int], count: int) -> list[int]:
    token, found = prompt[-1], []
    for _ in range(count):
        found.append(token := (7 * token + 3) % VOCAB)
    return found


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


class TestOnTheGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("graphs", [True, False])
    @pytest.mark.parametrize("shared_bytes", [0, 100 << 10])
    def test_the_chain_of_tokens_holds(self, tmp_path: Path, graphs: bool, shared_bytes: int) -> None:
        artifact = write(tmp_path / "a", shared_bytes)
        group = PlanGroup(artifact, 0.9, graphs)
        try:
            core = Core(group, artifact.manifest)
            prompts = [[1, 2, 3], [5], [7] * 9, [11, 4], [8, 8], [60]]
            requests = [make_request(prompt, PARAMS) for prompt in prompts]
            core.submit(requests)
            while core.step():
                pass
            for request, prompt in zip(requests, prompts, strict=True):
                assert request.sequences[0].output == chain(prompt, len(request.sequences[0].output))
            assert group.engines["decode-b4"].asynchronous
        finally:
            group.close()

    @pytest.mark.parametrize("graphs", [True, False])
    @pytest.mark.parametrize("name", ["decode-b1", "decode-b4"])
    def test_each_step_is_read_while_the_next_one_runs(self, tmp_path: Path, graphs: bool, name: str) -> None:
        group = PlanGroup(write(tmp_path / "a"), 0.9, graphs)
        engine = group.engines[name]
        first = list(range(1, 1 + engine.entry.batch))
        engine.inputs["tokens"][:, 0], engine.inputs["positions"][:] = first, 0
        engine.run()
        found = []
        for _ in range(499):
            engine.advance()
            tokens, sampled = engine.earlier()
            np.testing.assert_array_equal(sampled, BIAS[tokens] + np.float32(100))
            found.append(tokens.tolist())
        found.append(engine.next_tokens().tolist())
        assert np.transpose(found).tolist() == [chain([token], 500) for token in first]
        group.close()

    def test_logits_and_results_of_the_last_two_runs(self, tmp_path: Path) -> None:
        group = load_engines(write(tmp_path / "a"))
        engine: Any = group.engines["decode-b4"]
        engine.inputs["tokens"][:, 0], engine.inputs["positions"][:, 0] = [1, 2, 3, 4], [5, 6, 7, -1]
        engine.run()
        engine.inputs["tokens"][:] = 59  # is for the next run
        engine.advance()
        first, _ = engine.earlier()
        assert first[:3].tolist() == [chain([t], 1)[0] for t in (1, 2, 3)]
        assert engine.next_tokens()[:3].tolist() == [chain([t], 2)[1] for t in (1, 2, 3)]
        logits, expected = engine.logits()[:3], np.tile(BIAS, (3, 1))
        expected[np.arange(3), engine.next_tokens()[:3]] += 100
        np.testing.assert_allclose(logits, expected)
        np.testing.assert_array_equal(engine.sampled_logits()[:3], logits.max(1))
        group.close()

    def test_a_cubin_for_another_gpu_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(VerificationError, match=r"cannot be loaded from engines/kernels/step-1\.cubin") as caught:
            load_engines(write(tmp_path / "a", cubins={"step-1": foreign().cubin}))
        assert "build the artifact again for this GPU" in caught.value.fix

    def test_too_little_memory_is_an_error_and_nothing_stays_taken(self, tmp_path: Path, driver: Driver) -> None:
        free = driver.memory_info()[0]
        with pytest.raises(ResourceError, match="no room for the KV cache"):
            load_engines(write(tmp_path / "a"), 0.001)
        with pytest.raises(CudaError) as caught:
            driver.allocate(1 << 45)
        assert caught.value.code == OUT_OF_MEMORY
        load_engines(write(tmp_path / "b")).close()
        assert driver.memory_info()[0] >= free - (64 << 20)

    @pytest.mark.parametrize("size", [1000, 70 << 20])
    def test_weights_arrive_as_they_are(self, tmp_path: Path, driver: Driver, size: int) -> None:
        data = np.random.default_rng(0).integers(0, 1 << 31, size // 4, dtype=np.uint32).view(np.float32)
        (tmp_path / "w").write_bytes(safetensors_bytes({"w": data}))
        [file] = read_headers([tmp_path / "w"])
        address, stream = driver.allocate(file.size), driver.stream()
        WeightStream(driver, [file], [address], {}).run()
        found = np.zeros(file.size, np.uint8)
        driver.download(found.ctypes.data, address, file.size, stream)
        driver.synchronize(stream)
        assert found.tobytes() == file.path.read_bytes()
        with pytest.raises(VerificationError, match="not intact"):
            WeightStream(driver, [file], [address], {0: "0" * 64}).run()
        driver.destroy_stream(stream)
        driver.free(address)

    def test_events_time_the_device(self, driver: Driver) -> None:
        stream, address = driver.stream(), driver.allocate(1 << 28)
        start, end = driver.event(timing=True), driver.event(timing=True)
        driver.record(start, stream)
        driver.zero(address, 1 << 28, stream)
        driver.record(end, stream)
        driver.wait(end)
        assert 0.01 < driver.elapsed_ms(start, end) < 100
        for event in (start, end):
            driver.destroy_event(event)
        driver.destroy_stream(stream)
        driver.free(address)


def test_the_kernels_of_these_tests_compile_here() -> None:
    manifest = chain_manifest()
    for entry in manifest.engines:
        for kernel in kernels_of(entry).values():
            assert kernel.cubin.startswith(b"\x7fELF") and kernel.threads == 128
        assert chain_plan(entry).files() == entry.libraries
    assert foreign().cubin.startswith(b"\x7fELF")
