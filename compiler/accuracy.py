"""The accuracy report: what a lossy build costs, on a text, against eager Hugging Face, in llama.cpp's measures.

The numeric gate asks of every engine whether it is right, on few tokens. This asks of the whole artifact how much was
lost, on thousands of positions, with standard errors. It runs after the gate, wherever the build is lossy: weights or
cache in fewer bits, or a dtype narrower than float32.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts.errors import UsageError
from ..artifacts.manifest import Manifest
from ..passes.quantize.schemes import SCHEMES
from .cache.inputs import ACCURACY_TEXT
from .facts import BuildFacts
from .gate import Budget, GateTokens, budget_for, replay_in_child
from .metrics import Fidelity, FidelityMeter
from .plan import Plan
from .recipe import Recipe
from .recipe_parse import read_text
from .reference_model import ReferenceModel
from .tokenizer_check import load_tokenizer

_TOKENS, _TOKENS_SLOW, _SLOW_PARAMETERS = 2048, 512, 250_000_000  # unless the recipe says how many
_WINDOW = 512
_REFERENCE_BYTES = 1 << 28  # logits of the reference that are held at once
_BUCKETS = 8  # of positions in a window
_WORST = 10
Load = Callable[[str], Any]


@dataclass(frozen=True)
class Windows:
    """A text cut into windows: the first `prompts[i]` tokens of each are context, every further one is predicted.

    Attributes:
        source: where the text is from, in words.
    """

    source: str
    sequences: list[list[int]]
    prompts: list[int]

    @property
    def positions(self) -> int:
        """How many tokens are predicted."""
        return sum(len(s) - p for s, p in zip(self.sequences, self.prompts))

    @property
    def digest(self) -> str:
        """Equal for equal tokens: figures over different ones cannot be compared."""
        return hashlib.sha256(json.dumps([self.sequences, self.prompts]).encode()).hexdigest()


def scheme(recipe: Recipe) -> str:
    """What the numbers are kept in: the dtype, or the groups, as in "W4A16 g32 rtn + W8A16, int8 KV cache"."""
    words = []
    for group in recipe.quantization.active:
        if group.scheme == "none":
            continue
        parts: list[str] = [group.scheme]
        if SCHEMES[group.scheme].grouped:
            parts += [f"g{group.group_size}" if group.group_size else "per channel", group.algorithm]
            parts += [] if group.symmetric else ["asymmetric"]
        words.append(" ".join(parts))
    weights, cache = " + ".join(dict.fromkeys(words)) or recipe.model.dtype, recipe.shapes.kv_cache_dtype
    return weights if cache == "auto" else f"{weights}, {cache} KV cache"


def _kept_in(plan: Plan | BuildFacts) -> str:
    """`scheme`, behind what the checkpoint holds quantized already."""
    words = [f"{' '.join(plan.kept)} (checkpoint)"] if plan.kept else []
    if not words or plan.recipe.quantization.active:
        words.append(scheme(plan.recipe))
    return " + ".join(words)


def cut(source: str, ids: Sequence[int], lead: Sequence[int], positions: int, max_length: int) -> Windows:
    """Windows over `ids` that predict `positions` tokens of them, each once, or as many as there are.

    A window is 512 tokens or `max_length`. Its first eighth is context: `lead` (what the tokenizer puts before a text)
    and the tokens before those that are predicted.
    """
    window = min(_WINDOW, max_length)
    behind = max(window // 8 - len(lead), 0 if lead else 1)
    room = window - len(lead) - behind
    sequences, prompts = [], []
    for start in range(behind, min(behind + positions, len(ids)), max(room, 1)):
        piece = ids[start : min(start + room, behind + positions)]
        if piece:
            sequences.append([*lead, *ids[start - behind : start], *piece])
            prompts.append(len(lead) + behind)
    return Windows(source, sequences, prompts)


def tokens_wanted(recipe: Recipe, parameters: int) -> int:
    """How many tokens are predicted. On a CPU a large model would take minutes for as many as a small one."""
    if recipe.gate.accuracy_tokens is not None:
        return recipe.gate.accuracy_tokens
    return _TOKENS_SLOW if recipe.target.device == "cpu" and parameters > _SLOW_PARAMETERS else _TOKENS


def accuracy_windows(plan: Plan | BuildFacts, tokenizer: Path | None, parameters: int) -> Windows:
    """The recipe's text in windows; random tokens, from the gate's seed, where the model has no tokenizer.

    Raises:
        UsageError: the recipe's own text is too short to predict anything of.
    """
    recipe = plan.recipe
    wanted, longest = tokens_wanted(recipe, parameters), recipe.model.max_length
    if tokenizer is None:
        ids = np.random.default_rng(recipe.gate.seed).integers(0, plan.vocabulary, wanted + _WINDOW).tolist()
        return cut("random tokens", ids, [], wanted, longest)
    path = recipe.accuracy_path()
    loaded = load_tokenizer(tokenizer)
    loaded.no_truncation()
    probe = loaded.encode("a")
    lead = [i for i, _ in zip(probe.ids, _leading(probe.special_tokens_mask))]
    ids = loaded.encode(read_text(path or ACCURACY_TEXT), add_special_tokens=False).ids
    windows = cut(recipe.gate.accuracy_text or ACCURACY_TEXT.name, ids, lead, wanted, longest)
    if wanted and path is not None and not windows.positions:
        raise UsageError(
            f"gate.accuracy_text = {recipe.gate.accuracy_text!r} is too short",
            f"its {len(ids)} tokens leave none to predict behind a context of {min(_WINDOW, longest) // 8}",
            "name a longer text, or leave the key out for the bundled one",
        )
    return windows


def _leading(mask: Sequence[int]) -> Iterator[int]:
    for special in mask:
        if not special:
            return
        yield special


def measure(plan: Plan | BuildFacts, load: Load, root: Path, manifest: Manifest, windows: Windows) -> dict[str, Any]:
    """Run the artifact and eager transformers over the windows.

    Args:
        manifest: with the files as they stand; load: gives a stored weight by name.

    Returns:
        The report: what was measured on what, `engine` and (for narrow dtypes) `eager` as `Fidelity`, KL by position
        in the window, and the worst positions.
    """
    recipe = plan.recipe
    prefill = max(recipe.shapes.prefill_lengths)
    # As many rows as there are windows at most: rows that repeat a window would only cost time.
    rows = max((b for b in recipe.shapes.decode_batch_sizes if b <= len(windows.sequences)), default=None)
    pair = (f"prefill-c{prefill}", f"decode-b{rows or min(recipe.shapes.decode_batch_sizes)}")
    tokens = GateTokens(windows.sequences, windows.prompts)
    found: dict[int, np.ndarray] = {}
    for index, values in replay_in_child(root, manifest, [pair], tokens)[0]:
        found.setdefault(index, values)
    engine, eager = FidelityMeter(), FidelityMeter()
    narrow = recipe.model.dtype if recipe.model.dtype != "float32" else None
    models = [ReferenceModel(plan.config, dtype, load, recipe.target.device) for dtype in ("float32", narrow) if dtype]
    for group in _groups(windows, plan.vocabulary):
        sequences, firsts = [windows.sequences[i] for i in group], [tokens.firsts[i] for i in group]
        each = [model.logits(sequences, firsts) for model in models]
        for number, index in enumerate(group):
            following = windows.sequences[index][windows.prompts[index] :]
            reference = each[0][number][:-1]
            engine.add(reference, found[index][:-1], following)
            if narrow:
                eager.add(reference, each[1][number][:-1], following)
    return {
        "scheme": _kept_in(plan),
        "reference": "transformers eager float32",
        "text": windows.source,
        "tokens_digest": windows.digest,
        "positions": windows.positions,
        "windows": len(windows.sequences),
        "window": max(map(len, windows.sequences)),
        "engines": list(pair),
        "engine": engine.result().to_dict(),
        "eager": {"dtype": narrow, **eager.result().to_dict()} if narrow else None,
        "kl_by_position": _by_position(windows, engine.kl),
        "worst": _worst(windows, engine.kl),
    }


def _groups(windows: Windows, vocabulary: int) -> Iterator[list[int]]:
    """Windows whose reference logits are held together."""
    group: list[int] = []
    held = 0
    for index, sequence in enumerate(windows.sequences):
        size = len(sequence) * vocabulary * 4
        if group and held + size > _REFERENCE_BYTES:
            yield group
            group, held = [], 0
        group.append(index)
        held += size
    if group:
        yield group


def _by_position(windows: Windows, kl: np.ndarray) -> list[dict[str, float | int | None]]:
    """Mean KL by how far into its window a position lies: what a cache in fewer bits loses grows with the context."""
    places = np.concatenate([np.arange(p, len(s)) for s, p in zip(windows.sequences, windows.prompts)])
    edges = np.linspace(places.min(), places.max() + 1, min(_BUCKETS, len(set(places.tolist()))) + 1).astype(int)
    found: list[dict[str, float | int | None]] = []
    for low, high in itertools.pairwise(edges):
        inside = kl[(places >= low) & (places < high)]
        if len(inside):
            found.append({"from": int(low), "to": int(high), "count": len(inside), "mean_kl": _finite(inside.mean())})
    return found


def _worst(windows: Windows, kl: np.ndarray) -> list[dict[str, float | int | None]]:
    places = [(w, p) for w, s in enumerate(windows.sequences) for p in range(windows.prompts[w], len(s))]
    order = np.argsort(-kl, kind="stable")[:_WORST]
    return [{"window": places[i][0], "position": places[i][1], "kl": _finite(kl[i])} for i in order]


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def shortfalls(recipe: Recipe, report: dict[str, Any], activations: bool = False) -> list[str]:
    """What of the recipe's budgets the text shows to be missed, beyond two standard errors; nothing where it is kept.

    The gate has judged the engines by the same budgets to the letter, on fewer positions.
    """
    budget = budget_for(recipe, activations)
    found = report["engine"]
    if not found["finite"]:
        return ["some logits are not finite"]
    slack = Fidelity(**found)
    slack = Fidelity(**{
        **found, "mean_kl": slack.mean_kl - 2 * slack.mean_kl_error, "top1": slack.top1 + 2 * slack.top1_error
    })  # fmt: skip
    eager = Fidelity(**{k: v for k, v in report["eager"].items() if k != "dtype"}) if report["eager"] else None
    return Budget(None, budget.mean_kl, budget.top1).shortfalls(slack, eager)
