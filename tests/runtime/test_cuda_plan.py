"""Kernel plans on a fake GPU: what is loaded runs as the oracle says, and whatever lies is refused before it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingot.artifacts.errors import ResourceError, UsageError, VerificationError
from ingot.artifacts.kernel_plan import KernelPlan, ZeroRegion
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.store import OpenArtifact
from ingot.runtime import LLM
from ingot.runtime.core import Core
from ingot.runtime.engines.cuda import OUT_OF_MEMORY
from ingot.runtime.engines.plan import PlanGroup
from ingot.runtime.engines.plan import load as load_plan
from ingot.runtime.loader import load_engines, open_verified
from ingot.runtime.params import SamplingParams
from ingot.runtime.phases import Phases

from .fake_cuda import ELF, FakeDriver, fake_cubin
from .plan_artifact import (
    ARENA,
    BIAS,
    CUBIN,
    KERNELS,
    SIZES,
    WEIGHTS,
    expected_tokens,
    integer,
    plan_manifest,
    pointer,
    safetensors_bytes,
    write_plan_artifact,
)  # fmt: skip
from .test_batching import make_request

GRAPHS = pytest.mark.parametrize("graphs", [True, False])
GREEDY = SamplingParams(temperature=0, max_tokens=9)
SEEDED = SamplingParams(temperature=1.0, top_k=9, seed=5, max_tokens=7)
Change = Callable[[str, KernelPlan], KernelPlan]


def open_group(
    artifact: OpenArtifact, gpu: Any, utilization: float = 0.9, graphs: bool = True, phases: Phases | None = None
) -> PlanGroup:
    """The artifact's engines on this GPU."""
    return PlanGroup(artifact, utilization, graphs, phases, make_driver=lambda: gpu)


@dataclasses.dataclass
class Loaded:
    group: PlanGroup
    gpu: FakeDriver
    manifest: Manifest

    def generate(self, *requests: tuple[list[int], SamplingParams]) -> list[list[int]]:
        core = Core(self.group, self.manifest)
        made = [make_request(prompt, params) for prompt, params in requests]
        core.submit(made)
        while core.step():
            pass
        assert core.blocks.free == core.blocks.total
        return [request.sequences[0].output for request in made]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Loaded]]:
    """Writes an artifact of plans and loads it: `load(change=…, gpu=…, utilization=…, graphs=…)`."""
    groups: list[PlanGroup] = []

    def make(
        gpu: FakeDriver | None = None, utilization: float = 0.9, graphs: bool = True, verify: Any = "full", **keys: Any
    ) -> Loaded:
        folder = write_plan_artifact(tmp_path / f"artifact-{len(groups)}", **keys)
        artifact = open_verified(folder, verify)
        gpu = FakeDriver(KERNELS) if gpu is None else gpu
        groups.append(open_group(artifact, gpu, utilization, graphs))
        return Loaded(groups[-1], gpu, artifact.manifest)

    yield make
    for group in groups:
        group.close()


def assert_nothing_left(gpu: FakeDriver) -> None:
    assert (gpu.memory, gpu.host, gpu.live, gpu.closed) == ({}, {}, [], True)


@GRAPHS
def test_plans_generate_what_the_model_and_the_sampler_say(load: Callable[..., Loaded], graphs: bool) -> None:
    loaded = load(graphs=graphs)
    requests = [([1, 2, 3], GREEDY), ([5] * 9, SEEDED), ([7, 8], GREEDY), ([4], SEEDED), ([9, 9], SEEDED)]
    found = loaded.generate(*requests)
    assert found == [expected_tokens(prompt, params, params.max_tokens) for prompt, params in requests]


def test_graphs_hold_the_same_launches_as_the_plan(load: Callable[..., Loaded]) -> None:
    runs = [load(graphs=graphs) for graphs in (True, False)]
    for loaded in runs:
        loaded.generate(([1, 2, 3], GREEDY))
    assert runs[0].gpu.launched == runs[1].gpu.launched > 0
    assert runs[0].gpu.dependent[:3] == [False, True, True]


def test_a_plan_runs_ahead_and_needs_no_logits(load: Callable[..., Loaded]) -> None:
    loaded = load()
    engine = loaded.group.engines["decode-b1"]
    assert engine.asynchronous
    loaded.gpu.uploads = 0
    loaded.generate(([1, 2, 3], GREEDY))
    assert loaded.gpu.uploads == 2  # of the prefill, and of the first decode step


def test_between_two_steps_nothing_is_enqueued_but_an_event(load: Callable[..., Loaded]) -> None:
    loaded = load()
    loaded.gpu.enqueued.clear()
    loaded.generate(([1, 2, 3], GREEDY))
    step = ["launch_graph", "record"]
    assert loaded.gpu.enqueued == ["upload", "record", *step] * 2 + step * 7


def test_even_and_odd_steps_have_graphs_of_their_own(load: Callable[..., Loaded]) -> None:
    loaded = load()
    loaded.generate(([1, 2, 3], GREEDY))
    prefill, *decode = loaded.gpu.replayed
    assert decode[::2] == [decode[0]] * 4 and decode[1::2] == [decode[1]] * 4
    assert decode[0] is loaded.group.engines["decode-b1"].graph
    assert len({id(graph) for graph in (prefill, *decode)}) == 3


def start(engine: Any, token: int) -> None:
    """Run a decode engine's row 0 on the first token of a sequence; nothing has been done yet when this returns."""
    inputs = engine.inputs
    inputs["positions"][:] = -1
    inputs["tokens"][0], inputs["positions"][0], inputs["top_p"][0] = token, 0, 1
    inputs["block_tables"][0] = np.arange(1, 1 + inputs["block_tables"].shape[1])
    engine.run()


@GRAPHS
@pytest.mark.parametrize("name", ["decode-b1", "decode-b4"])
def test_results_survive_one_more_launch(load: Callable[..., Loaded], graphs: bool, name: str) -> None:
    engine = load(graphs=graphs).group.engines[name]
    wanted = expected_tokens([5], GREEDY, 5)
    start(engine, 5)
    engine.advance()
    tokens, sampled = engine.earlier()
    found, logit = tokens[0], sampled[0]
    assert engine.next_tokens()[0] == wanted[1] and engine.sampled_logits()[0] == engine.logits()[0, wanted[1]]
    assert found == tokens[0] == wanted[0] and logit == sampled[0]
    engine.advance()
    assert tokens[0] == wanted[0]  # until the device comes to the third run
    assert engine.earlier()[0][0] == wanted[1] and engine.next_tokens()[0] == wanted[2]
    assert np.shares_memory(tokens, engine.next_tokens()) and not np.shares_memory(tokens, engine.earlier()[0])
    for _ in range(2):  # two more, of which nothing is read before the second was launched
        engine.advance()
    assert engine.earlier()[0][0] == wanted[3] and engine.next_tokens()[0] == wanted[4]


@GRAPHS
def test_a_run_may_follow_any_number_of_advances(load: Callable[..., Loaded], graphs: bool) -> None:
    engine = load(graphs=graphs).group.engines["decode-b1"]
    for ahead in range(4):
        start(engine, 5 + ahead)
        for _ in range(ahead):
            engine.advance()
        assert engine.next_tokens()[0] == expected_tokens([5 + ahead], GREEDY, 1 + ahead)[-1]
        start(engine, 9)  # with the last run's results unread, as when a step is dropped
        assert engine.next_tokens()[0] == expected_tokens([9], GREEDY, 1)[0]
        assert engine.earlier()[0][0] == expected_tokens([5 + ahead], GREEDY, 1 + ahead)[-1]


def test_without_sampled_logits_an_engine_is_read_step_by_step(load: Callable[..., Loaded]) -> None:
    manifest = plan_manifest(batches=(1,), chunks=(4,))
    engines = tuple(
        dataclasses.replace(e, outputs=tuple(b for b in e.outputs if b.name != "sampled_logits"))
        for e in manifest.engines
    )
    loaded = load(manifest=dataclasses.replace(manifest, engines=engines))
    engine = loaded.group.engines["decode-b1"]
    assert not engine.asynchronous
    assert loaded.generate(([1, 2, 3], GREEDY)) == [expected_tokens([1, 2, 3], GREEDY, 9)]


def test_logprobs_penalties_and_logits(load: Callable[..., Loaded]) -> None:
    loaded = load()
    params = SamplingParams(temperature=0, max_tokens=9, logprobs=3)
    assert loaded.generate(([1, 2, 3], params)) == [expected_tokens([1, 2, 3], GREEDY, 9)]
    penalized = SamplingParams(temperature=0, max_tokens=9, frequency_penalty=0.0001)
    assert len(loaded.generate(([1, 2, 3], penalized))[0]) == 9


def test_inputs_may_be_written_as_soon_as_run_returns(load: Callable[..., Loaded]) -> None:
    engine = load().group.engines["decode-b1"]
    for first in (1, 5):
        start(engine, first)
        engine.inputs["tokens"][0], engine.inputs["block_tables"][0] = 55, 0
    found = [engine.earlier()[0].tolist(), engine.next_tokens().tolist()]
    assert found == [expected_tokens([first], GREEDY, 1) for first in (1, 5)]
    assert engine.sampled_logits()[0] == engine.logits()[0, found[1][0]]


def test_many_runs_before_a_read_reuse_pinned_memory_safely(load: Callable[..., Loaded]) -> None:
    loaded = load(chunks=(4,))
    params = SamplingParams(temperature=0, max_tokens=2)
    prompt = list(range(37))  # ten chunks of prefill, none of them read but the last
    assert loaded.generate((prompt, params)) == [expected_tokens(prompt, params, 2)]


def test_closing_gives_everything_back_and_is_harmless_twice(load: Callable[..., Loaded]) -> None:
    loaded = load()
    engine = loaded.group.engines["decode-b1"]
    engine.inputs["positions"][:] = -1
    engine.run()
    loaded.group.close()
    loaded.group.close()
    assert_nothing_left(loaded.gpu)
    with pytest.raises(UsageError, match="closed"):
        engine.run()


def test_reading_before_the_first_run_is_refused(load: Callable[..., Loaded]) -> None:
    engine = load().group.engines["decode-b1"]
    with pytest.raises(UsageError, match="no results"):
        engine.next_tokens()
    engine.inputs["positions"][:] = -1
    engine.run()
    with pytest.raises(UsageError, match="no results"):
        engine.earlier()


def test_an_engine_with_one_slot_gives_no_earlier_results(load: Callable[..., Loaded]) -> None:
    engine = load().group.engines["prefill-c4"]
    engine.inputs["positions"][:] = -1
    for _ in range(2):
        engine.run()
    assert not engine.asynchronous and engine.next_tokens().shape == (1,)
    with pytest.raises(UsageError, match="cannot run ahead"):
        engine.earlier()


def test_phases_are_told(tmp_path: Path) -> None:
    artifact = open_verified(write_plan_artifact(tmp_path / "a"), "full")
    phases = Phases()
    open_group(artifact, FakeDriver(KERNELS), phases=phases).close()
    assert [phase.name for phase in phases.done] == ["plans, context", "weights", "cache, kernels, graphs"]
    assert phases.done[1].nbytes == (artifact.root / WEIGHTS).stat().st_size


# --- trust -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


def test_weights_are_digested_on_their_way_and_nothing_runs_before(tmp_path: Path) -> None:
    folder = write_plan_artifact(tmp_path / "a")
    flip(folder / WEIGHTS)
    artifact, gpu = open_verified(folder, "full"), FakeDriver(KERNELS)
    assert artifact.unread == {WEIGHTS}
    with pytest.raises(VerificationError, match=r"model\.safetensors are not intact"):
        open_group(artifact, gpu)
    assert gpu.launched == 0 and gpu.dependent == []
    assert_nothing_left(gpu)
    unchecked = open_verified(folder, "sizes")
    assert unchecked.unread == frozenset()
    open_group(unchecked, FakeDriver(KERNELS)).close()


@pytest.mark.parametrize("place", ["engines/decode-b4.plan.json", CUBIN, "generation.json"])
@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_all_else_is_digested_when_opened(tmp_path: Path, place: str, verify: Any) -> None:
    folder = write_plan_artifact(tmp_path / "a")
    content = bytearray((folder / place).read_bytes())
    content[5] ^= 1
    (folder / place).write_bytes(content)
    with pytest.raises(VerificationError, match="wrong digest"):
        LLM(folder, verify=verify)


@pytest.mark.parametrize("place", ["engines/decode-b4.plan.json", CUBIN])
def test_code_is_taken_from_the_bytes_that_were_digested(tmp_path: Path, place: str) -> None:
    artifact, gpu = open_verified(write_plan_artifact(tmp_path / "a"), "full"), FakeDriver(KERNELS)
    content = bytearray((artifact.root / place).read_bytes())
    content[5] ^= 1
    (artifact.root / place).write_bytes(content)
    with pytest.raises(VerificationError, match="is not what was built"):
        open_group(artifact, gpu)
    assert_nothing_left(gpu)


def edit(plan: KernelPlan, launch: int, change: Callable[[list[Any]], list[Any]]) -> KernelPlan:
    launches = list(plan.launches)
    launches[launch] = dataclasses.replace(launches[launch], arguments=tuple(change(list(launches[launch].arguments))))
    return dataclasses.replace(plan, launches=tuple(launches))


def put(launch: int, position: int, **keys: Any) -> Change:
    """Changes one argument of decode-b4."""

    def change(name: str, plan: KernelPlan) -> KernelPlan:
        def one(given: list[Any]) -> list[Any]:
            given[position] = dataclasses.replace(given[position], **keys)
            return given

        return edit(plan, launch, one) if name == "decode-b4" else plan

    return change


# Arguments of "scatter": four numbers, tokens, positions, block_tables, k_cache_0, counter; of "model": see there.
LIES: dict[str, tuple[Change, list[str]]] = {
    "beyond an input": (put(0, 4, nbytes=33), ["decode-b4", "launch 0", "argument 4", "33", "tokens", "32"]),
    "offset beyond an input": (put(0, 5, offset=8), ["argument 5", "positions"]),
    "an unknown input": (put(0, 4, name="secrets"), ["no input 'secrets'"]),
    "beyond the cache": (put(0, 7, offset=1 << 40), ["argument 7", "k_cache_0"]),
    "not from the cache's start": (put(0, 7, offset=16, nbytes=16), ["argument 7", "not at its start"]),
    "an unknown cache": (put(0, 7, name="k_cache_9"), ["no cache 'k_cache_9'"]),
    "an input as a cache": (put(0, 7, name="tokens"), ["no cache 'tokens'"]),
    "a cache as an input": (put(0, 4, name="k_cache_0"), ["no input 'k_cache_0'"]),
    "beyond a weight": (put(1, 13, offset=4), ["launch 1", "bias", "248", "244"]),
    "a weight of the file that is not named": (put(1, 13, name="pad"), ["no weight 'pad'"]),
    "an unknown weight": (put(1, 13, name="nothing"), ["no weight 'nothing'"]),
    "beyond an output": (put(1, 17, nbytes=64), ["sampled_logits", "64", "16"]),
    "an unknown output": (put(1, 17, name="loss"), ["no output 'loss'"]),
    "no int32": (put(0, 0, integer=1 << 31), ["2147483648 is no int32"]),
    "beyond the arena": (put(1, 14, offset=ARENA), ["outside of the arena"]),
    "astride what must stay zero": (put(1, 14, offset=250), ["must stay zero", "decode-b4", "launch 1"]),
    "a parameter too few": (
        lambda name, plan: edit(plan, 0, lambda given: given[:-1]),
        ["launch 0 of engine", "does not fit its kernel scatter"],
    ),
    "a parameter too many": (
        lambda name, plan: edit(plan, 2, lambda given: [*given, integer(1)]) if "decode" in name else plan,
        ["launch 2", "does not fit its kernel advance"],
    ),
    "a parameter of another size": (
        lambda name, plan: edit(plan, 0, lambda given: [*given[:3], given[4], *given[4:]]),
        ["does not fit its kernel scatter", "4, 4, 4, 8, 8"],
    ),
    "another architecture": (lambda name, plan: dataclasses.replace(plan, arch="sm_80"), ["sm_80", "sm_90"]),
    "a cubin that is not listed": (
        lambda name, plan: dataclasses.replace(
            plan, kernels=tuple(dataclasses.replace(k, file="generation.json") for k in plan.kernels)
        ),
        ["takes kernels from elsewhere", "generation.json"],
    ),
    "a kernel that is not there": (
        lambda name, plan: dataclasses.replace(
            plan, kernels=tuple(dataclasses.replace(k, symbol="launder") for k in plan.kernels)
        ),
        ["kernel launder of engine", "named symbol not found"],
    ),
    "another engine's zeroes": (
        lambda name, plan: (
            dataclasses.replace(plan, zeroed=(ZeroRegion(0, 256), ZeroRegion(544, 8))) if name == "decode-b1" else plan
        ),
        ["must stay zero"],
    ),
    "weights that nothing uses": (
        lambda name, plan: edit(plan, 1, lambda given: [*given[:13], pointer("null", "", 0), *given[14:]]),
        ["disagree about its weights", "bias"],
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_plan_that_lies_is_refused_before_anything_is_launched(tmp_path: Path, lie: str) -> None:
    change, words = LIES[lie]
    artifact = open_verified(write_plan_artifact(tmp_path / "a", change), "full")
    gpu = FakeDriver(KERNELS)
    with pytest.raises(VerificationError) as caught:
        open_group(artifact, gpu)
    for word in words:
        assert word in f"{caught.value.what} {caught.value.why}"
    assert caught.value.fix
    assert gpu.launched == 0
    assert_nothing_left(gpu)


def test_zeroed_regions_of_one_engine_may_be_larger_than_anothers(load: Callable[..., Loaded]) -> None:
    def change(name: str, plan: KernelPlan) -> KernelPlan:
        return dataclasses.replace(plan, zeroed=(ZeroRegion(0, 512),)) if name == "decode-b1" else plan

    assert load(change=change).generate(([1, 2], GREEDY)) == [expected_tokens([1, 2], GREEDY, 9)]


@pytest.mark.parametrize(
    ("cubin", "words"),
    [
        (b"// .version 9.0 .target sm_90", "is no cubin"),
        (fake_cubin(SIZES, "sm_100"), "no kernel image is available"),
    ],
)
def test_a_wrong_cubin_is_refused(tmp_path: Path, cubin: bytes, words: str) -> None:
    artifact = open_verified(write_plan_artifact(tmp_path / "a", cubin=cubin), "full")
    gpu = FakeDriver(KERNELS)
    with pytest.raises(VerificationError) as caught:
        open_group(artifact, gpu)
    assert words in f"{caught.value.what} {caught.value.why}"
    assert_nothing_left(gpu)
    assert ELF == b"\x7fELF"


def test_a_weight_that_is_not_aligned_is_refused(tmp_path: Path) -> None:
    weights = safetensors_bytes({"pad": np.arange(3, dtype=np.float32), "bias": BIAS}, alignment=4)
    artifact = open_verified(write_plan_artifact(tmp_path / "a", weights=weights), "full")
    with pytest.raises(VerificationError, match="weight bias of engine decode-b1 is not aligned"):
        open_group(artifact, FakeDriver(KERNELS))


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_cache_takes_what_is_left_up_to_what_can_be_used(load: Callable[..., Loaded]) -> None:
    block = 2 * 4 * 8 * 4  # keys and values, 4 tokens, 8 numbers, float32
    loaded = load()
    assert loaded.group.num_blocks == 4 * 16 + 1  # four rows of sixteen blocks, and the null block
    taken = sum(map(len, loaded.gpu.memory.values())) - 65 * block
    gpu = FakeDriver(KERNELS, total=200_000, used=40_000)
    used = load(gpu=gpu, utilization=(40_000 + taken + 30 * block + 10) / 200_000)
    assert used.group.num_blocks in (30, 31)  # sizes are rounded to 256
    assert used.generate(([1, 2, 3], GREEDY)) == [expected_tokens([1, 2, 3], GREEDY, 9)]


def test_too_little_for_one_sequence_is_an_error_with_numbers(load: Callable[..., Loaded]) -> None:
    gpu = FakeDriver(KERNELS, total=200_000)
    with pytest.raises(ResourceError, match="no room for the KV cache of one sequence of 64 tokens") as caught:
        load(gpu=gpu, utilization=0.05)
    assert "gpu_memory_utilization=0.05" in caught.value.why
    assert "gpu_memory_utilization" in caught.value.fix
    assert_nothing_left(gpu)


def test_a_gpu_that_others_use_is_an_error_with_numbers(load: Callable[..., Loaded]) -> None:
    gpu = FakeDriver(KERNELS, total=10_000_000, used=9_990_000)
    with pytest.raises(ResourceError, match=r"too little free memory: 0\.\d\d MB are needed, 0\.01 MB of 10") as caught:
        load(gpu=gpu)
    assert "nvidia-smi" in caught.value.fix
    assert gpu.uploads == 0
    assert_nothing_left(gpu)


@pytest.mark.parametrize(
    ("method", "code", "kind", "words"),
    [
        ("end_capture", OUT_OF_MEMORY, ResourceError, "cannot be made a CUDA graph"),
        ("launch", OUT_OF_MEMORY, ResourceError, "launch 0 of engine"),
        ("launch", "CUDA_ERROR_INVALID_VALUE", VerificationError, "launch 0 of engine"),
        ("end_capture", "CUDA_ERROR_INVALID_VALUE", VerificationError, "cannot be made a CUDA graph"),
        ("load_module", OUT_OF_MEMORY, ResourceError, "load_module"),
        ("pinned", OUT_OF_MEMORY, ResourceError, "pinned"),
        ("upload", "CUDA_ERROR_ILLEGAL_ADDRESS", ResourceError, "upload"),
    ],
)
def test_a_device_that_refuses_is_an_error_and_everything_comes_back(
    load: Callable[..., Loaded], method: str, code: str, kind: type[Exception], words: str
) -> None:
    gpu = FakeDriver(KERNELS)
    gpu.fail[method] = code
    with pytest.raises(kind, match=words):
        load(gpu=gpu)
    assert gpu.launched == 0
    assert_nothing_left(gpu)


def test_a_fault_in_the_middle_is_raised_and_closing_stays_possible(load: Callable[..., Loaded]) -> None:
    loaded = load()
    loaded.gpu.fail = {"launch_graph": "CUDA_ERROR_ILLEGAL_ADDRESS"}
    with pytest.raises(ResourceError, match="the GPU cannot launch_graph"):
        loaded.generate(([1, 2, 3], GREEDY))
    loaded.gpu.fail |= dict.fromkeys(("free", "synchronize", "destroy", "free_pinned"), "CUDA_ERROR_ILLEGAL_ADDRESS")
    loaded.group.close()


def test_a_driver_that_does_not_start_is_told(tmp_path: Path) -> None:
    def none() -> Any:
        raise ResourceError("the GPU cannot start", "CUDA_ERROR_NO_DEVICE")

    artifact = open_verified(write_plan_artifact(tmp_path / "a"), "full")
    with pytest.raises(ResourceError, match="cannot start"):
        PlanGroup(artifact, make_driver=none)


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
def test_a_wrong_share_of_memory_is_refused(tmp_path: Path, share: float) -> None:
    artifact = open_verified(write_plan_artifact(tmp_path / "a"), "full")
    with pytest.raises(UsageError, match="gpu_memory_utilization"):
        load_plan(artifact, share)


def test_the_loader_takes_plans_for_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingot.runtime.loader.require_target", lambda *_: None)
    manifest = plan_manifest()
    here = dataclasses.replace(manifest.target, device="cpu")
    artifact = open_verified(
        write_plan_artifact(tmp_path / "a", manifest=dataclasses.replace(manifest, target=here)), "full"
    )
    with pytest.raises(VerificationError, match="engines of kind plan"):
        load_engines(artifact)
