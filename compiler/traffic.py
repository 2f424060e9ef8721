"""How many bytes a decode step has to read, and how much a prefill has to compute: the useful work of every share.

Counted from the manifest and the weights' shapes, not measured. A table that a step only looks up (an embedding that
is not also the LM head, a table over positions) counts with one row. For mixtures of experts this is an upper bound:
all experts are counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..artifacts.errors import VerificationError
from ..artifacts.manifest import EngineEntry, KVCache, Manifest
from ..runtime.weights import ITEM_BYTES

Facts = tuple[tuple[int, ...], str]  # a tensor's shape and dtype
# Tables looked up by token or position; GPT-NeoX calls its LM head embed_out.
_TABLE = re.compile(r"embed(?!_out)|wte|wpe|^positions_")
# What a quantized weight has beside its values: read with them, multiplied with nothing.
_BESIDE = re.compile(r"__(scale|zero)$")


@dataclass
class Traffic:
    """Bytes a decode step of one row must read: weights in full, rows of tables, the KV cache (mean over the run)."""

    weights: int = 0
    rows: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.rows + self.cache


def tensor_bytes(facts: Facts) -> int:
    """The size of a tensor."""
    shape, dtype = facts
    return math.prod(shape) * ITEM_BYTES[dtype]


def decode_engine(manifest: Manifest) -> EngineEntry:
    """The decode engine of the smallest batch. Raises VerificationError if there is none."""
    engines = [e for e in manifest.engines if e.phase == "decode"]
    if not engines:
        raise VerificationError(f"{manifest.name} has no decode engine", "it cannot generate", "build it again")
    return min(engines, key=lambda e: e.batch)


def looked_up(names: Sequence[str], tensors: Mapping[str, Facts], vocab_size: int) -> set[str]:
    """Those weights of which a step reads one row per token.

    An embedding is one unless it is the only matrix with a row per token of the vocabulary: then it is tied, and the LM
    head reads it in full. One that is packed for products is the LM head's, too.
    """
    found = [n for n in names if len(tensors[n][0]) >= 2]
    matrices = [n for n in found if not _BESIDE.search(n) and not n.endswith("__packed")]
    vocabulary = [n for n in matrices if tensors[n][0][0] == vocab_size]
    tables = {n for n in matrices if _TABLE.search(n) and vocabulary != [n]}
    beside = {n for n in names if _BESIDE.search(n) and any(t.startswith(_BESIDE.sub("__", n)) for t in tables)}
    return tables | beside


def cache_bytes(cache: KVCache, contexts: Sequence[int]) -> int:
    """Mean bytes of keys and values that a step reads, over steps that see `contexts` tokens (their own included)."""
    if not contexts:
        return 0
    total = 0
    for layer in cache.layers:
        total += cache.token_bytes(layer) * sum(min(c, layer.window) if layer.window else c for c in contexts)
    return round(total / len(contexts))


def step_bytes(manifest: Manifest, tensors: Mapping[str, Facts], contexts: Sequence[int], batch: int = 1) -> Traffic:
    """Bytes that a decode step of `batch` rows reads: the weights once, rows of tables and the cache for each row.

    Args:
        tensors: shape and dtype of every tensor in the weights files, by name.
        contexts: for each step of the run, how many tokens the attention of a row sees.

    Raises:
        VerificationError: no decode engine, or it binds a weight that the files do not hold.
    """
    names = _bound(manifest, tensors)
    tables = looked_up(names, tensors, manifest.model.vocab_size)
    rows = 0
    for name in tables:
        shape = tensors[name][0]
        # Position tables may carry leading dimensions of 1.
        rows += tensor_bytes(tensors[name]) // next((n for n in shape if n > 1), 1)
    weights = sum(tensor_bytes(tensors[n]) for n in names if n not in tables)
    return Traffic(weights, batch * rows, batch * cache_bytes(manifest.kv_cache, contexts))


def prefill_flops(manifest: Manifest, tensors: Mapping[str, Facts], tokens: int, query_heads: int) -> int:
    """Operations that a prompt of so many tokens takes up to its first token, a multiply-add being two.

    Every matrix over every token, but the LM head over the last token alone, and attention over the pairs of tokens
    that see each other, within a window where there is one. Raises VerificationError as `step_bytes`.
    """
    names = _bound(manifest, tensors)
    tables = looked_up(names, tensors, manifest.model.vocab_size)
    total = 0
    for name in names:
        shape = tensors[name][0]
        if len(shape) >= 2 and name not in tables and not _BESIDE.search(name):
            values = math.prod(shape) * (2 if name.endswith(("__int4", "__halves")) else 1)  # two of them in a byte
            total += 2 * values * (1 if shape[0] == manifest.model.vocab_size else tokens)
    for layer in manifest.kv_cache.layers:
        window = min(layer.window or tokens, tokens)
        pairs = window * (window + 1) // 2 + (tokens - window) * window
        total += 2 * query_heads * (layer.key[1] + layer.value[1]) * pairs
    return total


def _bound(manifest: Manifest, tensors: Mapping[str, Facts]) -> list[str]:
    """The weights that decoding binds, each once."""
    names = sorted({c.weight for c in decode_engine(manifest).constants})
    if missing := [n for n in names if n not in tensors]:
        raise VerificationError(
            f"{manifest.name} lacks {missing[0]!r}", "an engine binds that weight", "build it again"
        )
    return names
