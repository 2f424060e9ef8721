"""What an artifact carries besides engines and weights: tokenizer, chat template, generation defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..artifacts.errors import UsageError, VerificationError
from ..runtime.generation_config import GenerationConfig
from .strict_json import model_file, read_json
from .tokenizer_check import check_tokenizer

_CONFIG_BYTES = 16 << 20
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def write_assets(config: dict[str, Any], folder: Path | None, output: Path, vocabulary: int) -> bool:
    """Copy tokenizer.json and the chat template, and write generation.json; returns whether there is a tokenizer.

    Raises:
        UsageError: the tokenizer is broken.
    """
    generation = _generation(config, folder)
    written = output / "generation.json"
    written.write_text(json.dumps(generation, indent=1, sort_keys=True) + "\n")
    try:
        GenerationConfig.load(written, vocabulary)
    except VerificationError as error:
        raise UsageError(
            "generation_config.json holds a value that cannot be used",
            error.why or error.what,
            "correct the model's file",
        ) from error
    if folder is None:
        return False
    path = check_tokenizer(folder, vocabulary)
    if path is None:
        return False
    (output / "tokenizer.json").write_bytes(path.read_bytes())
    template = model_file(folder, "chat_template.jinja")
    try:
        text = template.read_text("utf-8") if template is not None else _old_template(folder)
    except UnicodeDecodeError as error:
        raise UsageError(f"{template} is not UTF-8", str(error), "fetch the model again") from error
    if text:
        (output / "chat_template.jinja").write_text(text, "utf-8")
    return True


def _old_template(folder: Path) -> str:
    """The chat template inside tokenizer_config.json, where it stood before it got a file of its own."""
    path = model_file(folder, "tokenizer_config.json")
    value = read_json(path, _CONFIG_BYTES).get("chat_template") if path is not None else None
    if isinstance(value, list):
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    return value if isinstance(value, str) else ""


def special_tokens(folder: Path | None) -> dict[str, str]:
    """bos_token and eos_token as the chat template wants them, from tokenizer_config.json."""
    path = model_file(folder, "tokenizer_config.json") if folder is not None else None
    config = read_json(path, _CONFIG_BYTES) if path is not None else {}
    found = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _generation(config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    path = model_file(folder, "generation_config.json") if folder is not None else None
    given = read_json(path, _CONFIG_BYTES) if path is not None else {}

    def first(name: str) -> Any:
        return given.get(name) if given.get(name) is not None else config.get(name)

    bos, pad = _ids(first("bos_token_id")), _ids(first("pad_token_id"))
    defaults = {
        k: given[k] for k in _DEFAULTS if isinstance(given.get(k), int | float) and given.get("do_sample") is not False
    }
    if given.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return {
        "bos_token_id": bos[0] if bos else None,
        "pad_token_id": pad[0] if pad else None,
        "eos_token_ids": _ids(first("eos_token_id")),
        "defaults": defaults,
        **special_tokens(folder),
    }
