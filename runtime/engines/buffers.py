"""What an engine's inputs and outputs must be, from its shape and the cache: compared before anything native runs."""

from __future__ import annotations

from ...artifacts.errors import VerificationError
from ...artifacts.manifest import Buffer, EngineEntry, Manifest
from .plan_layout import cache_buffers

# What an engine may give besides what it must: the logit of each sampled token, [batch] float32.
OPTIONAL = "sampled_logits"


def expected_buffers(entry: EngineEntry, manifest: Manifest) -> tuple[set[Buffer], set[Buffer]]:
    """Inputs and outputs of an engine of this phase, batch and length over this cache; `OPTIONAL` if it lists that."""
    batch, length, cache = entry.batch, entry.length, manifest.kv_cache
    inputs = {
        Buffer("tokens", (batch, length), "int64"),
        Buffer("positions", (batch, length), "int64"),
        Buffer("block_tables", (batch, cache.max_blocks), "int32"),
        Buffer("temperature", (batch,), "float32"),
        Buffer("top_k", (batch,), "int32"),
        Buffer("top_p", (batch,), "float32"),
        Buffer("min_p", (batch,), "float32"),
        Buffer("seeds", (batch,), "int64"),
    }
    if length > 1:
        inputs.add(Buffer("last_index", (batch,), "int64"))
    inputs.update(cache_buffers(cache, cache.num_blocks))
    outputs = {
        Buffer("next_tokens", (batch,), "int64"),
        Buffer("logits", (batch, manifest.model.vocab_size), "float32"),
    }
    if any(buffer.name == OPTIONAL for buffer in entry.outputs):
        outputs.add(Buffer(OPTIONAL, (batch,), "float32"))
    return inputs, outputs


def check_buffers(entry: EngineEntry, manifest: Manifest) -> None:
    """Raise VerificationError unless the manifest's inputs and outputs of an engine are those its shape asks for."""
    inputs, outputs = expected_buffers(entry, manifest)
    for what, listed, wanted in (("inputs", entry.inputs, inputs), ("outputs", entry.outputs, outputs)):
        if len(listed) != len(wanted) or set(listed) != wanted:
            odd = sorted(b.name for b in set(listed) ^ wanted)
            raise VerificationError(
                f"the {what} of engine {entry.name} are not those of its shape",
                f"they differ in {', '.join(odd[:5]) or 'number'}",
                "build the artifact again",
            )
