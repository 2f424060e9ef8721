"""`ingot compare`: several artifacts of one model side by side: size, memory, speed, and what each lost.

Accuracy is what each build has measured and recorded. Speed is measured now, turn and turn about: in every round each
artifact runs once in a process of its own, so that a machine growing slower hits all of them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts.errors import UsageError
from ..artifacts.manifest import Manifest
from ..artifacts.store import OpenArtifact, open_artifact
from ..artifacts.target import check_target
from . import accuracy_facts
from .console import size_text
from .lean_child import ask_child

Say = Callable[[str], None]


@dataclass
class Row:
    """One artifact. Bytes, tokens per second (one sample per round), and the figures of its accuracy report.

    Attributes:
        memory_bytes: weights, the largest engine's memory and the KV cache of one sequence of full length.
        peak_bytes: of the process that measured the speed, where it was measured.
        notes: what a reader must know about the figures.
    """

    name: str
    path: str
    digest: str
    scheme: str
    device: str
    total_bytes: int
    weights_bytes: int
    memory_bytes: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """All rows, and what speed was measured on: `prompt` tokens, `tokens` decoded, `rounds` (0: not at all)."""

    model: str
    prompt: int
    tokens: int
    rounds: int
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the medians beside the samples."""
        data = asdict(self)
        for row, entry in zip(self.rows, data["rows"]):
            for name in ("prefill", "decode", "load_s"):
                entry[f"{name}_median"] = median(getattr(row, name))
        return data


def compare(
    paths: Sequence[Path],
    *,
    rounds: int = 5,
    prompt: int | None = None,
    tokens: int | None = None,
    other_weights: bool = False,
    trust: Sequence[str] | None = None,
    say: Say = lambda text: None,
) -> Comparison:
    """Open and check the artifacts and measure their speed.

    Args:
        other_weights: compare also what was built from different checkpoints of one architecture and tokenizer.
        rounds: how often each is measured; 0 measures no speed. prompt, tokens: sizes of the tests; None takes what
            fits all of them: a prompt of up to 512 tokens, and up to 64 tokens to decode.
        trust: whose code may run, as in `LLM`.

    Raises:
        UsageError: fewer than two artifacts, or they are not of one model and tokenizer.
        VerificationError, ResourceError: one is not intact, or does not run.
    """
    if len(paths) < 2:
        raise UsageError("ingot compare needs two artifacts or more", f"{len(paths)} given", "name all of them")
    artifacts = [open_artifact(path, verify="sizes") for path in paths]
    for path, artifact in zip(paths[1:], artifacts[1:]):
        _same_model(str(paths[0]), artifacts[0].manifest, str(path), artifact.manifest, other_weights)
    longest = min(artifact.manifest.model.max_length for artifact in artifacts)
    sizes = {"prompt": prompt or max(1, min(512, longest // 2)), "tokens": tokens or max(1, min(64, longest // 4))}
    if max(sizes["prompt"], min(16, sizes["prompt"]) + sizes["tokens"]) + 1 > longest:
        why = f"the artifacts take {longest} tokens, prompt and output together"
        raise UsageError(f"tests of {sizes['prompt']} and {sizes['tokens']} tokens do not fit", why, "ask for fewer")
    rows = [_row(str(path), artifact) for path, artifact in zip(paths, artifacts)]
    _name(rows, paths)
    _note_differences(rows, [artifact.manifest for artifact in artifacts])
    running = [(row, a) for row, a in zip(rows, artifacts) if _runs_here(row, a.manifest)] if rounds else []
    for turn in range(rounds):
        for row, artifact in running:
            say(f"round {turn + 1} of {rounds}: {row.name}")
            _measure(row, artifact, sizes, trust)
    model = artifacts[0].manifest.model
    return Comparison(f"{model.architecture}, {model.num_layers} layers", **sizes, rounds=rounds, rows=rows)


def _same_model(first: str, a: Manifest, other: str, b: Manifest, other_weights: bool) -> None:
    """Raise UsageError unless two artifacts can be told apart by what was done to one model alone."""

    def refuse(why: str, fix: str) -> UsageError:
        return UsageError(f"{first} and {other} are not of one model", why, fix)

    for key in ("architecture", "model_type", "vocab_size", "hidden_size", "num_layers"):
        one, two = getattr(a.model, key), getattr(b.model, key)
        if one != two:
            raise refuse(f"{key} is {one} in the one, {two} in the other", "compare artifacts of one model")
    if _digest_of(a, "tokenizer.json") != _digest_of(b, "tokenizer.json"):
        raise refuse("their tokenizers differ, so that a token is not the same text", "compare artifacts of one model")
    one, two = a.recipe.get("weights_digest"), b.recipe.get("weights_digest")
    if one != two and not other_weights:
        raise refuse(
            f"they were built from different weights ({str(one)[:12]} and {str(two)[:12]}), so that what each lost is"
            " lost against another reference",
            "build both from one checkpoint, or pass --other-weights to compare them all the same",
        )


def _digest_of(manifest: Manifest, path: str) -> str:
    return next((entry.sha256 for entry in manifest.files if entry.path == path), "")


def _row(path: str, artifact: OpenArtifact) -> Row:
    manifest = artifact.manifest
    sizes = {entry.path: entry.size for entry in manifest.files}
    weights = sum(sizes[name] for name in manifest.weights)
    engines = max((engine.memory_bytes for engine in manifest.engines), default=0)
    memory = weights + engines + cache_bytes_per_block(manifest) * manifest.kv_cache.max_blocks
    report = accuracy_facts.accuracy_of(manifest.gate)
    row = Row(
        manifest.name, path, manifest.digest(), str(report.get("scheme", "?")) if report else manifest.model.dtype,
        manifest.target.device, sum(sizes.values()), weights, memory,
        accuracy=accuracy_facts.headline(manifest.gate),
    )  # fmt: skip
    if report is None and "mean_kl" in row.accuracy:
        row.notes.append("lossless: KL and top-1 are of the numeric gate's tokens")
    return row


def cache_bytes_per_block(manifest: Manifest) -> int:
    """Bytes a block of the KV cache takes over all layers, scales included."""
    cache = manifest.kv_cache
    return sum(map(cache.token_bytes, cache.layers)) * cache.block_size


def _name(rows: Sequence[Row], paths: Sequence[Path]) -> None:
    """Names that differ: the artifacts' own, else their folders', else their whole paths."""
    for names in ([row.name for row in rows], [path.resolve().name for path in paths], [row.path for row in rows]):
        if len(set(names)) == len(names) or names == [row.path for row in rows]:
            for row, name in zip(rows, names):
                row.name = name
            return


def _note_differences(rows: Sequence[Row], manifests: Sequence[Manifest]) -> None:
    """Say where figures do not measure the same: against the first artifact that has them."""
    reports = [accuracy_facts.accuracy_of(manifest.gate) for manifest in manifests]
    digests = [report.get("tokens_digest") if report else None for report in reports]
    first = next((digest for digest in digests if digest is not None), None)
    for row, digest, manifest in zip(rows, digests, manifests):
        if digest not in (None, first):
            row.notes.append("its accuracy was measured on another text")
        if manifest.recipe.get("weights_digest") != manifests[0].recipe.get("weights_digest"):
            row.notes.append("built from other weights: its loss is against these")


def _runs_here(row: Row, manifest: Manifest) -> bool:
    reasons = check_target(manifest.target)
    row.notes += [f"no speed: it does not fit this machine ({reason})" for reason in reasons]
    return not reasons


def _measure(row: Row, artifact: OpenArtifact, sizes: dict[str, int], trust: Sequence[str] | None) -> None:
    asked: dict[str, Any] = {"artifact": str(artifact.root), "vocabulary": artifact.manifest.model.vocab_size, **sizes}
    asked["trust"] = None if trust is None else list(trust)
    found = ask_child("ingot.runtime.speed", asked)
    for name in ("prefill", "decode", "load_s"):
        getattr(row, name).append(found[name])
    row.peak_bytes = max(row.peak_bytes or 0, found["peak_bytes"] or 0) or None


def median(samples: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(samples) if samples else None


def table(result: Comparison) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows in words; columns that no artifact has anything in are left out."""
    names = ["", "scheme", "weights", "total", "memory", "peak", f"pp{result.prompt} tok/s", f"tg{result.tokens} tok/s",
             "mean KL", "top-1", "perplexity ratio", "task"]  # fmt: skip
    rows = [
        (
            row.name, row.scheme, size_text(row.weights_bytes), size_text(row.total_bytes),
            size_text(row.memory_bytes), size_text(row.peak_bytes) if row.peak_bytes else "",
            _rate(row.prefill), _rate(row.decode),
            accuracy_facts.written(row.accuracy, "mean_kl", "{:.2e}"),
            accuracy_facts.written(row.accuracy, "top1", "{:.2%}"),
            accuracy_facts.written(row.accuracy, "perplexity_ratio", "{:.4f}", "perplexity_ratio_error"),
            accuracy_facts.written(row.accuracy, "exact_match", "{:.1%}"),
        )
        for row in result.rows
    ]  # fmt: skip
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]
    return [names[i] for i in kept], [tuple(row[i] or "-" for i in kept) for row in rows]


def notes(result: Comparison) -> list[str]:
    """What stands below the table."""
    said = [f"{row.name}: {note}" for row in result.rows for note in row.notes]
    if result.rounds:
        said.append(f"speed: medians of {result.rounds} rounds, turn and turn about, batch 1, decoding from 16 tokens")
    said.append("memory: weights, engine memory and the KV cache of one full sequence; peak: of the measuring process")
    return said


def _rate(samples: Sequence[float]) -> str:
    value = median(samples)
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
