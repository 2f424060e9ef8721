"""The recipe: everything a build is told, as frozen dataclasses. The first stop of every build.

`load_recipe` reads a TOML file, lays `--model` and `--set` over it and returns a `Recipe` in which every default is
resolved and every number is within bounds. recipes/README.md documents each key once; a test holds both together.
The sections are in recipe_sections.py, reading and type checks in recipe_parse.py; this file knows which values fit
together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..artifacts.errors import UsageError
from .recipe_parse import apply_overrides, build_dataclass, inside, read_text, read_toml
from .recipe_sections import (
    DEFAULT_PROMPTS,
    GROUP_SIZES,
    MAX_CACHE_TOKENS,
    Gate,
    Group,
    ModelSource,
    Passes,
    Quantization,
    Shapes,
    Target,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class EngineShape:
    """One engine to compile: `batch` rows of `length` tokens."""

    name: str
    phase: Literal["decode", "prefill"]
    batch: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `file` is where it came from; `model_folder` is set by `--model DIR` alone."""

    name: str
    model: ModelSource = field(default_factory=ModelSource)
    shapes: Shapes = field(default_factory=Shapes)
    quantization: Quantization = field(default_factory=Quantization)
    passes: Passes = field(default_factory=Passes)
    gate: Gate = field(default_factory=Gate)
    target: Target = field(default_factory=Target)
    file: Path = field(default=Path(), metadata={"key": False}, compare=False)
    model_folder: Path | None = field(default=None, metadata={"key": False}, compare=False)

    @property
    def folder(self) -> Path:
        """Where the recipe's relative paths start, and what they may not leave."""
        return self.file.parent

    def engines(self) -> tuple[EngineShape, ...]:
        """The engines of a build, decode before prefill, each by rising shape."""
        decode = (EngineShape(f"decode-b{n}", "decode", n, 1) for n in self.shapes.decode_batch_sizes)
        prefill = (EngineShape(f"prefill-c{n}", "prefill", 1, n) for n in self.shapes.prefill_lengths)
        return (*decode, *prefill)

    def model_path(self) -> Path:
        """The local model folder, made absolute. Raises UsageError if there is none."""
        if self.model_folder is not None:
            return self.model_folder
        if not self.model.path:
            raise UsageError(
                f"{self.file}: the recipe names no model folder",
                'model.source is "local", but model.path is not set',
                "pass --model DIR, or set model.path in the recipe",
            )
        return _existing(self, "model.path", self.model.path, folder=True)

    def config_path(self) -> Path:
        """The config.json that random weights are made for. Raises UsageError if there is none."""
        if not self.model.config:
            raise UsageError(
                f"{self.file}: the recipe names no config for random weights",
                'model.source is "random", but model.config is not set',
                "set model.config to the path of a config.json beside the recipe",
            )
        return _existing(self, "model.config", self.model.config)

    def task_path(self) -> Path | None:
        """The task.jsonl of the gate, or None. Raises UsageError if it is named but missing."""
        return _existing(self, "gate.task", self.gate.task) if self.gate.task else None

    def accuracy_path(self) -> Path | None:
        """The text of the accuracy report, or None for the bundled one. Raises UsageError if it is missing."""
        return _existing(self, "gate.accuracy_text", self.gate.accuracy_text) if self.gate.accuracy_text else None

    def check_source(self) -> None:
        """Raise UsageError unless the model's source is whole: a folder, a pinned hub model, or a config."""
        if self.model.source == "local":
            self.model_path()
        elif self.model.source == "random":
            self.config_path()
        elif not self.model.id:
            raise UsageError(
                f"{self.file}: the recipe names no hub model",
                'model.source is "hub", but model.id is not set',
                'set model.id = "organisation/name" and model.revision',
            )
        elif not self.model.revision:
            raise UsageError(
                f"{self.file}: {self.model.id} has no pinned revision",
                "a branch such as main can change under a build, so a hub model is named by its full commit hash",
                f"copy the 40-digit commit from https://huggingface.co/{self.model.id}/commits/main into"
                f" model.revision, pass --model {self.model.id}@COMMIT or --model DIR, or use --set source=random",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with every key and default, no absolute path: what the manifest records."""
        data = asdict(self)
        del data["file"], data["model_folder"]
        return _plain(data)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """Read a recipe file, then lay `--model` and `--set` over it.

    Args:
        path: a TOML file, at most 1 MiB of UTF-8.
        overrides: "key=value" each; a dotted key or a unique last part of one, a TOML value or a bare string.
        model: an existing folder, or a hub id ("org/name" or "org/name@commit"); replaces the recipe's source.

    Raises:
        UsageError: names the file, the key and what to do.
    """
    path = Path(path)
    data = read_toml(path)
    model_folder = _replace_model(data, model) if model is not None else None
    apply_overrides(Recipe, data, overrides)
    recipe: Recipe = build_dataclass(Recipe, data, str(path))
    if recipe.model.source != "local" or recipe.model.path != (model_folder.name if model_folder else ""):
        model_folder = None  # a later --set took the source back
    recipe = replace(recipe, file=path, model_folder=model_folder)
    _check(recipe, str(path))
    return _resolve(recipe, str(path))


def _replace_model(data: dict[str, Any], model: str) -> Path | None:
    """Point the recipe's source at `model`; the folder if it is one."""
    section = data.setdefault("model", {})
    if not isinstance(section, dict):
        return None  # build_dataclass says what is wrong with it
    for key in ("path", "id", "revision"):
        section.pop(key, None)
    try:
        folder = Path(model).expanduser()
        if model and folder.is_dir():
            folder = folder.resolve()
            section.update(source="local", path=folder.name)
            return folder
        is_file = bool(model) and folder.exists()
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, an unknown ~user
        is_file = False
    name, _, revision = model.partition("@")
    if is_file or not _HUB_ID.fullmatch(name):
        raise UsageError(
            f"--model {model!r}: no such folder",
            "it is neither an existing folder nor a hub id of the form organisation/name",
            "give the folder that holds config.json and *.safetensors, or organisation/name@COMMIT",
        )
    section.update(source="hub", id=name, revision=revision)
    return None


def _check(recipe: Recipe, file: str) -> None:
    """The rules that types and bounds alone cannot say."""
    model, shapes, gate = recipe.model, recipe.shapes, recipe.gate

    def refuse(key: str, why: str, fix: str) -> UsageError:
        return UsageError(f"{file}: {key} is refused", why, fix)

    if not _NAME.fullmatch(recipe.name):
        raise refuse("name", f"{recipe.name[:50]!r} is not a plain name", "use letters, digits, '.', '_' and '-'")
    if model.id and not _HUB_ID.fullmatch(model.id):
        raise refuse("model.id", f"{model.id[:50]!r} is no hub id", "write organisation/name")
    if model.revision and not _COMMIT.fullmatch(model.revision):
        raise refuse(
            "model.revision",
            f"{model.revision[:50]!r} is not a full commit hash; branches and tags can change under a build",
            "give the 40 lower-case hex digits of the commit",
        )
    for key in ("decode_batch_sizes", "prefill_lengths"):
        values = getattr(shapes, key)
        if not values or len(set(values)) != len(values):
            raise refuse(f"shapes.{key}", f"{list(values)} is empty or repeats itself", "list each shape once")
    if max(shapes.prefill_lengths) > model.max_length:
        raise refuse(
            "shapes.prefill_lengths",
            f"a chunk of {max(shapes.prefill_lengths)} tokens is longer than model.max_length = {model.max_length}",
            "lower the chunk or raise model.max_length",
        )
    if shapes.kv_block_size & (shapes.kv_block_size - 1):
        raise refuse("shapes.kv_block_size", f"{shapes.kv_block_size} is not a power of two", "use 16")
    if gate.prompts_file and gate.prompts != DEFAULT_PROMPTS:
        raise refuse("gate.prompts_file", "gate.prompts is set as well", "keep one of the two")
    if recipe.quantization.groups and replace(recipe.quantization, groups=()) != Quantization():
        raise refuse(
            "quantization", "it is one group itself and lists quantization.groups as well", "keep one of the two"
        )
    for index, group in enumerate(recipe.quantization.groups or (recipe.quantization,)):
        where = f"quantization.groups[{index}]" if recipe.quantization.groups else "quantization"
        if problem := _group_problem(group):
            key, why, fix = problem
            raise refuse(f"{where}.{key}", why, fix)
    for key, value in _paths(recipe):
        inside(recipe.folder, value, file, key)


def _group_problem(group: Group) -> tuple[str, str, str] | None:
    """Key, reason and remedy of what is wrong with a group of weights by itself, or None."""
    for key, patterns in (("targets", group.targets), ("ignore", group.ignore)):
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except (re.error, RecursionError, OverflowError) as error:
                    return key, f"{pattern[:50]!r} is no regular expression: {error}", "see recipes/README.md"
    if group.group_size not in (0, *GROUP_SIZES):
        sizes = ", ".join(map(str, GROUP_SIZES))
        return "group_size", f"{group.group_size} is none of {sizes}", f"use one of {sizes}, or 0 for one scale per row"
    if not group.symmetric and group.scheme != "W4A16":
        return "symmetric", f'only "W4A16" has zero points, not {group.scheme!r}', "leave it out"
    return None


def _resolve(recipe: Recipe, file: str) -> Recipe:
    """Fill in the defaults that depend on other keys; shapes come out in rising order."""
    shapes, gate = recipe.shapes, recipe.gate
    decode, prefill = tuple(sorted(shapes.decode_batch_sizes)), tuple(sorted(shapes.prefill_lengths))
    blocks = -(-recipe.model.max_length // shapes.kv_block_size)  # of one full sequence
    tokens = shapes.kv_cache_tokens or decode[-1] * blocks * shapes.kv_block_size
    if not recipe.model.max_length <= tokens <= MAX_CACHE_TOKENS:
        raise UsageError(
            f"{file}: shapes.kv_cache_tokens is refused",
            f"{tokens} is not between model.max_length = {recipe.model.max_length} (one full sequence must fit) and"
            f" {MAX_CACHE_TOKENS}; left out, it holds the largest decode batch at full length",
            "set shapes.kv_cache_tokens, or lower the decode batch or model.max_length",
        )
    if gate.prompts_file:
        text = read_text(_existing(recipe, "gate.prompts_file", gate.prompts_file))
        gate = replace(gate, prompts=tuple(line for line in text.splitlines() if line.strip()))
    if not gate.prompts or not all(gate.prompts) or len(gate.prompts) > 1000:
        key = "gate.prompts_file" if gate.prompts_file else "gate.prompts"
        raise UsageError(
            f"{file}: {key} is refused",
            f"it has {len(gate.prompts)} prompts; 1 to 1000 are allowed, none of them empty",
            "list a few typical prompts, or leave the key out",
        )
    shapes = replace(shapes, decode_batch_sizes=decode, prefill_lengths=prefill, kv_cache_tokens=tokens)
    return replace(recipe, shapes=shapes, gate=gate)


def _paths(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, value) of every path the recipe file gives; the folder of --model is the user's own and not among them."""
    paths = {"model.config": recipe.model.config, "gate.prompts_file": recipe.gate.prompts_file}
    paths |= {"gate.task": recipe.gate.task, "gate.accuracy_text": recipe.gate.accuracy_text}
    if recipe.model_folder is None:
        paths["model.path"] = recipe.model.path
    return [(key, value) for key, value in paths.items() if value]


def _existing(recipe: Recipe, key: str, value: str, folder: bool = False) -> Path:
    """`value` made absolute, known to lie inside the recipe's folder and to exist."""
    path = inside(recipe.folder, value, str(recipe.file), key)
    if not (path.is_dir() if folder else path.is_file()):
        raise UsageError(
            f"{recipe.file}: {key} = {value!r} does not exist",
            f"there is no such {'folder' if folder else 'file'} beside the recipe",
            "correct the path" + (", or pass --model DIR" if folder else ""),
        )
    return path


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
