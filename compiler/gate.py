"""The numeric gate: every engine against eager Hugging Face on the same tokens, judged by budgets.

A child process loads the finished engines with the runtime alone and replays the gate's tokens; this process runs
transformers on them. What is recorded is what a user gets, not what the compiler believes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts.errors import ResourceError
from ..artifacts.manifest import Manifest
from .metrics import Distance, compare
from .recipe import Recipe
from .reference_model import ReferenceModel

_TIMEOUT_S = 3600


@dataclass(frozen=True)
class GateTokens:
    """What is replayed: token ids, and how many of each are prefilled."""

    sequences: list[list[int]]
    prompts: list[int]

    @property
    def firsts(self) -> list[int]:
        """Position of the first logits that are compared."""
        return [p - 1 for p in self.prompts]


@dataclass(frozen=True)
class Budget:
    """What a build must keep; None is not judged."""

    max_relative_error: float | None = None
    mean_kl: float | None = None
    top1: float | None = None

    def shortfalls(self, found: Distance, eager: Distance | None) -> list[str]:
        """Each metric that misses its budget, in words. Metrics no worse than `eager`, the model's own error, pass."""
        if not found.finite:
            return ["some logits are not finite"]
        missed = []
        if self.max_relative_error is not None and found.max_relative_error > self.max_relative_error:
            missed.append(f"max relative error {found.max_relative_error:.2e} > {self.max_relative_error:.2e}")
        if self.mean_kl is not None and found.mean_kl > max(self.mean_kl, eager.mean_kl if eager else 0.0):
            missed.append(f"mean KL {found.mean_kl:.2e} > {self.mean_kl:.2e}")
        if self.top1 is not None:
            floor = min(self.top1, _at_least(eager.top1, eager.tokens) if eager else 1.0)
            if found.top1 < floor:
                missed.append(f"top-1 agreement {found.top1:.2%} < {floor:.2%}")
        return missed


def _at_least(share: float, count: int) -> float:
    """The smallest share among `count` that is no evidence of being worse: two standard errors and one less."""
    return share - 2 * (share * (1 - share) / count) ** 0.5 - 1 / count


def budget_for(recipe: Recipe) -> Budget:
    """The recipe's budgets over the defaults for its dtype and scheme."""
    asked = recipe.gate.budgets
    if recipe.quantization.scheme != "none":
        base = Budget(mean_kl=0.005, top1=0.97)
    elif recipe.model.dtype == "float32":
        base = Budget(max_relative_error=1e-4)
    else:
        base = Budget(mean_kl=1e-3, top1=0.99)
    return Budget(
        asked.max_relative_error if asked.max_relative_error is not None else base.max_relative_error,
        asked.mean_kl if asked.mean_kl is not None else base.mean_kl,
        asked.top1 if asked.top1 is not None else base.top1,
    )


def gate_tokens(recipe: Recipe, encode: Callable[[str], list[int]] | None, vocabulary: int, window: int) -> GateTokens:
    """The recipe's prompts as tokens, and one long sequence that crosses chunks, blocks and the sliding window.

    Without a tokenizer the ids are random, from the gate's seed.
    """
    limit = recipe.model.max_length
    length = min(recipe.gate.max_tokens * 2, limit)
    if encode is not None:
        sequences = [ids for p in recipe.gate.prompts if len(ids := encode(p)[:limit]) >= 2]
    else:
        rng = np.random.default_rng(recipe.gate.seed)
        sequences = [
            rng.integers(0, vocabulary, max(length - 7 * i, 2)).tolist() for i in range(len(recipe.gate.prompts))
        ]
    if not sequences:
        sequences = [[0, 1]]
    reach = max(recipe.shapes.prefill_lengths) + recipe.shapes.kv_block_size + 8
    reach = max(reach, window + 16 if window <= 1024 else 0)
    every = [t for s in sequences for t in s]
    long = (every * (reach // len(every) + 1))[: min(reach, limit)]
    sequences = [s[: min(limit, max(length, 2))] for s in sequences]
    prompts = [max(1, len(s) // 2) for s in sequences]
    if len(long) >= 2:
        sequences.append(long)
        prompts.append(max(1, len(long) - 12))
    return GateTokens(sequences, prompts)


def engine_pairs(recipe: Recipe) -> list[tuple[str, str]]:
    """Prefill and decode engines to run together, so that every engine runs at least once."""
    prefill = [e.name for e in recipe.engines() if e.phase == "prefill"]
    decode = [e.name for e in recipe.engines() if e.phase == "decode"]
    return [(prefill[i % len(prefill)], decode[i % len(decode)]) for i in range(max(len(prefill), len(decode)))]


def replay_in_child(
    root: Path, manifest: Manifest, pairs: Sequence[tuple[str, str]], tokens: GateTokens
) -> list[list[np.ndarray]]:
    """Logits of every pair of engines, per sequence, from a lean process.

    Raises:
        ResourceError: the child crashed or took too long; says how it ended.
    """
    with tempfile.TemporaryDirectory(prefix="ingot-gate-") as scratch:
        folder = Path(scratch)
        (folder / "manifest.json").write_text(manifest.to_json())
        request = {
            "root": str(root), "manifest": str(folder / "manifest.json"), "pairs": pairs,
            "sequences": tokens.sequences, "prompts": tokens.prompts,
        }  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request))
        run_child("ingot.runtime.replay", str(folder / "request.json"), str(folder / "result.npz"))
        with np.load(folder / "result.npz", allow_pickle=False) as arrays:
            return [[arrays[f"{p}.{s}"] for s in range(len(tokens.sequences))] for p in range(len(pairs))]


def run_child(module: str, *args: str) -> str:
    """Run a module of the runtime in a process of its own; returns what it printed.

    Raises:
        ResourceError: it crashed (names the signal), failed, or took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *args], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            "the finished engines hang", f"no answer in {_TIMEOUT_S} s", "report this with the recipe"
        ) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        how = f"it was killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else last[0]
        raise ResourceError(
            "the finished engines do not run in a lean process",
            how,
            "see report/build.log; --debug shows the whole output",
        )
    return done.stdout


@dataclass(frozen=True)
class GateResult:
    """The gate's judgement, as it goes into manifest and report."""

    report: dict[str, Any]
    failures: list[tuple[str, str]]  # (engine pair, what fell short)

    @property
    def passed(self) -> bool:
        """Whether every engine kept its budget."""
        return not self.failures


def judge(
    recipe: Recipe,
    pairs: Sequence[tuple[str, str]],
    logits: Sequence[list[np.ndarray]],
    reference: list[np.ndarray],
    eager: list[np.ndarray] | None,
    tokens: GateTokens,
) -> GateResult:
    """Compare each pair's logits with the reference.

    Args:
        reference: float32 eager logits; eager: those of the recipe's own dtype where that is narrower.
    """
    budget = budget_for(recipe)
    own = compare(reference, eager) if eager is not None else None
    whole_pairs: list[dict[str, Any]] = []
    engines: dict[str, dict[str, Any]] = {}
    failures: list[tuple[str, str]] = []
    for (prefill, decode), found in zip(pairs, logits):
        whole = compare(reference, found)
        parts = {"prefill": compare([r[:1] for r in reference], [f[:1] for f in found])}
        if any(len(r) > 1 for r in reference):
            rest = [i for i, r in enumerate(reference) if len(r) > 1]
            parts["decode"] = compare([reference[i][1:] for i in rest], [found[i][1:] for i in rest])
        whole_pairs.append({"prefill": prefill, "decode": decode, **whole.to_dict()})
        for phase, part in parts.items():
            engine = prefill if phase == "prefill" else decode
            worst = engines.get(engine)
            if worst is None or part.max_relative_error >= (worst["max_relative_error"] or 0.0):
                engines[engine] = part.to_dict()
            # KL and top-1 are judged over all positions: a share of few prompts says little.
            failures += [(engine, m) for m in Budget(budget.max_relative_error).shortfalls(part, None)]
        overall = Budget(None, budget.mean_kl, budget.top1).shortfalls(whole, own)
        failures += [(f"{prefill} + {decode}", m) for m in overall if whole.finite]
    report = {
        "reference": "transformers eager float32",
        "budget": {k: v for k, v in budget.__dict__.items() if v is not None},
        "eager": own.to_dict() if own else None,
        "engines": engines,
        "pairs": whole_pairs,
        "sequences": [len(s) for s in tokens.sequences],
        "prompts": tokens.prompts,
        "passed": not failures,
        "failures": [f"{engine}: {what}" for engine, what in failures],
    }
    return GateResult(report, failures)


def reference_logits(config: dict[str, Any], load: Callable[[str], Any], tokens: GateTokens) -> list[np.ndarray]:
    """Eager logits in float32."""
    return ReferenceModel(config, "float32", load).logits(tokens.sequences, tokens.firsts)


def eager_logits(
    config: dict[str, Any], recipe: Recipe, load: Callable[[str], Any], tokens: GateTokens
) -> list[np.ndarray] | None:
    """Eager logits in the recipe's dtype, where that is narrower than the reference and nothing is quantized.

    What rounding alone does to the model: an engine that is as close to float32 as this is as good as it can be.
    """
    if recipe.model.dtype == "float32" or recipe.quantization.scheme != "none":
        return None
    return ReferenceModel(config, recipe.model.dtype, load).logits(tokens.sequences, tokens.firsts)
