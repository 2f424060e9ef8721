"""Asynchronous engines get their next step before the last one's tokens are read; no token shows it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.runtime.core import Core
from ingot.runtime.params import SamplingParams

from .fake_engine import VOCAB, FakeEngineGroup, expected_tokens, fake_logits, fake_manifest
from .test_batching import MAX_LENGTH, alone, arrivals, make_request

GREEDY = SamplingParams(temperature=0, max_tokens=11)


def make_core(**shape: object) -> tuple[Core, FakeEngineGroup]:
    manifest = fake_manifest(max_length=MAX_LENGTH, **shape)  # type: ignore[arg-type]
    group = FakeEngineGroup(manifest, asynchronous=True)
    return Core(group, manifest), group


def finish(core: Core) -> None:
    while core.step():
        pass


@settings(max_examples=60, deadline=None)
@given(
    arrivals, st.sampled_from([11, 14, 40]), st.sampled_from([(1,), (1, 4), (2, 8)]), st.sampled_from([(4,), (3, 8)]),
    st.data(),
)  # fmt: skip
def test_joins_ends_and_aborts_leave_every_request_the_tokens_it_gives_alone(
    arrivals: list[tuple[list[int], SamplingParams, int]],
    num_blocks: int,
    batches: tuple[int, ...],
    chunks: tuple[int, ...],
    data: st.DataObject,
) -> None:
    core, _ = make_core(num_blocks=num_blocks, batches=batches, chunks=chunks)
    requests = [make_request(prompt, params) for prompt, params, _ in arrivals]
    step, dropped = 0, set()
    while step <= 12 or core.unfinished:
        core.submit([r for r, (_, _, at) in zip(requests, arrivals, strict=True) if at == step])
        core.step()
        step += 1
        index = data.draw(st.integers(0, 20 * len(requests)))
        if index < len(requests) and arrivals[index][2] < step and not requests[index].finished:
            dropped.add(index)
            core.abort([requests[index]])
    assert core.blocks.free == core.blocks.total
    for index, (request, (prompt, params, _)) in enumerate(zip(requests, arrivals, strict=True)):
        whole = alone(prompt, params)
        made = request.sequences[0].output
        assert made == (whole[: len(made)] if index in dropped else whole)


def test_a_request_that_ends_by_length_takes_no_step_more() -> None:
    core, group = make_core()
    request = make_request([1, 2, 3], GREEDY)
    core.submit([request])
    finish(core)
    assert request.sequences[0].output == expected_tokens([1, 2, 3], GREEDY, 11)
    assert group.engines["decode-b1"].calls == {"run": 1, "advance": 9}
    assert group.reads_ahead == 9  # of ten decode steps only the last was known to be the last


@pytest.mark.parametrize("place", range(1, 10))
def test_a_stop_token_ends_the_request_where_it_stands(place: int) -> None:
    whole = expected_tokens([1, 2, 3], GREEDY, 11)
    stop = SamplingParams(temperature=0, max_tokens=11, stop_token_ids=[whole[place]])
    core, _ = make_core()
    first, other = make_request([1, 2, 3], stop), make_request([5, 6], GREEDY)
    core.submit([first, other])
    finish(core)
    ends = whole.index(whole[place])
    assert first.sequences[0].output == whole[: ends + 1]
    assert first.sequences[0].finish_reason == "stop"
    assert other.sequences[0].output == expected_tokens([5, 6], GREEDY, 11)
    assert core.blocks.free == core.blocks.total


def test_the_step_behind_a_stop_token_is_the_only_one_wasted() -> None:
    whole = expected_tokens([1, 2, 3], GREEDY, 11)
    place = next(i for i in range(3, 11) if whole[i] not in whole[:i])
    core, group = make_core()
    core.submit([make_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=11, stop_token_ids=[whole[place]]))])
    finish(core)
    steps = group.engines["decode-b1"].calls
    assert steps["run"] + steps["advance"] == place + 1


@pytest.mark.parametrize(
    "keys", [{"logprobs": 2}, {"repetition_penalty": 1.2}, {"min_tokens": 8, "stop_token_ids": [3]}]
)
def test_what_needs_logits_on_the_host_is_not_run_ahead(keys: dict[str, object]) -> None:
    core, group = make_core()
    core.submit([make_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=8, **keys))])  # type: ignore[arg-type]
    finish(core)
    assert group.reads_ahead == 0


def test_a_prompt_that_joins_is_prefilled_at_once() -> None:
    core, _ = make_core()
    first, second = make_request([1, 2, 3], GREEDY), make_request([7, 8], GREEDY)
    core.submit([first])
    for _ in range(4):
        core.step()
    core.submit([second])
    core.step()
    assert len(second.sequences[0].output) == 1
    finish(core)
    for request in (first, second):
        assert request.sequences[0].output == expected_tokens(request.prompt_token_ids, GREEDY, 11)


def test_blocks_of_an_aborted_request_serve_the_next_one() -> None:
    core, _ = make_core(num_blocks=11)
    first = make_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=30))
    core.submit([first])
    for _ in range(5):
        core.step()
    core.abort([first])
    second = make_request([9] * 20, GREEDY)
    core.submit([second])
    finish(core)
    assert second.sequences[0].output == expected_tokens([9] * 20, GREEDY, 11)


def test_nan_logits_end_the_request_alone_with_an_error() -> None:
    core, group = make_core()
    bad, good = make_request([9, 9, 9], GREEDY), make_request([1, 2], GREEDY)
    group.model = lambda tokens: (
        fake_logits(tokens) * (float("nan") if list(tokens[:3]) == [9, 9, 9] and len(tokens) > 5 else 1)
    )
    core.submit([bad, good])
    finish(core)
    assert bad.sequences[0].finish_reason == "error"
    assert bad.sequences[0].output == expected_tokens([9, 9, 9], GREEDY, 3)
    assert good.sequences[0].output == expected_tokens([1, 2], GREEDY, 11)
    assert core.blocks.free == core.blocks.total


@pytest.mark.parametrize("fail_at", [2, 3, 5, 8])
def test_a_device_fault_ends_the_requests_of_its_step(fail_at: int) -> None:
    core, group = make_core()
    requests = [make_request([1, 2, 3, i], GREEDY) for i in range(3)]
    core.submit(requests)
    group.fail_at = fail_at
    with pytest.raises(RuntimeError, match="the device is gone"):
        finish(core)
    finish(core)
    assert core.blocks.free == core.blocks.total
    assert any(request.sequences[0].finish_reason == "error" for request in requests)
    for request in requests:
        if request.sequences[0].finish_reason != "error":
            assert request.sequences[0].output == expected_tokens(request.prompt_token_ids, GREEDY, 11)


def test_a_cache_larger_than_compiled_is_used() -> None:
    manifest = fake_manifest(max_length=MAX_LENGTH, num_blocks=11)
    group = FakeEngineGroup(fake_manifest(max_length=MAX_LENGTH, num_blocks=40))
    assert Core(group, manifest).blocks.total == 39
    assert manifest.model.vocab_size == VOCAB
