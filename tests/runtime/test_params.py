"""Every sampling parameter out of range is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ingot.artifacts.errors import UsageError
from ingot.runtime import SamplingParams

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 129, 10**9, "3", True, 1.0, None],
    "temperature": [NAN, INF, -INF, -0.1, 1e39, 10**400, "1", True, None],
    "top_k": [-2, 2**31, 1.5, "5", False],
    "top_p": [0, 0.0, -0.1, 1.0001, NAN, INF, "0.9", True],
    "min_p": [-0.1, 1.1, NAN, INF, "0"],
    "seed": [2**64, -(2**63) - 1, 10**10_000, 1.0, "7", True],
    "max_tokens": [0, -1, 2**31, 10**10_000, 1.5, "16", True, None],
    "min_tokens": [-1, 17, "0", True],
    "stop": ["", [""], ["a", ""], [1], 5, ["x"] * 65, [str(i) for i in range(100_000)], "x" * 257, {"a": 1}],
    "stop_token_ids": [[-1], ["1"], [True], [2**31], 5, list(range(65)), "12"],
    "ignore_eos": [1, 0, "true", None],
    "logprobs": [-1, 21, True, "1", 1.0],
    "repetition_penalty": [0, -1, 0.001, 101, NAN, INF, "1"],
    "presence_penalty": [-2.1, 2.1, NAN, "0"],
    "frequency_penalty": [-2.1, 2.1, INF, None],
    "skip_special_tokens": [1, "yes"],
    "include_stop_str_in_output": [0],
    "detokenize": ["no"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
    ids=lambda v: repr(v)[:20] if not isinstance(v, int) else "",
)
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^Sampling parameter {name} ") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.exit_code == 2 and caught.value.why and caught.value.fix
    assert len(str(caught.value)) < 500


def test_every_parameter_has_wrong_values_here() -> None:
    assert set(WRONG) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": 2**64 - 1}, {"seed": -(2**63)}, {"temperature": 0}, {"temperature": 2}, {"top_k": -1}, {"top_p": 1},
        {"min_p": 1.0}, {"logprobs": 0}, {"stop": None}, {"stop_token_ids": None}, {"min_tokens": 16},
        {"max_tokens": 10**9},
    ],
)  # fmt: skip
def test_edges_are_accepted(keys: dict[str, object]) -> None:
    SamplingParams(**keys)  # type: ignore[arg-type]


def test_stops_become_tuples_without_repetition() -> None:
    params = SamplingParams(stop=["b", "a", "b"], stop_token_ids=[3, 3])
    assert params.stops == ("b", "a") and params.stop_ids == (3,)
    assert SamplingParams(stop="end").stops == ("end",)
    assert hash(params) == hash(dataclasses.replace(params))


def test_stop_strings_need_text() -> None:
    with pytest.raises(UsageError, match="stop"):
        SamplingParams(stop="x", detokenize=False)
