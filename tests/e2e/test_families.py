"""Token-exactness by family: tiny random models through trace, passes and runtime, against transformers' generate.

The planned graphs are run eagerly: what a family could get wrong lies before the back end, and `ingot families`
compiles them all. The prompts are around the prefill chunk and the sliding window, alone and in one batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ingot.compiler.console import SilentProgress
from ingot.compiler.families import CHUNK, PROMPT_LENGTHS, eager, run, subjects, try_family
from ingot.compiler.recipe import load_recipe
from ingot.runtime import SamplingParams

from ..conftest import ROOT

NAMED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
)
REFUSED = tuple(subject.name for subject in subjects() if subject.refused)


@pytest.mark.parametrize("name", NAMED)
def test_tokens_are_exactly_those_of_transformers(name: str) -> None:
    [subject] = subjects([name])
    row = try_family(subject, compile_engines=False)
    assert row["tokens"] == 24 * len(PROMPT_LENGTHS)
    assert (row["alone"], row["batched"], row["exact"]) == (row["tokens"], row["tokens"], "yes"), row


def test_prompts_cross_the_chunk_and_the_window() -> None:
    windows = {subject.config["sliding_window"] for subject in subjects(NAMED) if "sliding_window" in subject.config}
    assert windows == {8}
    for edge in (CHUNK, *windows):
        assert {edge - 1, edge, edge + 1} <= set(PROMPT_LENGTHS)
    assert max(PROMPT_LENGTHS) > 2 * CHUNK


@pytest.mark.parametrize("name", REFUSED)
def test_other_state_is_refused_by_name_and_reason(name: str) -> None:
    [row] = run([name], progress=SilentProgress(), compile_engines=False)
    assert row["exact"] == "yes", row
    assert row["note"].startswith("refused: ")
    assert len(row["note"]) > 40


def test_what_is_refused_is_more_than_one_kind() -> None:
    assert {"mamba", "qwen3_next", "jamba", "llama4_text"} <= set(REFUSED)


def test_stories_in_the_words_of_transformers(stories: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "Once upon a time"
    model: Any = AutoModelForCausalLM.from_pretrained(stories, dtype="float32", attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = model.generate(ids, do_sample=False, max_new_tokens=60)[0, ids.shape[1] :].tolist()
    with eager(load_recipe(ROOT / "recipes" / "stories260k.toml", (), str(stories)), tmp_path) as llm:
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60))[0]
    assert output.prompt_token_ids == ids[0].tolist()
    assert output.outputs[0].token_ids == wanted
    assert output.outputs[0].text.strip() == tokenizer.decode(wanted, skip_special_tokens=True).strip()
