"""Where an engine's inputs and outputs lie in device memory, and how much of it an engine takes.

The compiler uses it too: `engine_memory_bytes` is what the manifest says of a plan engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...artifacts.kernel_plan import ALIGNMENT
from ...artifacts.manifest import Buffer, KVCache
from ..weights import ITEM_BYTES

# What the host reads after every step. Kernels write it straight into host memory, so that no copy is needed.
RESULTS = ("next_tokens", "sampled_logits")


@dataclass(frozen=True)
class Place:
    """A buffer in a block of memory: offset and size in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Block:
    """Buffers laid out one after the other, each at a multiple of ALIGNMENT."""

    places: dict[str, Place]
    nbytes: int


def is_cache(name: str) -> bool:
    """Whether an engine's input is a layer's keys or values."""
    return "_cache_" in name


def aligned(nbytes: int) -> int:
    """Rounded up to the alignment of buffers."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def buffer_bytes(buffer: Buffer) -> int:
    """What a buffer's elements take."""
    return math.prod(buffer.shape) * ITEM_BYTES[buffer.dtype]


def lay_out(buffers: Iterable[Buffer]) -> Block:
    """Place buffers in their order."""
    places, offset = {}, 0
    for buffer in buffers:
        places[buffer.name] = Place(offset, buffer_bytes(buffer))
        offset += aligned(places[buffer.name].nbytes)
    return Block(places, offset)


def lay_out_inputs(inputs: Iterable[Buffer]) -> Block:
    """The inputs that are copied from the host: all but the cache."""
    return lay_out(buffer for buffer in inputs if not is_cache(buffer.name))


def lay_out_outputs(outputs: Iterable[Buffer]) -> Block:
    """The outputs that stay on the device: all but `RESULTS`."""
    return lay_out(buffer for buffer in outputs if buffer.name not in RESULTS)


def lay_out_results(outputs: Iterable[Buffer]) -> Block:
    """The outputs in host memory, `RESULTS`, for one step."""
    return lay_out(buffer for buffer in outputs if buffer.name in RESULTS)


def engine_memory_bytes(inputs: Iterable[Buffer], outputs: Iterable[Buffer], arena_bytes: int) -> int:
    """The device memory of one plan engine alone: arena, inputs and logits, without weights and cache."""
    return aligned(arena_bytes) + lay_out_inputs(inputs).nbytes + lay_out_outputs(outputs).nbytes


def cache_buffers(cache: KVCache, num_blocks: int) -> tuple[Buffer, ...]:
    """Keys and values of every layer as buffers of `num_blocks` blocks; of a quantized cache also their scales."""
    made = []
    for index, layer in enumerate(cache.layers):
        for kind, (heads, dim) in (("k", layer.key), ("v", layer.value)):
            tokens = (num_blocks, cache.block_size, heads)
            made.append(Buffer(f"{kind}_cache_{index}", (*tokens, dim), cache.dtype))
            if cache.scaled:
                made.append(Buffer(f"{kind}_scale_cache_{index}", tokens, "float32"))
    return tuple(made)
