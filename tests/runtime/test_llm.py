"""The story of a request, from prompt to output, over fake engines: text, streams, stops, seeds, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import UsageError
from ingot.runtime import LLM, SamplingParams

from .conftest import write_artifact
from .fake_engine import fake_logits

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MakeLLM = Callable[..., LLM]


def say(llm: LLM, text: str, end: list[int] | None = None) -> None:
    """Make the model answer any prompt with `text`, then the tokens `end`, then 'z' for ever."""
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False, limit=10_000) + (end or [])
    z = llm.get_tokenizer().encode("z", add_special_tokens=False, limit=10)[0]
    prompt_length = len(llm.get_tokenizer().encode("Once", add_special_tokens=True, limit=100))

    def model(tokens: list[int]) -> object:
        logits = fake_logits([0], 320, scale=0.0)
        made = len(tokens) - prompt_length
        logits[ids[made] if made < len(ids) else z] = 50
        return logits

    llm._engines.model = model  # type: ignore[attr-defined]


def test_text_and_ids_give_the_same_tokens_in_order(llm: LLM) -> None:
    texts = ["Once upon a time", "The quick brown fox jumps", "Bär 😀"]
    ids = [llm.get_tokenizer().encode(text, add_special_tokens=True, limit=100) for text in texts]
    by_text, by_ids = llm.generate(texts, GREEDY), llm.generate(ids, GREEDY)
    for text, prompt, a, b in zip(texts, ids, by_text, by_ids, strict=True):
        assert (
            a.outputs == b.outputs == llm.generate(text, GREEDY)[0].outputs == llm.generate(prompt, GREEDY)[0].outputs
        )
        assert (a.prompt, b.prompt) == (text, None) and a.prompt_token_ids == b.prompt_token_ids == prompt
        assert a.finished and a.outputs[0].finish_reason == "length" and len(a.outputs[0].token_ids) == 12
    assert len({output.request_id for output in by_text + by_ids}) == 6
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    outputs = llm.generate([[5, 6], [5, 6]], [replace(GREEDY, max_tokens=3), replace(GREEDY, max_tokens=7)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 7]


def test_metrics(llm: LLM) -> None:
    metrics = llm.generate("Once", GREEDY)[0].metrics
    assert metrics.output_tokens == 12 and metrics.prompt_tokens == len(llm.generate("Once")[0].prompt_token_ids)
    times = (metrics.queue_ms, metrics.ttft_ms, metrics.total_ms)
    assert all(time is not None for time in times) and list(times) == sorted(times)  # type: ignore[type-var]
    assert metrics.tpot_ms == pytest.approx((metrics.total_ms - metrics.ttft_ms) / 11)  # type: ignore[operator]
    assert llm.generate("Once", replace(GREEDY, max_tokens=1))[0].metrics.tpot_ms is None


def test_seeds_reproduce_and_completions_use_consecutive_seeds(llm: LLM) -> None:
    params = SamplingParams(seed=2**64 - 2, n=4, max_tokens=10, ignore_eos=True)
    first = llm.generate([[7, 8]], params)[0]
    again = llm.generate([[9], [7, 8], [1, 2, 3]], [GREEDY, params, GREEDY])[1]
    assert first.outputs == again.outputs and [o.index for o in first.outputs] == [0, 1, 2, 3]
    for index, output in enumerate(first.outputs):
        alone = llm.generate([[7, 8]], replace(params, n=1, seed=(2**64 - 2 + index) % 2**64))[0]
        assert alone.outputs[0].token_ids == output.token_ids
    assert len({tuple(output.token_ids) for output in first.outputs}) == 4
    unseeded = {
        tuple(llm.generate([[7, 8]], replace(params, seed=None, n=1))[0].outputs[0].token_ids) for _ in range(3)
    }
    assert len(unseeded) == 3


def test_logprobs_do_not_change_tokens(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=10, ignore_eos=True)
    plain = llm.generate([[7, 8]], params)[0].outputs[0]
    output = llm.generate([[7, 8]], replace(params, logprobs=3))[0].outputs[0]
    assert output.token_ids == plain.token_ids and output.text == plain.text and plain.logprobs is None
    assert output.logprobs is not None and len(output.logprobs) == 10
    total = 0.0
    for token, found in zip(output.token_ids, output.logprobs, strict=True):
        assert 3 <= len(found) <= 4 and found[token].decoded_token == llm.get_tokenizer().decode([token])
        total += found[token].logprob
    assert output.cumulative_logprob == pytest.approx(total)


def test_the_end_of_sequence_ends_it_and_is_no_text(llm: LLM) -> None:
    say(llm, "Hello there", end=[1])
    output = llm.generate("Once", replace(GREEDY, ignore_eos=False, max_tokens=40))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason, output.token_ids[-1]) == (
        "Hello there",
        "stop",
        None,
        1,
    )
    ignored = llm.generate("Once", replace(GREEDY, max_tokens=40))[0].outputs[0]
    assert ignored.text.startswith("Hello therezz") and ignored.finish_reason == "length"


def test_stop_token_ids(llm: LLM) -> None:
    [z] = llm.get_tokenizer().encode("z", add_special_tokens=False, limit=10)
    say(llm, "Hello")
    params = replace(GREEDY, stop_token_ids=[z], max_tokens=40)
    output = llm.generate("Once", params)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("Hello", "stop", z)
    assert llm.generate("Once", replace(params, include_stop_str_in_output=True))[0].outputs[0].text == "Helloz"


@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        ("lo wor", "Hel", "lo wor"),
        (["xyz", "ld!"], "Hello wor", "ld!"),
        ("😀", "Hello world! ", "😀"),
        ("H", "", "H"),
        ("absent", None, None),
    ],
)
def test_stop_strings_across_tokens(llm: LLM, stop: str | list[str], text: str | None, found: str | None) -> None:
    say(llm, "Hello world! 😀 more")
    params = replace(GREEDY, max_tokens=30, stop=stop)
    for include in (False, True):
        [request] = llm.generate("Once", replace(params, include_stop_str_in_output=include))
        output = request.outputs[0]
        assert output.stop_reason == found and output.finish_reason == ("stop" if found else "length")
        if text is not None:
            assert output.text == text + (found or "") * include
        pieces = list(llm.stream("Once", replace(params, include_stop_str_in_output=include)))
        assert "".join(piece.outputs[0].text for piece in pieces) == output.text


def test_min_tokens_holds_back_every_end(llm: LLM) -> None:
    say(llm, "abc", end=[1] * 40)
    params = replace(GREEDY, ignore_eos=False, max_tokens=20)
    short = llm.generate("Once", params)[0].outputs[0]
    longer = llm.generate("Once", replace(params, min_tokens=len(short.token_ids) + 3))[0].outputs[0]
    assert short.token_ids[-1] == 1 and len(longer.token_ids) == len(short.token_ids) + 4
    assert longer.token_ids.count(1) == 1 and longer.finish_reason == "stop"


def test_text_cut_within_a_character_says_so(llm: LLM) -> None:
    say(llm, "ab😀")
    whole = llm.get_tokenizer().encode("ab😀", add_special_tokens=False, limit=20)
    for count in range(1, len(whole) + 1):
        output = llm.generate("Once", replace(GREEDY, max_tokens=count))[0].outputs[0]
        assert output.text == llm.get_tokenizer().decode(whole[:count])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(2, 319), min_size=1, max_size=20), st.integers(0, 2**64 - 1), st.integers(1, 3))
def test_a_stream_is_the_whole(llm: LLM, prompt: list[int], seed: int, n: int) -> None:
    params = SamplingParams(seed=seed, n=n, max_tokens=25, logprobs=1, ignore_eos=True)
    [whole] = llm.generate([prompt], params)
    pieces = list(llm.stream(prompt, params))
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for index, output in enumerate(whole.outputs):
        parts = [piece.outputs[index] for piece in pieces]
        assert "".join(part.text for part in parts) == output.text
        assert [token for part in parts for token in part.token_ids] == output.token_ids
        assert [entry for part in parts for entry in part.logprobs or []] == output.logprobs
        assert parts[-1].finish_reason == output.finish_reason
    assert llm._core.unfinished == 0


def test_closing_a_stream_frees_its_blocks(llm: LLM) -> None:
    blocks = llm._core.blocks
    stream = llm.stream([1, 2, 3], replace(GREEDY, max_tokens=40, n=3))
    assert blocks.free == blocks.total, "nothing starts before the first next()"
    next(stream)
    next(stream)
    assert blocks.free < blocks.total
    stream.close()  # type: ignore[attr-defined]
    assert blocks.free == blocks.total and llm._core.unfinished == 0
    next(llm.stream([1, 2], GREEDY))  # dropped by its only owner
    assert blocks.free == blocks.total


def test_streams_and_calls_share_the_engines(llm: LLM) -> None:
    params = replace(GREEDY, max_tokens=20)
    stream = llm.stream([1, 2, 3], params)
    tokens = list(next(stream).outputs[0].token_ids)
    [other] = llm.generate([[4, 5]], params)
    tokens += [token for piece in stream for token in piece.outputs[0].token_ids]
    model = llm._engines.model  # type: ignore[attr-defined]
    for prompt, made in (([1, 2, 3], tokens), ([4, 5], other.outputs[0].token_ids)):
        history = list(prompt)
        for token in made:
            assert token == model(history).argmax()
            history.append(token)
        assert len(made) == 20


def test_chat(llm: LLM, make_llm: MakeLLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    [output] = llm.chat(messages, GREEDY)
    assert output.prompt == "<|user|>Hi</s>\n<|assistant|>"
    assert output.prompt_token_ids[0] != 0, "the template writes its own special tokens; none are added"
    assert 1 in output.prompt_token_ids
    assert llm.chat([messages, messages], GREEDY)[1].outputs == output.outputs
    pieces = list(llm.stream(messages, GREEDY))  # type: ignore[arg-type]
    assert "".join(piece.outputs[0].text for piece in pieces) == output.outputs[0].text
    assert llm.chat(messages, GREEDY, add_generation_prompt=False)[0].prompt == "<|user|>Hi</s>\n"
    refused: list[Any] = [[], "Hi", [[]], 5, [5]]
    for wrong in refused:
        with pytest.raises(UsageError, match="no messages"):
            llm.chat(wrong)
    with pytest.raises(UsageError, match="has no chat template"):
        make_llm(template=None).chat(messages)


def test_defaults_come_from_the_model(make_llm: MakeLLM) -> None:
    llm = make_llm(generation={"eos_token_ids": [], "defaults": {"temperature": 0.0, "top_k": 7}})
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, top_k=7)
    assert llm.generate([[3, 4]])[0].outputs == llm.generate([[3, 4]], SamplingParams(temperature=0))[0].outputs


@pytest.mark.parametrize("length", [1, 8, 62, 63])
def test_max_tokens_beyond_the_artifact_is_capped(llm: LLM, length: int) -> None:
    [output] = llm.generate([[2] * length], replace(GREEDY, max_tokens=10**9))
    assert len(output.outputs[0].token_ids) == 64 - length and output.outputs[0].finish_reason == "length"


def test_many_requests_through_few_rows(llm: LLM) -> None:
    prompts = [[1 + i % 300, i % 7] * (1 + i % 9) for i in range(40)]
    params = [replace(GREEDY, max_tokens=1 + i % 13) for i in range(40)]
    together = llm.generate(prompts, params)
    assert [o.outputs for o in together] == [
        llm.generate([p], q)[0].outputs for p, q in zip(prompts, params, strict=True)
    ]
    assert llm._core.blocks.free == llm._core.blocks.total


def test_token_ids_alone_need_no_tokenizer(make_llm: MakeLLM) -> None:
    llm = make_llm()
    [output] = llm.generate([[1, 2]], replace(GREEDY, detokenize=False))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 12
    assert "_tokenizer" not in llm.__dict__
    assert output.outputs[0].token_ids == llm.generate([[1, 2]], GREEDY)[0].outputs[0].token_ids


def test_close_gives_the_engines_back_and_ends_streams(llm: LLM) -> None:
    with llm:
        stream = llm.stream([1, 2], GREEDY)
        next(stream)
    llm.close()
    assert llm._engines.closed == 1  # type: ignore[attr-defined]
    assert [piece.outputs[0].finish_reason for piece in stream] == ["abort"]
    with pytest.raises(UsageError, match="closed"):
        llm.generate("a")


def test_the_import_is_lean() -> None:
    code = (
        "import sys, ingot.runtime\n"
        "print([m for m in ('torch', 'transformers', 'jinja2', 'tokenizers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_generation_loads_no_model_library_and_no_compiler(tmp_path: Path) -> None:
    write_artifact(tmp_path / "artifact")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_engine import FakeEngineGroup, fake_manifest
from ingot.runtime import LLM, SamplingParams
with LLM({str(tmp_path / "artifact")!r}, engine_group=FakeEngineGroup(fake_manifest(vocab=320))) as llm:
    llm.generate("Once", SamplingParams(stop="x", logprobs=2))
    llm.chat([{{"role": "user", "content": "Hi"}}])
absent = ('torch', 'transformers', 'onnx', 'jinja2')
print([m for m in sys.modules if m.split('.')[0] in absent or m.startswith('ingot.compiler')])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
