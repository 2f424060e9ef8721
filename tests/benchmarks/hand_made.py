"""Manifests made by hand, small enough to count their bytes on paper."""

from __future__ import annotations

from ingot.artifacts.manifest import (
    Buffer,
    CacheLayer,
    Constant,
    EngineEntry,
    FileEntry,
    KVCache,
    Manifest,
    Model,
    Target,
)

VOCABULARY, HIDDEN = 100, 8


def engine(name: str, phase: str, batch: int, length: int, weights: tuple[str, ...]) -> EngineEntry:
    """An engine that binds these weights."""
    outputs = (Buffer("next_tokens", (batch,), "int64"), Buffer("logits", (batch, VOCABULARY), "float32"))
    constants = tuple(Constant(f"inner_{weight}", weight) for weight in weights)
    return EngineEntry(name, "aoti", phase, batch, length, f"engines/{name}.so", (), outputs, constants, (), 0)


def manifest(weights: tuple[str, ...], layers: tuple[CacheLayer, ...] = ()) -> Manifest:
    """A manifest whose engines bind `weights`: decode for batches of 1 and 4, prefill in chunks of 16."""
    engines = (
        engine("decode-b4", "decode", 4, 1, (*weights, "only_in_b4")),
        engine("decode-b1", "decode", 1, 1, weights),
        engine("prefill-c16", "prefill", 1, 16, (*weights, "only_in_prefill")),
    )
    paths = ("generation.json", "weights/model.safetensors", *(e.file for e in engines))
    return Manifest(
        schema_version=2,
        name="hand-made",
        ingot_version="0.1.0",
        model=Model("LlamaForCausalLM", "llama", VOCABULARY, 64, "bfloat16", HIDDEN, max(len(layers), 1), 1000),
        target=Target("cpu", "linux", "x86_64", (), "none", "2.13.0"),
        toolchain={},
        recipe={},
        kv_cache=KVCache(16, 9, 4, "bfloat16", layers),
        engines=engines,
        weights=("weights/model.safetensors",),
        passes=[],
        gate={},
        files=tuple(FileEntry(path, 10, "0" * 64) for path in paths),
    )
