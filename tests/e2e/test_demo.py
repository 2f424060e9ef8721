"""The whole line on a compiled artifact: built by the command line, it generates what eager transformers generates."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from ingot.artifacts.manifest import load_manifest
from ingot.artifacts.store import check
from ingot.runtime import LLM, SamplingParams

from ..conftest import ROOT, Demo

Ingot = Callable[..., CompletedProcess[str]]
# Around the chunk of 16 tokens and the blocks of 8, over several chunks, and up to one token before the end of 128.
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 100, 127)
NEW = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11, max_tokens=NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(demo_artifact: Path) -> Iterator[LLM]:
    with LLM(demo_artifact) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 320, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def eager(demo: Demo) -> Any:
    """The checkpoint as transformers runs it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.model, dtype="float32", attn_implementation="eager").eval()


def tokens(llm: LLM, prompt: Any, params: SamplingParams) -> list[int]:
    """The new tokens of one prompt by itself."""
    return llm.generate([prompt], params)[0].outputs[0].token_ids


# --- the build -------------------------------------------------------------------------------------------------------


def test_the_build_reports_stages_passes_exactness_and_sizes(demo: Demo) -> None:
    said = demo.build.stdout
    for word in ("decode-b1", "decode-b4", "prefill-c16", "fuse-rms-norm", "max_relative_error", "engines", "weights"):
        assert word in said
    for stage in ("trace and passes", "weights", "compile engines", "numeric gate", "digest and publish"):
        assert f"{stage} done in" in demo.build.stderr
    assert "decode-b4 (" in demo.build.stderr
    assert "\x1b" not in said + demo.build.stderr


def test_the_artifact_is_whole(demo: Demo) -> None:
    assert check(demo.artifact) == []
    manifest = load_manifest(demo.artifact)
    assert [engine.name for engine in manifest.engines] == ["decode-b1", "decode-b4", "prefill-c16"]
    assert manifest.gate["passed"] is True
    assert manifest.gate["engines"].keys() == {engine.name for engine in manifest.engines}
    assert all(found["max_relative_error"] <= 1e-4 for found in manifest.gate["engines"].values())
    assert (manifest.target.host_library, manifest.kv_cache.max_blocks) == ("none", 16)
    for report in ("passes", "gate"):
        stored = json.loads((demo.artifact / "report" / f"{report}.json").read_text())
        assert stored == getattr(manifest, report)


def test_nothing_of_the_building_machine_is_in_the_digested_files(demo: Demo) -> None:
    manifest = load_manifest(demo.artifact)
    for entry in manifest.files:
        if not entry.path.endswith(".so"):
            assert str(demo.artifact.parent).encode() not in (demo.artifact / entry.path).read_bytes()
    assert str(demo.artifact.parent) not in (demo.artifact / "manifest.json").read_text()


def test_the_parent_folder_holds_nothing_else(demo: Demo) -> None:
    assert sorted(path.name for path in demo.artifact.parent.iterdir()) == ["artifact", "model", "recipe.toml"]


# --- generation ------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_eager_transformers(llm: LLM, eager: Any, prompts: list[list[int]]) -> None:
    import torch

    for prompt in prompts:
        count = min(NEW, 128 - len(prompt))
        ids = torch.tensor([prompt])
        wanted = eager.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count,
            eos_token_id=-1,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert tokens(llm, prompt, GREEDY) == wanted, f"prompt of {len(prompt)} tokens"


def test_text_is_that_of_eager_transformers(llm: LLM, eager: Any, demo: Demo) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    for text in ("Once upon a time", "Über die Brücke: 你好", "a"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = eager.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        output = llm.generate(text, SamplingParams(temperature=0, max_tokens=NEW))[0]
        assert output.prompt_token_ids == ids[0].tolist()
        wanted = out[0, ids.shape[1] :].tolist()
        assert output.outputs[0].token_ids == wanted
        assert output.outputs[0].text == tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_gives_in_any_batch_what_it_gives_alone(
    llm: LLM, prompts: list[list[int]], params: SamplingParams
) -> None:
    alone = [tokens(llm, prompt, params) for prompt in prompts]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    assert together == alone
    backwards = [output.outputs[0].token_ids for output in llm.generate(prompts[::-1], params)]
    assert backwards == alone[::-1]


def test_a_seed_fixes_the_tokens_and_another_seed_changes_them(llm: LLM, prompts: list[list[int]]) -> None:
    first = tokens(llm, prompts[4], SAMPLED)
    assert tokens(llm, prompts[4], SAMPLED) == first
    others = {tuple(tokens(llm, prompts[4], dataclasses.replace(SAMPLED, seed=seed))) for seed in range(5)}
    assert len(others) > 1


def test_seeded_tokens_survive_a_new_process(llm: LLM, demo_artifact: Path, ingot: Ingot) -> None:
    flags = ["--temperature=0.9", "--top-k=40", "--top-p=0.95", "--min-p=0.01", "--seed=11", f"--max-tokens={NEW}"]
    found = json.loads(ingot("run", demo_artifact, "Once upon", *flags, "--json").stdout)
    [output] = llm.generate("Once upon", dataclasses.replace(SAMPLED, ignore_eos=False))
    assert found["token_ids"] == output.outputs[0].token_ids
    assert found["text"] == output.outputs[0].text


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_is_the_whole(llm: LLM, params: SamplingParams) -> None:
    whole = llm.generate("Once upon a time", params)[0].outputs[0]
    pieces = [output.outputs[0] for output in llm.stream("Once upon a time", params)]
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert pieces[-1].finish_reason == whole.finish_reason


def test_more_requests_than_rows(llm: LLM, prompts: list[list[int]]) -> None:
    many = (prompts * 3)[:30]
    found = llm.generate(many, GREEDY)
    assert [o.outputs[0].token_ids for o in found[: len(prompts)]] == [
        o.outputs[0].token_ids for o in found[len(prompts) : 2 * len(prompts)]
    ]


def test_the_readmes_example_runs(demo_artifact: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    [code] = [block for block in blocks if "from ingot.runtime" in block]
    assert code.count("artifacts/built/demo") == 1
    code = code.replace("artifacts/built/demo", str(demo_artifact))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 100


# --- the command line on the artifact --------------------------------------------------------------------------------


def test_run_prints_the_text(llm: LLM, demo_artifact: Path, ingot: Ingot) -> None:
    wanted = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    for flag in ("--stream", "--no-stream"):
        done = ingot("run", demo_artifact, "Once upon a time", "--temperature=0", "--max-tokens=12", flag)
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted + "\n", "")


def test_run_chats(llm: LLM, demo_artifact: Path, ingot: Ingot) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    wanted = llm.chat(messages, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
    done = ingot("run", demo_artifact, "Hi", "--chat", "--temperature=0", "--max-tokens=6")
    assert (done.returncode, done.stdout) == (0, wanted + "\n")


def test_inspect_and_verify_a_good_artifact(demo_artifact: Path, ingot: Ingot) -> None:
    done = ingot("verify", demo_artifact)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok" in done.stdout
    facts = json.loads(ingot("inspect", demo_artifact, "--json").stdout)
    assert facts["digest"] == load_manifest(demo_artifact).digest()
    assert all(engine["exactness"]["max_relative_error"] <= 1e-4 for engine in facts["engines"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature=nan"], "temperature"),
        (["--temperature=-1"], "temperature"),
        (["--top-p=0"], "top_p"),
        (["--max-tokens=0"], "max_tokens"),
        (["--seed=99999999999999999999999"], "seed"),
    ],
)
def test_wrong_requests_exit_with_2(demo_artifact: Path, ingot: Ingot, words: list[str], said: str) -> None:
    done = ingot("run", demo_artifact, "Once", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("prompt", ["", "word " * 200], ids=["empty", "too long"])
def test_wrong_prompts_exit_with_2(demo_artifact: Path, ingot: Ingot, prompt: str) -> None:
    done = ingot("run", demo_artifact, prompt)
    assert (done.returncode, done.stdout) == (2, "")
    assert "rompt" in done.stderr
