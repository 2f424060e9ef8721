"""Replays given tokens through an artifact's engines and collects their logits: what the numeric gate measures.

Run as `python -m ingot.runtime.replay REQUEST.json FOLDER` in a process of its own, it is also the proof that a lean
process can load and run every engine: a crash there is reported by the build, not met by a user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..artifacts.errors import VerificationError
from ..artifacts.manifest import KVCache, Manifest
from ..artifacts.store import OpenArtifact
from .child import serve
from .engines.base import Engine


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode engine that work together on one group of sequences."""

    prefill: str
    decode: str


def _sampling(engine: Engine) -> None:
    """Greedy rows, no owner."""
    inputs = engine.inputs
    for name in ("temperature", "min_p", "top_k", "seeds", "tokens", "block_tables"):
        inputs[name][...] = 0
    inputs["top_p"][...] = 1
    inputs["positions"][...] = -1


def _greedy(engine: Engine, row: int) -> np.ndarray:
    """A row's logits, after checking that the token the engine sampled from them is the likeliest."""
    logits = engine.logits()[row]
    sampled = int(engine.next_tokens()[row])
    if np.isfinite(logits).all() and sampled != int(logits.argmax()):
        raise VerificationError(
            f"engine {engine.entry.name} sampled token {sampled}, the likeliest is {int(logits.argmax())}",
            "its sampler disagrees with its own logits",
            "report this with the recipe",
        )
    return logits


def _groups(count: int, rows: int, needs: Sequence[int], blocks: int) -> list[list[int]]:
    """Which sequences run together: as many as there are rows, repeated until all rows are used, within the blocks."""
    groups: list[list[int]] = [[]]
    held = 0
    for number in range(max(count, rows)):
        index = number % count
        if len(groups[-1]) == rows or (groups[-1] and held + needs[index] > blocks):
            if number >= count:
                break
            groups.append([])
            held = 0
        groups[-1].append(index)
        held += needs[index]
    return groups


def replay(
    engines: Mapping[str, Engine],
    cache: KVCache,
    pair: Pair,
    sequences: Sequence[Sequence[int]],
    prompts: Sequence[int],
) -> list[np.ndarray]:
    """Logits of the engines on given tokens, each prompt in chunks, the rest one token a step in one batch.

    Args:
        sequences: token ids; prompts: how many of each are prefilled. At most as many as the decode engine has rows.

    Returns:
        Per sequence float32 [1 + len(sequence) - prompt, vocabulary]: after the prompt, and after each further token.
    """
    prefill, decode = engines[pair.prefill], engines[pair.decode]
    # Rows take their blocks from the end and the start in turn: neighbours in a batch are no neighbours in memory.
    free = list(range(1, cache.num_blocks))
    tables = []
    for row, sequence in enumerate(sequences):
        need = -(-len(sequence) // cache.block_size)
        if need > len(free):
            raise ValueError(f"{len(sequences)} sequences need more blocks than the cache has")
        taken = free[:need] if row % 2 else free[::-1][:need]
        free = [b for b in free if b not in set(taken)]
        tables.append(taken)
    found: list[list[np.ndarray]] = []
    _sampling(prefill)
    length = prefill.entry.length
    for sequence, prompt, table in zip(sequences, prompts, tables):
        prefill.inputs["block_tables"][0] = 0
        prefill.inputs["block_tables"][0, : len(table)] = table
        for start in range(0, prompt, length):
            piece = sequence[start : min(start + length, prompt)]
            prefill.inputs["tokens"][0] = 0
            prefill.inputs["tokens"][0, : len(piece)] = piece
            prefill.inputs["positions"][0] = -1
            prefill.inputs["positions"][0, : len(piece)] = np.arange(start, start + len(piece))
            prefill.inputs["last_index"][0] = len(piece) - 1
            prefill.run()
        found.append([_greedy(prefill, 0).copy()])
    _sampling(decode)
    for row, table in enumerate(tables):
        decode.inputs["block_tables"][row, : len(table)] = table
    steps = max((len(s) - p for s, p in zip(sequences, prompts)), default=0)
    for step in range(steps):
        for row, (sequence, prompt) in enumerate(zip(sequences, prompts)):
            live = prompt + step < len(sequence)
            decode.inputs["positions"][row, 0] = prompt + step if live else -1
            decode.inputs["tokens"][row, 0] = sequence[prompt + step] if live else 0
            if not live:
                decode.inputs["block_tables"][row] = 0
        decode.run()
        for row, (sequence, prompt) in enumerate(zip(sequences, prompts)):
            if prompt + step < len(sequence):
                found[row].append(_greedy(decode, row).copy())
    return [np.stack(rows) for rows in found]


def main(request: str, result: str) -> None:
    """Serve one request: {"root", "manifest", "pairs", "sequences", "prompts"} -> "<pair>.<sequence>.<copy>.npy" each.

    Logits of a large vocabulary are gigabytes: each group's are written before the next one runs.
    """
    from .loader import load_engines

    asked = json.loads(Path(request).read_text())
    manifest = Manifest.from_json(Path(asked["manifest"]).read_bytes())
    artifact = OpenArtifact(Path(asked["root"]), manifest)
    group = load_engines(artifact)
    folder = Path(result)
    folder.mkdir()
    sequences, prompts = asked["sequences"], asked["prompts"]
    cache = replace(manifest.kv_cache, num_blocks=group.num_blocks)
    needs = [-(-len(s) // cache.block_size) for s in sequences]
    for number, names in enumerate(asked["pairs"]):
        pair = Pair(*names)
        rows = group.engines[pair.decode].entry.batch
        copies = [0] * len(sequences)
        for indices in _groups(len(sequences), rows, needs, cache.num_blocks - 1):
            logits = replay(group.engines, cache, pair, [sequences[i] for i in indices], [prompts[i] for i in indices])
            for index, values in zip(indices, logits):
                np.save(folder / f"{number}.{index}.{copies[index]}.npy", values)
                copies[index] += 1
    group.close()


if __name__ == "__main__":
    serve(main)
