"""Whole kernel plans, launch by launch in Triton's interpreter, against the model's own graphs run eagerly.

So lowering, order of arguments, offsets of views, sharing of the arena and the paged cache are tested without a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ingot.compiler.eager_engines import EagerGroup
from ingot.compiler.recipe_sections import Group
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

# Row of the batch -> tokens beyond a chunk: two chunks, part of one, a whole one; row 1 is padding.
PROMPTS = {0: 5, 2: -7, 3: 0}
BATCH, BLOCK, STEPS = 4, 8, 3


def recorded_steps(
    eager: EagerGroup, chunk: int
) -> tuple[list[tuple[str, dict[str, Tensor]]], list[dict[str, np.ndarray]]]:
    """Prefill of all prompts in chunks, a few greedy decode steps, a few sampled ones: inputs, and what eager gives.

    Decode steps without inputs go on from what the one before sampled.
    """
    generator = np.random.default_rng(7)
    prefill, decode = eager.engines[f"prefill-c{chunk}"], eager.engines["decode-b4"]
    width = decode.inputs["block_tables"].shape[1]
    free = generator.permutation(np.arange(1, eager.num_blocks)).astype(np.int32)
    steps: list[tuple[str, dict[str, Tensor]]] = []
    wanted: list[dict[str, np.ndarray]] = []

    def run(engine: Any, inputs: dict[str, np.ndarray] | None) -> None:
        steps.append((engine.entry.name, {n: torch.from_numpy(v.copy()) for n, v in (inputs or {}).items()}))
        if inputs is None:
            engine.advance()
        else:
            for name, value in inputs.items():
                engine.inputs[name][...] = value
            engine.run()
        outputs = {"next_tokens": engine.next_tokens(), "logits": engine.logits()}
        wanted.append({n: v.copy() for n, v in outputs.items()})

    tables = np.zeros((BATCH, width), np.int32)
    last, length = np.zeros((BATCH, 1), np.int64), np.full((BATCH, 1), -1, np.int64)
    for row, beyond in PROMPTS.items():
        size = chunk + beyond
        prompt = generator.integers(3, 128, size)
        used = -(-(size + 2 * STEPS) // BLOCK)
        tables[row, :used], free = free[:used], free[used:]
        for start in range(0, size, chunk):
            piece = prompt[start : start + chunk]
            inputs = {**greedy(1), "last_index": np.array([len(piece) - 1]), "block_tables": tables[row : row + 1]}
            inputs["tokens"], inputs["positions"] = np.zeros((1, chunk), np.int64), np.full((1, chunk), -1, np.int64)
            inputs["tokens"][0, : len(piece)] = piece
            inputs["positions"][0, : len(piece)] = np.arange(start, start + len(piece))
            run(prefill, inputs)
        last[row], length[row] = prefill.next_tokens(), size
    run(decode, {**greedy(BATCH), "tokens": last, "positions": length, "block_tables": tables})
    for _ in range(STEPS - 1):
        run(decode, None)
    last, length = decode.next_tokens()[:, None].copy(), np.where(length < 0, -1, length + STEPS)
    sampled: dict[str, Any] = {
        "temperature": np.array([0.7, 1.0, 0.0, 1.3], np.float32), "top_k": np.array([0, 0, 3, 9], np.int32),
        "top_p": np.array([0.9, 1.0, 0.5, 1.0], np.float32), "min_p": np.array([0.0, 0.0, 0.0, 0.05], np.float32),
        "seeds": np.array([11, 0, 3, 1 << 40], np.int64),
    }  # fmt: skip
    run(decode, {**sampled, "tokens": last, "positions": length, "block_tables": tables})
    run(decode, None)
    return steps, wanted


def greedy(batch: int) -> dict[str, Any]:
    """Sampling parameters that take the largest logit."""
    return {
        "temperature": np.zeros(batch, np.float32), "top_k": np.zeros(batch, np.int32),
        "top_p": np.ones(batch, np.float32), "min_p": np.zeros(batch, np.float32), "seeds": np.zeros(batch, np.int64),
    }  # fmt: skip


def simulate(family: str, kind: str, chunk: int, folder: Path, groups: Sequence[Group] = ()) -> None:
    """Compile the family, run it both ways and compare tokens and logits of all rows that hold a sequence."""
    from .tiny_plans import fewest_programs, planned, record

    cuda, cpu = (planned(family, "float32", folder, device, chunk, groups) for device in ("cuda", "cpu"))
    record(cuda, folder, fewest_programs(kind))
    steps, wanted = recorded_steps(EagerGroup(cpu.plan.graphs, cpu.load), chunk)
    torch.save(steps, folder / "steps.pt")
    script = Path(__file__).with_name("plan_simulator.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, script, folder], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results = torch.load(folder / "results.pt", weights_only=True)
    for number, ((engine, _), want, have) in enumerate(zip(steps, wanted, results, strict=True)):
        rows = list(PROMPTS) if engine == "decode-b4" else [0]
        logits = have["logits"].numpy().reshape(want["logits"].shape)
        span = want["logits"][rows].max() - want["logits"][rows].min()
        error = np.abs(logits[rows] - want["logits"][rows]).max() / span
        assert error < 1e-5, (number, engine)
        assert have["next_tokens"][rows].tolist() == want["next_tokens"][rows].tolist(), (number, engine)
        picked = logits[rows, want["next_tokens"][rows]]
        assert have["sampled_logits"][rows].tolist() == picked.tolist(), (number, engine)
    assert len({int(t) for want in wanted for t in want["next_tokens"]}) > 6


# A chunk of more than 64 tokens takes other kernels, and its norms are not computed along with the products.
@pytest.mark.parametrize(
    ("family", "kind", "chunk"), [("llama", "gemv", 80), ("qwen3", "skinny", 16), ("gemma2", "skinny", 16)]
)
def test_a_plan_computes_what_the_model_does(family: str, kind: str, chunk: int, tmp_path: Path) -> None:
    simulate(family, kind, chunk, tmp_path)


# The first group that takes a weight has it: LM head, then MLP, then the rest; an embedding of few bytes.
QUANTIZED = (
    Group("FP8-W8A16", targets=("lm_head",)),
    Group("W4A16", targets=("re:mlp",), group_size=32, symmetric=False),
    Group("W8A16"),
    Group("W4A16", targets=("Embedding",), group_size=32),
)


def test_a_plan_reads_quantized_weights(tmp_path: Path) -> None:
    simulate("llama", "gemv", 80, tmp_path, QUANTIZED)
