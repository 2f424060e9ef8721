"""Artifacts whose engines are kernel plans for the fake GPU: the fake engines' model, in three kernels.

"scatter" writes tokens into the paged cache, "model" makes logits of what the block table shows and samples, "advance"
moves a decode step on. Logits take a bias from a weight, so that wrong weights give other tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ingot.artifacts.kernel_plan import PLAN_VERSION, KernelPlan, PlanArgument, PlanKernel, PlanLaunch, ZeroRegion
from ingot.artifacts.manifest import Buffer, Constant, EngineEntry, Manifest
from ingot.artifacts.store import ArtifactWriter
from ingot.runtime.engines.buffers import expected_buffers
from ingot.runtime.engines.plan_layout import buffer_bytes, engine_memory_bytes
from ingot.runtime.params import SamplingParams
from ingot.runtime.sampling import graph_parameters, sample_row, wrap_seed

from .fake_cuda import FakeDriver, fake_cubin
from .fake_engine import VOCAB, fake_logits, fake_manifest

ARENA, ZEROED = 4096, 256
BIAS = np.random.default_rng(3).normal(0, 3, VOCAB).astype(np.float32)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seeds")
CUBIN = "engines/kernels/fake.cubin"
WEIGHTS = "weights/model.safetensors"


def expected_tokens(prompt: Sequence[int], params: SamplingParams, count: int) -> list[int]:
    """What a request gives, from the model and the sampler only."""
    tokens = list(prompt)
    for _ in range(count):
        logits = fake_logits(tokens) + BIAS
        parameters = graph_parameters(params, VOCAB)
        tokens.append(sample_row(logits, *parameters, wrap_seed(params.seed or 0), len(tokens) - 1))
    return tokens[len(prompt) :]


def plan_manifest(**shape: object) -> Manifest:
    """The fake manifest with plans in place of its engines: batches, chunks, block_size, num_blocks, max_length."""
    manifest = fake_manifest(**shape)  # type: ignore[arg-type]
    engines = []
    for entry in manifest.engines:
        sampled = (Buffer("sampled_logits", (entry.batch,), "float32"),)
        inputs, outputs = expected_buffers(dataclasses.replace(entry, outputs=sampled), manifest)
        entry = EngineEntry(
            entry.name, "plan", entry.phase, entry.batch, entry.length, f"engines/{entry.name}.plan.json",
            tuple(sorted(inputs, key=lambda b: b.name)), tuple(sorted(outputs, key=lambda b: b.name)),
            (Constant("bias", "bias"),), (CUBIN,), 0,
        )  # fmt: skip
        engines.append(dataclasses.replace(entry, memory_bytes=engine_memory_bytes(entry.inputs, entry.outputs, ARENA)))
    target = dataclasses.replace(manifest.target, device="cuda", isa=("sm_90",))
    return dataclasses.replace(manifest, engines=tuple(engines), weights=(WEIGHTS,), target=target)


def pointer(space: str, name: str, nbytes: int, offset: int = 0) -> PlanArgument:
    return PlanArgument(space, name, offset, nbytes, "", 0, 0.0)


def integer(value: int) -> PlanArgument:
    return PlanArgument("scalar", "", 0, 0, "int32", value, 0.0)


def arguments(entry: EngineEntry, manifest: Manifest) -> dict[str, list[PlanArgument]]:
    """Each kernel's arguments."""
    spaces = [("cache" if "_cache_" in b.name else "input", b) for b in entry.inputs]
    spaces += [("output", b) for b in entry.outputs]
    of = {b.name: pointer(space, b.name, buffer_bytes(b)) for space, b in spaces}
    shape = [
        integer(n) for n in (entry.batch, entry.length, manifest.kv_cache.block_size, manifest.kv_cache.max_blocks)
    ]
    last = of.get("last_index", pointer("null", "", 0))
    scratch = pointer("arena", "", 64, 512)
    counter = pointer("arena", "", 4, 0)
    seen = [of[name] for name in ("tokens", "positions", "block_tables", "k_cache_0")]
    # An engine without that output writes the logits it picked where nobody looks.
    picked = of.get("sampled_logits", pointer("arena", "", 4 * entry.batch, 1024))
    results = [of["logits"], of["next_tokens"], picked]
    model = [
        *shape,
        *seen[1:],
        last,
        *[of[n] for n in SAMPLING],
        pointer("weight", "bias", 4 * VOCAB),
        scratch,
        *results,
    ]
    calls = {"scatter": [*shape, *seen, counter], "model": model}
    if entry.phase == "decode":
        calls["advance"] = [shape[0], of["next_tokens"], of["tokens"], of["positions"]]
    return calls


SIZES = {
    "scatter": [4] * 4 + [8] * 5,
    "model": [4] * 4 + [8] * (3 + 1 + 5 + 1 + 1 + 3),
    "advance": [4] + [8] * 3,
}


def make_plan(entry: EngineEntry, manifest: Manifest) -> KernelPlan:
    calls = arguments(entry, manifest)
    kernels = tuple(PlanKernel(name, CUBIN, name, 128, 0, -1) for name in calls)
    launches = tuple(
        PlanLaunch(index, (1, 1, 1), tuple(given), index > 0, name, 0)
        for index, (name, given) in enumerate(calls.items())
    )
    return KernelPlan(PLAN_VERSION, "sm_90", ARENA, (ZeroRegion(0, ZEROED),), kernels, launches)


def scatter(
    gpu: FakeDriver, batch: int, length: int, size: int, width: int, tokens: int, positions: int, tables: int,
    cache: int, counter: int,
) -> None:  # fmt: skip
    ids = gpu.view(tokens, 8 * batch * length, "int64").reshape(batch, length)
    places = gpu.view(positions, 8 * batch * length, "int64").reshape(batch, length)
    table = gpu.view(tables, 4 * batch * width, "int32").reshape(batch, width)
    assert gpu.view(counter, 4, "int32")[0] == 0, "a zeroed region holds something"
    for row, column in zip(*np.nonzero(places >= 0), strict=True):
        slot = int(table[row, places[row, column] // size]) * size + int(places[row, column]) % size
        assert slot >= size, "a token may not be written to the null block"
        gpu.view(cache + slot * 32, 4, "float32")[0] = ids[row, column]


def model(
    gpu: FakeDriver, batch: int, length: int, size: int, width: int, positions: int, tables: int, cache: int,
    last_index: int | None, temperature: int, top_k: int, top_p: int, min_p: int, seeds: int, bias: int, scratch: int,
    logits: int, next_tokens: int, sampled_logits: int,
) -> None:  # fmt: skip
    gpu.view(scratch, 64)[:] = 0xCC
    places = gpu.view(positions, 8 * batch * length, "int64").reshape(batch, length)
    table = gpu.view(tables, 4 * batch * width, "int32").reshape(batch, width)
    found = gpu.view(logits, 4 * batch * VOCAB, "float32").reshape(batch, VOCAB)
    chosen, picked = gpu.view(next_tokens, 8 * batch, "int64"), gpu.view(sampled_logits, 4 * batch, "float32")
    column = 0 if last_index is None else int(gpu.view(last_index, 8, "int64")[0])
    given = zip(
        gpu.view(temperature, 4 * batch, "float32").tolist(), gpu.view(top_k, 4 * batch, "int32").tolist(),
        gpu.view(top_p, 4 * batch, "float32").tolist(), gpu.view(min_p, 4 * batch, "float32").tolist(),
        gpu.view(seeds, 8 * batch, "int64").tolist(), strict=True,
    )  # fmt: skip
    for row, parameters in enumerate(given):
        place = int(places[row, column])
        if place < 0:
            continue
        slots = [int(table[row, i // size]) * size + i % size for i in range(place + 1)]
        tokens = [int(gpu.view(cache + slot * 32, 4, "float32")[0]) for slot in slots]
        found[row] = fake_logits(tokens) + gpu.view(bias, 4 * VOCAB, "float32")
        chosen[row] = sample_row(found[row], *parameters, place)
        picked[row] = found[row, chosen[row]]


def advance(gpu: FakeDriver, batch: int, next_tokens: int, tokens: int, positions: int) -> None:
    places = gpu.view(positions, 8 * batch, "int64")
    live = places >= 0
    gpu.view(tokens, 8 * batch, "int64")[live] = gpu.view(next_tokens, 8 * batch, "int64")[live]
    places[live] += 1


KERNELS: dict[str, Callable[..., None]] = {"scatter": scatter, "model": model, "advance": advance}


def safetensors_bytes(tensors: dict[str, np.ndarray], alignment: int = 256) -> bytes:
    """A weights file of float32 tensors, each at a multiple of `alignment` from its beginning."""
    places, offset = {}, 0
    for name, array in tensors.items():
        places[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += -(-array.nbytes // alignment) * alignment
    header = json.dumps(places).encode()
    header += b" " * (-(8 + len(header)) % alignment)
    data = bytearray(offset)
    for name, array in tensors.items():
        start, end = places[name]["data_offsets"]
        data[start:end] = array.tobytes()
    return len(header).to_bytes(8, "little") + header + bytes(data)


def write_plan_artifact(
    folder: Path,
    change: Callable[[str, KernelPlan], KernelPlan] | None = None,
    manifest: Manifest | None = None,
    cubin: bytes | None = None,
    weights: bytes | None = None,
    files: dict[str, bytes] | None = None,
    **shape: object,
) -> Path:
    """An artifact of plans; `change` may rewrite each engine's plan by its name, `files` are written besides."""
    manifest = plan_manifest(**shape) if manifest is None else manifest
    with ArtifactWriter(folder) as writer:
        (writer.root / "engines/kernels").mkdir(parents=True)
        (writer.root / "weights").mkdir()
        for entry in manifest.engines:
            plan = make_plan(entry, manifest)
            plan = plan if change is None else change(entry.name, plan)
            (writer.root / entry.file).write_text(plan.to_json())
        (writer.root / CUBIN).write_bytes(fake_cubin(SIZES) if cubin is None else cubin)
        for path, content in (files or {}).items():
            (writer.root / path).write_bytes(content)
        tensors = {"pad": np.arange(100, dtype=np.float32), "bias": BIAS}
        (writer.root / WEIGHTS).write_bytes(safetensors_bytes(tensors) if weights is None else weights)
        (writer.root / "generation.json").write_text('{"bos_token_id": 0, "eos_token_ids": [], "defaults": {}}')
        writer.commit(manifest)
    return folder
