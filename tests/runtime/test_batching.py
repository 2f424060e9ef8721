"""Any batch, order of arrival and length: a request gives the tokens it gives alone, and every block comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.runtime.core import Core
from ingot.runtime.params import SamplingParams
from ingot.runtime.sampling import Penalties, wrap_seed
from ingot.runtime.sequence import Request, Sequence

from .fake_engine import VOCAB, FakeEngineGroup, expected_tokens, fake_logits, fake_manifest

MAX_LENGTH = 40


def make_request(prompt: list[int], params: SamplingParams) -> Request:
    sequence = Sequence(
        prompt=prompt,
        params=params,
        seed=wrap_seed(params.seed or 0),
        max_new=min(params.max_tokens, MAX_LENGTH - len(prompt)),
        penalties=Penalties(params, prompt, VOCAB) if params.penalized else None,
    )
    return Request("0", None, prompt, [sequence], 0.0)


def make_core(**shape: object) -> tuple[Core, FakeEngineGroup]:
    manifest = fake_manifest(max_length=MAX_LENGTH, **shape)  # type: ignore[arg-type]
    group = FakeEngineGroup(manifest)
    return Core(group, manifest), group


def alone(prompt: list[int], params: SamplingParams) -> list[int]:
    core, _ = make_core(num_blocks=11)
    request = make_request(prompt, params)
    core.submit([request])
    while core.step():
        pass
    return request.sequences[0].output


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_LENGTH - 1)
plain = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 3, 20]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(-(2**63), 2**64 - 1),
    max_tokens=st.integers(1, 30),
)
host = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(6, 20),
    min_tokens=st.integers(0, 5),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=5),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logprobs=st.sampled_from([None, 0, 3]),
)
arrivals = st.lists(st.tuples(prompts, plain | host, st.integers(0, 12)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    arrivals,
    st.sampled_from([11, 14, 40]),
    st.sampled_from([(1,), (1, 4), (2, 8)]),
    st.sampled_from([(4,), (3, 8), (64,)]),
)
def test_every_request_gives_the_tokens_it_gives_alone(
    arrivals: list[tuple[list[int], SamplingParams, int]],
    num_blocks: int,
    batches: tuple[int, ...],
    chunks: tuple[int, ...],
) -> None:
    core, _ = make_core(num_blocks=num_blocks, batches=batches, chunks=chunks)
    requests = [make_request(prompt, params) for prompt, params, _ in arrivals]
    step = 0
    while step <= 12 or core.unfinished:
        core.submit([r for r, (_, _, at) in zip(requests, arrivals, strict=True) if at == step])
        core.step()
        step += 1
    assert core.blocks.free == core.blocks.total
    for request, (prompt, params, _) in zip(requests, arrivals, strict=True):
        sequence = request.sequences[0]
        assert sequence.output == alone(prompt, params)
        if not (params.penalized or params.min_tokens or params.stop_ids):
            assert sequence.output == expected_tokens(prompt, params, sequence.max_new)
            assert sequence.finish_reason == "length"


@settings(max_examples=40, deadline=None)
@given(arrivals, st.data())
def test_aborted_requests_give_back_rows_and_blocks_and_harm_nobody(
    arrivals: list[tuple[list[int], SamplingParams, int]], data: st.DataObject
) -> None:
    core, _ = make_core(num_blocks=14, batches=(1, 3))
    requests = [make_request(prompt, params) for prompt, params, _ in arrivals]
    core.submit(requests)
    dropped = set()
    while core.unfinished:
        core.step()
        if data.draw(st.integers(0, 5)) == 0:
            index = data.draw(st.integers(0, len(requests) - 1))
            if not requests[index].finished:
                dropped.add(index)
            core.abort([requests[index]])
    assert core.blocks.free == core.blocks.total
    for index, (request, (prompt, params, _)) in enumerate(zip(requests, arrivals, strict=True)):
        whole = alone(prompt, params)
        made = request.sequences[0].output
        assert made == (whole[: len(made)] if index in dropped else whole)
        assert (request.sequences[0].finish_reason == "abort") == (index in dropped)


@pytest.mark.parametrize("length", range(1, 27))
def test_prompts_around_chunk_edges(length: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    prompt = [(7 * i) % VOCAB for i in range(length)]
    assert alone(prompt, params) == expected_tokens(prompt, params, 5)


def test_steady_decoding_writes_no_inputs() -> None:
    core, group = make_core()
    core.submit([make_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=11))])
    while core.step():
        pass
    # The first new token is the prefill's; of the other ten only the first decode step writes its inputs.
    assert group.engines["decode-b1"].calls == {"run": 1, "advance": 9}


def test_logprobs_leave_tokens_to_the_engine_and_penalties_do_not() -> None:
    for keys, advances in (({"logprobs": 5}, True), ({"repetition_penalty": 1.2}, False), ({"min_tokens": 6}, True)):
        core, group = make_core()
        core.submit([make_request([1, 2, 3], SamplingParams(max_tokens=8, **keys))])  # type: ignore[arg-type]
        while core.step():
            pass
        assert (group.engines["decode-b1"].calls["advance"] > 0) == advances, keys


def test_the_smallest_decode_engine_that_fits_runs() -> None:
    core, group = make_core(batches=(1, 2, 4))
    core.submit([make_request([1, i], SamplingParams(temperature=0, max_tokens=2 + i)) for i in range(4)])
    while core.step():
        pass
    used = {name: sum(engine.calls.values()) for name, engine in group.engines.items() if name.startswith("decode")}
    assert used == {"decode-b1": 1, "decode-b2": 1, "decode-b4": 2}


def test_nan_logits_end_the_request_alone_with_an_error() -> None:
    core, group = make_core()
    poisoned = [9, 9, 9]
    group.model = lambda tokens: (
        fake_logits(tokens) * (float("nan") if list(tokens[:3]) == poisoned and len(tokens) > 5 else 1)
    )
    params = SamplingParams(temperature=0, max_tokens=10)
    bad, good = make_request(poisoned, params), make_request([1, 2], params)
    core.submit([bad, good])
    while core.step():
        pass
    assert bad.sequences[0].finish_reason == "error"
    assert bad.sequences[0].output == expected_tokens(poisoned, params, 3)
    assert good.sequences[0].output == expected_tokens([1, 2], params, 10)
    assert core.blocks.free == core.blocks.total


@pytest.mark.parametrize("fail_at", [1, 2, 3, 5, 8])
def test_an_engine_fault_is_raised_and_gives_everything_back(fail_at: int) -> None:
    core, group = make_core()
    params = SamplingParams(temperature=0, max_tokens=10)
    requests = [make_request([1, 2, 3, i], params) for i in range(3)]
    core.submit(requests)
    group.fail_at = fail_at
    with pytest.raises(RuntimeError, match="the device is gone"):
        while core.step():
            pass
    failed = [request for request in requests if request.finished]
    assert failed and all(request.sequences[0].finish_reason == "error" for request in failed)
    later = make_request([4, 4], params)
    core.submit([later])
    while core.step():
        pass
    assert core.blocks.free == core.blocks.total
    for request in (*(r for r in requests if r not in failed), later):
        assert request.sequences[0].output == expected_tokens(request.prompt_token_ids, params, 10)
