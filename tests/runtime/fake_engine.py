"""Engines in numpy whose tokens depend on everything the runner does, and the oracle that knows only the token list.

The "KV cache" stores tokens by slot; the logits are a hash of all that the block table shows up to the row's
position. A wrong block, position, chunk, padding or row changes the hash, and with it the tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from ingot.artifacts.manifest import Buffer, CacheLayer, EngineEntry, KVCache, Manifest, Model, Target
from ingot.artifacts.target import host_target
from ingot.runtime.engines.base import logits_of
from ingot.runtime.params import SamplingParams
from ingot.runtime.sampling import graph_parameters, sample_row, wrap_seed

VOCAB = 61
POISON = -7


def fake_logits(tokens: Sequence[int], vocab: int = VOCAB, scale: float = 4.0) -> np.ndarray:
    """The model: logits [vocab] float32 of the next token after `tokens`."""
    seed = zlib.crc32(np.asarray(tokens, np.int64).tobytes())
    return np.random.default_rng(seed).normal(0, scale, vocab).astype(np.float32)


def expected_tokens(prompt: Sequence[int], params: SamplingParams, count: int, seed: int | None = None) -> list[int]:
    """What a request without penalties gives alone, from the model and the sampler only."""
    tokens = list(prompt)
    seed = wrap_seed(params.seed or 0) if seed is None else seed
    for _ in range(count):
        tokens.append(sample_row(fake_logits(tokens), *graph_parameters(params, VOCAB), seed, len(tokens) - 1))
    return tokens[len(prompt) :]


class FakeEngine:
    """One engine; strict about what the protocol promises to it."""

    def __init__(self, entry: EngineEntry, group: FakeEngineGroup) -> None:
        self.entry = entry
        self._group = group
        self.calls = {"run": 0, "advance": 0}
        batch, length = entry.batch, entry.length
        # Poison: what the runner does not write must not matter.
        self._inputs: dict[str, np.ndarray] = {
            "tokens": np.full((batch, length), 5, np.int64),
            "positions": np.full((batch, length), 3, np.int64),
            "block_tables": np.full((batch, group.max_blocks), 1, np.int32),
            "temperature": np.full(batch, 9, np.float32),
            "top_p": np.full(batch, 0.5, np.float32),
            "min_p": np.full(batch, 0.5, np.float32),
            "top_k": np.full(batch, 2, np.int32),
            "seeds": np.full(batch, 77, np.int64),
        }
        if entry.phase == "prefill":
            self._inputs["last_index"] = np.zeros(1, np.int64)
        self._device: dict[str, np.ndarray] = {}
        self._results: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        return self._inputs

    @property
    def asynchronous(self) -> bool:
        return self._group.asynchronous

    def run(self) -> None:
        self.calls["run"] += 1
        # What the host writes from here on is for the next run.
        self._device = {name: array.copy() for name, array in self._inputs.items()}
        self._step()

    def advance(self) -> None:
        self.calls["advance"] += 1
        assert self.entry.phase == "decode" and self._group.last is self, "advance() only right after this engine"
        tokens, positions = self._device["tokens"], self._device["positions"]
        active = positions[:, 0] >= 0
        tokens[active, 0] = self._group.sampled[: len(active)][active]
        positions[active, 0] += 1
        self._step()

    def next_tokens(self) -> np.ndarray:
        assert self._group.last is self
        return self._group.sampled[: self.entry.batch]

    def sampled_logits(self) -> np.ndarray:
        assert self._group.last is self
        return logits_of(self._group.logits, self._group.sampled)[: self.entry.batch]

    def earlier(self) -> tuple[np.ndarray, np.ndarray]:
        assert self._group.last is self and self._group.asynchronous
        self._group.reads_ahead += 1
        return self._results[-2]

    def logits(self) -> np.ndarray:
        assert self._group.last is self
        return self._group.logits[: self.entry.batch]

    def _step(self) -> None:
        self._compute()
        found = self.next_tokens().copy(), self.sampled_logits().copy()
        self._results = [*self._results[-1:], found]

    def _compute(self) -> None:
        group, inputs, size = self._group, self._device, self._group.block_size
        group.last = self
        group.steps += 1
        if group.steps == group.fail_at:
            raise RuntimeError("the device is gone")
        # Results hold until the next run of any engine: they share one buffer.
        group.sampled[:], group.logits[:] = POISON, np.nan
        for row in range(self.entry.batch):
            table, positions = inputs["block_tables"][row], inputs["positions"][row]
            live = positions >= 0
            if not live.any():
                assert not table.any() and inputs["temperature"][row] == 0, (
                    "a padding row may touch only the null block"
                )
                group.cache[0] = POISON
                continue
            assert live[: live.sum()].all() and (np.diff(positions[live]) == 1).all(), "padding stands at the end"
            slots = table[positions[live] // size].astype(np.int64) * size + positions[live] % size
            assert (slots >= size).all(), "a token may not be written to the null block"
            group.cache[0] = POISON
            group.cache[slots] = inputs["tokens"][row][live]
        for row in range(self.entry.batch):
            column = int(inputs["last_index"][0]) if self.entry.phase == "prefill" else 0
            position = int(inputs["positions"][row, column])
            if position < 0:
                continue
            index = np.arange(position + 1)
            tokens = group.cache[inputs["block_tables"][row][index // size].astype(np.int64) * size + index % size]
            group.logits[row] = group.model(tokens)
            if np.isfinite(group.logits[row]).all():
                temperature, top_k = float(inputs["temperature"][row]), int(inputs["top_k"][row])
                top_p, min_p, seed = float(inputs["top_p"][row]), float(inputs["min_p"][row]), int(inputs["seeds"][row])
                group.sampled[row] = sample_row(group.logits[row], temperature, top_k, top_p, min_p, seed, position)
            else:
                group.sampled[row] = int(group.logits[row].argmax())


class FakeEngineGroup:
    """All engines of a manifest over one cache; the device breaks at step `fail_at`, `model` gives the logits.

    Asynchronous engines can be given a step before the results of the last one are read; `reads_ahead` counts these.
    """

    def __init__(self, manifest: Manifest, asynchronous: bool = False) -> None:
        self.asynchronous, self.reads_ahead = asynchronous, 0
        cache = manifest.kv_cache
        self.block_size, self.max_blocks, self.num_blocks = cache.block_size, cache.max_blocks, cache.num_blocks
        self.cache = np.full(cache.num_blocks * cache.block_size, POISON, np.int64)
        widest = max(entry.batch for entry in manifest.engines)
        self.sampled = np.zeros(widest, np.int64)
        self.logits = np.zeros((widest, manifest.model.vocab_size), np.float32)
        self.engines = {entry.name: FakeEngine(entry, self) for entry in manifest.engines}
        self.last: FakeEngine | None = None
        self.steps, self.fail_at, self.closed = 0, -1, 0
        self.model = lambda tokens: fake_logits(tokens, manifest.model.vocab_size)

    def close(self) -> None:
        self.closed += 1


def fake_manifest(
    max_length: int = 64,
    block_size: int = 4,
    num_blocks: int = 40,
    batches: Sequence[int] = (1, 4),
    chunks: Sequence[int] = (4, 8),
    vocab: int = VOCAB,
    file: str = "engines/fake.so",
) -> Manifest:
    """A manifest of fake engines for this machine, without files."""
    outputs = (Buffer("next_tokens", (1,), "int64"), Buffer("logits", (1, vocab), "float32"))
    shapes = [("decode", batch, 1) for batch in batches] + [("prefill", 1, chunk) for chunk in chunks]
    names = [f"decode-b{batch}" for batch in batches] + [f"prefill-c{chunk}" for chunk in chunks]
    engines = tuple(
        EngineEntry(name, "aoti", *shape, file, (), outputs, (), (), 0)
        for name, shape in zip(names, shapes, strict=True)
    )
    here = host_target()
    return Manifest(
        schema_version=2,
        name="fake",
        ingot_version="0.1.0",
        model=Model("Fake", "fake", vocab, max_length, "float32", 8, 1, 0),
        target=Target("cpu", here.system, here.machine, (), "none", ""),
        toolchain={},
        recipe={},
        kv_cache=KVCache(
            block_size, num_blocks, -(-max_length // block_size), "float32", (CacheLayer((1, 8), (1, 8), 0),)
        ),
        engines=engines,
        weights=(),
        passes=[],
        gate={},
        files=(),
    )
