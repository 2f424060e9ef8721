"""The numeric gate: every engine against eager Hugging Face on the same tokens, judged by budgets.

A child process loads the finished engines with the runtime alone and replays the gate's tokens; this process runs
transformers on them. What is recorded is what a user gets, not what the compiler believes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts.manifest import Manifest
from ..passes.quantize.schemes import SCHEMES
from .facts import BuildFacts
from .lean_child import run_child
from .metrics import Distance, Fidelity, compare
from .plan import Plan
from .recipe import Recipe
from .reference_model import ReferenceModel
from .tokenizer_check import load_tokenizer

_LONGEST_WINDOW = 1024


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

    def shortfalls(self, found: Distance | Fidelity, eager: Distance | Fidelity | None) -> list[str]:
        """Each metric that misses its budget, in words. Metrics no worse than `eager`, the model's own error, pass."""
        if not found.finite:
            return ["some logits are not finite"]
        missed = []
        error = found.max_relative_error if isinstance(found, Distance) else 0.0
        if self.max_relative_error is not None and not error <= self.max_relative_error:
            missed.append(f"max relative error {error:.2e} > {self.max_relative_error:.2e}")
        if self.mean_kl is not None and not found.mean_kl <= max(self.mean_kl, eager.mean_kl if eager else 0.0):
            missed.append(f"mean KL {found.mean_kl:.2e} > {self.mean_kl:.2e}")
        if self.top1 is not None:
            floor = min(self.top1, _at_least(eager.top1, eager.tokens) if eager else 1.0)
            if found.top1 < floor:
                missed.append(f"top-1 agreement {found.top1:.2%} < {floor:.2%}")
        return missed


# By the bits of a weight or of the KV cache; the fewest decide.
_LOSSY = {8: Budget(mean_kl=0.005, top1=0.97), 4: Budget(mean_kl=0.05, top1=0.90)}


def _at_least(share: float, count: int) -> float:
    """The smallest share among `count` that is no evidence of being worse: two standard errors and one less."""
    return share - 2 * (share * (1 - share) / count) ** 0.5 - 1 / count


def budget_for(recipe: Recipe, activations: bool = False) -> Budget:
    """The recipe's budgets over the defaults for its dtype and scheme.

    Args:
        activations: the checkpoint asks for quantized activations. Its weights alone cost nothing: the reference has
            the same, made dense.
    """
    asked = recipe.gate.budgets
    bits = [SCHEMES[scheme].bits for scheme in recipe.quantization.schemes]
    bits += [8] if activations or recipe.shapes.kv_cache_dtype != "auto" else []
    if bits:
        base = _LOSSY[min(bits)]
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
    """The recipe's prompts as tokens, each followed by `gate.max_tokens` more, and one that crosses every edge.

    What follows a prompt is text of the other prompts: the gate compares logits on given tokens, it generates nothing.
    The last sequence is longer than every chunk, block and sliding window. Without a tokenizer ids are random, from
    the gate's seed.
    """
    limit, more = recipe.model.max_length, recipe.gate.max_tokens
    if encode is not None:
        starts = [ids for p in recipe.gate.prompts if (ids := encode(p)[: max(1, limit - more)])]
    else:
        rng = np.random.default_rng(recipe.gate.seed)
        starts = [rng.integers(0, vocabulary, 16 + 5 * i).tolist() for i in range(len(recipe.gate.prompts))]
        starts = [s[: max(1, limit - more)] for s in starts]
    starts = starts or [[0]]
    every = [t for s in starts for t in s]
    # Several times over: the windows of published models are longer than any prompt.
    # A window of thousands of tokens is not crossed: eager attention over so many would take longer than the build.
    longest = max(*recipe.shapes.prefill_lengths, window if window <= _LONGEST_WINDOW else 0)
    reach = min(limit, longest + recipe.shapes.kv_block_size + more)
    endless = every * (-(-(reach + more) // len(every)) + 1)
    sequences = [(s + endless[len(s) : len(s) + more])[:limit] for s in starts]
    prompts = [min(len(s), len(q) - 1) or 1 for s, q in zip(starts, sequences)]
    sequences.append(endless[:reach])
    prompts.append(max(1, reach - more))
    return GateTokens(sequences, prompts)


def plan_tokens(plan: Plan | BuildFacts, tokenizer: Path | None) -> GateTokens:
    """`gate_tokens` of a plan; `tokenizer` is its model's tokenizer.json, checked before, where there is one."""
    window = max((layer.window for layer in plan.cache_layers), default=0)
    if tokenizer is None:
        return gate_tokens(plan.recipe, None, plan.vocabulary, window)
    loaded = load_tokenizer(tokenizer)
    return gate_tokens(plan.recipe, lambda text: list(loaded.encode(text).ids), plan.vocabulary, window)


def engine_pairs(recipe: Recipe) -> list[tuple[str, str]]:
    """Prefill and decode engines to run together, so that every engine runs at least once."""
    prefill = [e.name for e in recipe.engines() if e.phase == "prefill"]
    decode = [e.name for e in recipe.engines() if e.phase == "decode"]
    return [(prefill[i % len(prefill)], decode[i % len(decode)]) for i in range(max(len(prefill), len(decode)))]


def replay_in_child(
    root: Path, manifest: Manifest, pairs: Sequence[tuple[str, str]], tokens: GateTokens
) -> list[list[tuple[int, np.ndarray]]]:
    """Logits of every pair of engines from a lean process: per row the sequence's number and its logits.

    The arrays are maps of files that are gone with them.

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
        run_child("ingot.runtime.replay", str(folder / "request.json"), str(folder / "result"))
        found = []
        for pair in range(len(pairs)):
            files = sorted((folder / "result").glob(f"{pair}.*.npy"))
            arrays = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
            found.append([(int(file.name.split(".")[1]), array) for file, array in zip(files, arrays)])
        return found


@dataclass(frozen=True)
class GateResult:
    """The gate's judgement, as it goes into manifest and report.

    Attributes:
        failures: (engine or pair of engines, what fell short).
        failed_pair: the first pair of engines that fell short; worst: the number of its worst sequence.
    """

    report: dict[str, Any]
    failures: list[tuple[str, str]]
    failed_pair: tuple[str, str] | None = None
    worst: int = 0

    @property
    def passed(self) -> bool:
        """Whether every engine kept its budget."""
        return not self.failures


def judge(
    recipe: Recipe,
    pairs: Sequence[tuple[str, str]],
    logits: Sequence[list[tuple[int, np.ndarray]]],
    reference: list[np.ndarray],
    eager: list[np.ndarray] | None,
    tokens: GateTokens,
    activations: bool = False,
) -> GateResult:
    """Compare each pair's logits with the reference.

    Args:
        reference: float32 eager logits; eager: those of the recipe's own dtype where that is narrower.
        activations: as `budget_for` takes it.
    """
    budget = budget_for(recipe, activations)
    own = compare(reference, eager) if eager is not None else None
    whole_pairs: list[dict[str, Any]] = []
    engines: dict[str, Distance] = {}
    failures: list[tuple[str, str]] = []
    failed_pair, worst_sequence = None, 0
    for (prefill, decode), rows in zip(pairs, logits):
        wanted, found = [reference[i] for i, _ in rows], [values for _, values in rows]
        whole = compare(wanted, found)
        parts = {"prefill": compare([w[:1] for w in wanted], [f[:1] for f in found])}
        if any(len(w) > 1 for w in wanted):
            more = [(w[1:], f[1:]) for w, f in zip(wanted, found) if len(w) > 1]
            parts["decode"] = compare([w for w, _ in more], [f for _, f in more])
        whole_pairs.append({"prefill": prefill, "decode": decode, **whole.to_dict()})
        for phase, part in parts.items():
            engine = prefill if phase == "prefill" else decode
            worst = engines.get(engine)
            if worst is None or not part.max_relative_error < worst.max_relative_error:
                engines[engine] = part
            # KL and top-1 are judged over all positions: a share of few prompts says little.
            failures += [(engine, m) for m in Budget(budget.max_relative_error).shortfalls(part, None)]
        overall = Budget(None, budget.mean_kl, budget.top1).shortfalls(whole, own)
        failures += [(f"{prefill} + {decode}", m) for m in overall if whole.finite]
        if failures and failed_pair is None:
            failed_pair = (prefill, decode)
            off = [compare([w], [f]).max_relative_error for w, f in zip(wanted, found)]
            worst_sequence = rows[int(np.argmax(off))][0]
    report = {
        "reference": "transformers eager float32",
        "budget": {k: v for k, v in budget.__dict__.items() if v is not None},
        "eager": own.to_dict() if own else None,
        "engines": {name: part.to_dict() for name, part in engines.items()},
        "pairs": whole_pairs,
        "sequences": [len(s) for s in tokens.sequences],
        "prompts": tokens.prompts,
        "passed": not failures,
        "failures": [f"{engine}: {what}" for engine, what in failures],
    }
    return GateResult(report, failures, failed_pair, worst_sequence)


def reference_logits(
    config: dict[str, Any], load: Callable[[str], Any], tokens: GateTokens, device: str = "cpu"
) -> list[np.ndarray]:
    """Eager logits in float32, computed on `device`."""
    return ReferenceModel(config, "float32", load, device).logits(tokens.sequences, tokens.firsts)


def eager_logits(
    config: dict[str, Any], recipe: Recipe, load: Callable[[str], Any], tokens: GateTokens
) -> list[np.ndarray] | None:
    """Eager logits in the recipe's dtype, where that is narrower than the reference and nothing is quantized.

    What rounding alone does to the model: an engine that is as close to float32 as this is as good as it can be.
    """
    if recipe.model.dtype == "float32" or recipe.quantization.active or recipe.shapes.kv_cache_dtype != "auto":
        return None
    model = ReferenceModel(config, recipe.model.dtype, load, recipe.target.device)
    return model.logits(tokens.sequences, tokens.firsts)
