"""What an LLM refuses, and that it does so before any work: prompts, parameters, and artifacts that are not whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ingot.artifacts.errors import UsageError, VerificationError
from ingot.runtime import LLM, SamplingParams

from .conftest import write_artifact

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MakeLLM = Callable[..., LLM]


@pytest.mark.parametrize(
    "prompts",
    ["", [""], [[]], ["fine", ""], [[], [1]], 5, None, {"a": 1}, [5.0], [[1, "a"]], [True], [[True]], ["a", 5], [None],
     [[-1]], [320], [[10**30]], [1] * 64, "word " * 100, "x" * 10**6, "a\ud800"],
    ids=range(21),
)  # fmt: skip
def test_wrong_prompts_are_refused_before_any_work(llm: LLM, prompts: object) -> None:
    with pytest.raises(UsageError) as caught:
        llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2 and caught.value.why and caught.value.fix
    with pytest.raises(UsageError):
        llm.stream(prompts, GREEDY)  # type: ignore[arg-type]
    assert llm._engines.steps == 0 and llm._core.unfinished == 0  # type: ignore[attr-defined]


def test_one_wrong_prompt_refuses_the_call(llm: LLM) -> None:
    with pytest.raises(UsageError, match="320"):
        llm.generate([[1, 2], [320]], GREEDY)
    with pytest.raises(UsageError, match="at most 63"):
        llm.generate([[1, 2], [1] * 64], GREEDY)
    with pytest.raises(UsageError, match="stop_token_ids holds 320"):
        llm.generate([[1, 2], [1]], [GREEDY, replace(GREEDY, stop_token_ids=[320])])
    with pytest.raises(UsageError, match="do not go with 2 prompts"):
        llm.generate([[1, 2], [1]], [GREEDY])
    with pytest.raises(UsageError, match="do not go with 1 prompts"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]
    assert llm._engines.steps == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "generation",
    [[], {"eos_token_ids": 5}, {"eos_token_ids": [320]}, {"eos_token_ids": [True]}, {"bos_token_id": -1},
     {"bos_token": 5}, {"defaults": {"temperature": -1}}, {"defaults": {"max_tokens": 5}}, {"defaults": []}],
)  # fmt: skip
def test_a_wrong_generation_config_is_refused(make_llm: MakeLLM, generation: object) -> None:
    with pytest.raises(VerificationError, match=r"generation\.json"):
        make_llm(generation=generation)


@pytest.mark.parametrize("shape", [{"batches": ()}, {"chunks": ()}])
def test_an_artifact_without_both_phases_is_refused(make_llm: MakeLLM, shape: dict[str, object]) -> None:
    with pytest.raises((VerificationError, ValueError)):
        make_llm(**shape)


def test_sizes_alone_still_digests_the_code(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "artifact")
    (folder / "engines/fake.so").write_bytes(b"bad code")
    with pytest.raises(VerificationError, match="fake"):
        LLM(folder, verify="sizes")
    with pytest.raises(VerificationError, match="fake"):
        LLM(folder)
