"""Digests of what a build reads besides the recipe: config, weights, tokenizer, task. Nothing is parsed or imported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ...artifacts.fingerprint import digest_files
from ..recipe import Recipe
from ..strict_json import model_file

ACCURACY_TEXT = Path(__file__).resolve().parents[2] / "recipes" / "accuracy.txt"
_TEXT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


class Inputs:
    """The files of one build by what they mean, each as one digest; "" where there are none.

    Args:
        source: the model's folder; for random weights the config file.

    Raises:
        UsageError: a file leaves the model's folder or is none. ResourceError: it cannot be read.
    """

    def __init__(self, recipe: Recipe, source: Path) -> None:
        folder = source if source.is_dir() else None
        config = source if folder is None else source / "config.json"
        self.config = _digest(config.parent, [config.name])
        self.text = _digest(folder, _TEXT) if folder is not None else ""
        task = recipe.task_path()
        self.task = _digest(task.parent, [task.name]) if task is not None else ""
        text = recipe.accuracy_path() or ACCURACY_TEXT
        self.accuracy = _digest(text.parent, [text.name])
        if folder is not None:
            weights = sorted(path.name for path in folder.glob("*.safetensors"))
            self.checkpoint = _digest(folder, [*weights, "model.safetensors.index.json"])
        else:
            self.checkpoint = hashlib.sha256(f"random {recipe.model.seed} {self.config}".encode()).hexdigest()
        # Graphs over weights that are stored quantized depend on how they are stored.
        quantized = config.is_file() and b'"quantization_config"' in config.read_bytes()
        self.held = self.checkpoint if quantized else ""


def _digest(folder: Path, names: Iterable[str]) -> str:
    found = {name: path for name in names if (path := model_file(folder, name)) is not None}
    digests = digest_files(found.values())
    lines = "".join(f"{name}\0{digests[path]}\n" for name, path in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest() if found else ""
