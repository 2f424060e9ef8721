"""config.json under suspicion: what it may say before any memory is taken or any class of transformers is chosen.

A config is data from anywhere. Here it is parsed strictly and refused when it asks for repository code, for another
kind of model, or for numbers no model has. The rules go by field names, never by model.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..artifacts.errors import ResourceError, UnsupportedModelError, UsageError
from .strict_json import model_file, read_json

MAX_CONFIG_BYTES = 1 << 20
# One meaning, the names it has in different configs, and the largest value any model could mean.
_FIELDS = {
    "vocabulary": (("vocab_size",), 1 << 22),
    "hidden": (("hidden_size", "n_embd", "d_model"), 1 << 16),
    "layers": (("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1024),
    "heads": (("num_attention_heads", "n_head", "n_heads"), 4096),
    "kv_heads": (("num_key_value_heads", "num_kv_heads", "n_head_kv"), 4096),
    "head_dim": (("head_dim",), 8192),
    "intermediate": (("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), 1 << 20),
    "experts": (("num_experts", "num_local_experts", "n_routed_experts"), 4096),
    "positions": (("max_position_embeddings", "n_positions", "max_seq_len"), 1 << 26),
}
_SIZE_KEY = re.compile(r"(num|n)_|.*(_size|_dim|_rank|_heads|_layers|_experts|_positions|_window|_length)$")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation\w*")


def read_config(source: str | Path) -> dict[str, Any]:
    """The checked config of a model folder (or of a config file given by itself).

    Attention implementations and paths of the machine it was saved on are dropped, and `quantization_config`, which is
    about the weights (see `read_quantization`); all else is as in the file.

    Raises:
        UsageError: missing, not strict JSON, or numbers that contradict each other or no model has.
        UnsupportedModelError: repository code, or a model type transformers does not know or that is no plain decoder.
        ResourceError: even the smallest model of these sizes is far beyond this machine's memory.
    """
    path, config = _read(Path(source))
    config.pop("quantization_config", None)
    _refuse_code(config, str(path))
    _check_kind(config, str(path))
    _check_numbers(config, str(path))
    _check_sizes(config, str(path))
    drop = ("_name_or_path", "_commit_hash")
    return {key: value for key, value in config.items() if key not in drop and not _IMPLEMENTATION.fullmatch(key)}


def read_quantization(source: str | Path) -> object | None:
    """What config.json says of weights that are stored quantized, unchecked; None where it says nothing.

    Raises:
        UsageError: config.json is missing or not strict JSON.
    """
    return _read(Path(source))[1].get("quantization_config") or None


def _read(source: Path) -> tuple[Path, dict[str, Any]]:
    folder, name = (source, "config.json") if source.is_dir() else (source.parent, source.name)
    path = model_file(folder, name)
    if path is None:
        raise UsageError(f"{folder / name}: missing", "a model folder holds a config.json", "check the folder's path")
    return path, read_json(path, MAX_CONFIG_BYTES)


def check_length(config: dict[str, Any], max_length: int) -> None:
    """Raise UsageError if `max_length` tokens are more than the config's positions."""
    limit = _field(config, "positions")
    if limit is not None and max_length > limit:
        raise UsageError(
            f"model.max_length = {max_length} is too long for this model",
            f"its config.json allows {limit} positions",
            f"set model.max_length to at most {limit} in the recipe, or pass --set max_length={limit}",
        )


def check_memory(needed_bytes: int, what: str) -> None:
    """Raise ResourceError if `needed_bytes` are more than this machine has free."""
    available = _memory("MemAvailable")
    if available is not None and needed_bytes > available:
        raise ResourceError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB of memory",
            f"{available / 1e9:.1f} GB are free",
            "close other programs, choose a smaller model or dtype, or use a machine with more memory",
        )


def _refuse_code(config: dict[str, Any], where: str) -> None:
    for key, value in _walk(config):
        leaf = key.rpartition(".")[2]
        if leaf == "auto_map":
            raise UnsupportedModelError(
                f"{where}: asks for repository code (auto_map)",
                "code that comes with a model is never run",
                "use a model whose architecture is part of transformers; if this one is, remove auto_map",
            )
        if leaf.endswith("_internal") or (_IMPLEMENTATION.fullmatch(leaf) and re.search(r"[/:@]", str(value))):
            raise UnsupportedModelError(
                f"{where}: {key[:80]} is refused",
                "it would choose the code that transformers runs, or where that is fetched from",
                "remove the key; Ingot brings its own attention",
            )
        if leaf in ("quantization_config", "compression_config") and value:
            raise UnsupportedModelError(
                f"{where}: {key[:80]} is not supported",
                "quantized weights are understood where quantization_config stands at the top",
                "take another checkpoint of the model, or its float one",
            )


def _check_kind(config: dict[str, Any], where: str) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise UsageError(f"{where}: no model_type", "it names the architecture", "take the model's own config.json")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(kind[:100], CONFIG_MAPPING_NAMES, 1, 0.7)
        raise UnsupportedModelError(
            f"{where}: the model type {kind[:80]!r} is unknown to transformers",
            "an architecture that is not part of transformers would need repository code",
            f"did you mean {near[0]!r}?" if near else "update transformers, or choose another model",
        )
    reason = ""
    if config.get("is_encoder_decoder"):
        reason = "it is an encoder-decoder model"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = "transformers has no causal language model for it"
    elif parts := [key for key in config if key.endswith("_config") and key.startswith(("vision", "audio", "text"))]:
        reason = f"it is multimodal ({', '.join(parts)[:80]})"
    if reason:
        raise UnsupportedModelError(
            f"{where}: models of type {kind!r} are not supported",
            f"{reason}; Ingot compiles decoders that read and write text",
            "choose a decoder-only text model",
        )


def _check_numbers(config: dict[str, Any], where: str) -> None:
    for key, value in _walk(config):
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        reason = ""
        if value != value:
            reason = "NaN is not a number"
        elif isinstance(value, int) and abs(value) > 1 << 31:
            reason = "it is beyond 2^31"
        elif value < 0 and _SIZE_KEY.match(key.rpartition(".")[2].partition("[")[0]):
            reason = f"{value} is negative, and the key is a size"
        if isinstance(value, float) and math.isinf(value):  # state-space models write such limits
            raise UnsupportedModelError(
                f"{where}: models of type {config.get('model_type')!r} are not supported",
                f"{key[:80]} is {value}, which no attention decoder's config has",
                "choose a decoder-only text model with attention in every layer",
            )
        if reason:
            raise _absurd(where, f"{key[:80]} is absurd", reason, config)


def _check_sizes(config: dict[str, Any], where: str) -> None:
    for meaning, (names, most) in _FIELDS.items():
        for name in names:
            value = config.get(name)
            for item in value if isinstance(value, list) else [value]:
                if item is None:
                    continue
                if type(item) is not int or not (0 if meaning in ("experts", "head_dim") else 1) <= item <= most:
                    raise _absurd(where, f"{name} is absurd", f"{str(item)[:40]} is not 1 to {most}", config)
    hidden, heads, kv_heads = (_field(config, name) for name in ("hidden", "heads", "kv_heads"))
    if hidden and heads and hidden % heads and not any(key.endswith("head_dim") for key in config):
        raise _absurd(where, "heads do not divide the hidden size", f"{hidden} by {heads} heads, no head_dim", config)
    if heads and kv_heads and heads % kv_heads:
        raise _absurd(where, "key/value heads do not divide the heads", f"{heads} heads share {kv_heads}", config)
    vocabulary, layers = _field(config, "vocabulary") or 0, _field(config, "layers") or 0
    least = (hidden or 0) * (vocabulary + 2 * layers * (hidden or 0))  # one byte each; embedding, query and output
    memory = _memory("MemTotal")
    if memory is not None and least > 4 * memory:
        raise ResourceError(
            f"{where}: a model of these sizes has at least {least / 1e9:.0f} GB of weights",
            f"this machine has {memory / 1e9:.0f} GB of memory",
            "check the config's sizes, or use a larger machine",
        )


def _field(config: dict[str, Any], meaning: str) -> int | None:
    """A size under any of its names; None if absent or given per layer."""
    values = (config.get(name) for name in _FIELDS[meaning][0])
    return next((value for value in values if type(value) is int), None)


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key and list entry, tables included."""
    if isinstance(value, dict):
        for key, item in value.items():
            inner = f"{path}.{key}" if path else key
            yield inner, item
            yield from _walk(item, inner)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
            yield from _walk(item, f"{path}[{index}]")


def _absurd(where: str, what: str, why: str, config: dict[str, Any]) -> UsageError:
    return UsageError(
        f"{where}: {what}", f"{why} (model type {config.get('model_type')!r})", "take the model's own config.json"
    )


def _memory(field: str) -> int | None:
    """Bytes, from the kernel; None where it does not say."""
    if field == "MemTotal":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
