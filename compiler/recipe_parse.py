"""From hostile text to typed data: the total parser under recipe.py.

It reads bounded UTF-8 TOML, turns tables into dataclasses by their annotations and bounds, lays `key=value` over them,
and keeps paths inside the recipe's folder. Whatever it is given, the only exception it raises is UsageError.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..artifacts.errors import UsageError

MAX_BYTES = 1 << 20
_MAX_STRINGS = 10_000


class Key(NamedTuple):
    """One leaf key of a recipe: dotted path, resolved type and default (dataclasses.MISSING if required)."""

    path: str
    type: Any
    default: Any


def integer(default: int | None, low: int, high: int) -> Any:
    """A dataclass field: an integer in [low, high]."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


def integers(default: tuple[int, ...], low: int, high: int, most: int) -> Any:
    """A dataclass field: up to `most` integers, each in [low, high]."""
    return dataclasses.field(default=default, metadata={"range": (low, high), "most": most})


def real(default: float | None, low: float, high: float) -> Any:
    """A dataclass field: a finite number in [low, high]."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every leaf key under a recipe dataclass, in order of declaration."""
    hints = typing.get_type_hints(cls)
    for item in _fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield Key(f"{prefix}{item.name}", hints[item.name], item.default)


def read_text(path: Path) -> str:
    """A UTF-8 file of at most 1 MiB."""
    try:
        if not path.is_file():
            reason = "it is a folder" if path.is_dir() else "there is no such file"
            raise UsageError(f"{path}: cannot be read", reason, "give the path of an existing file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r}: cannot be read", str(error), "give the path of a readable file") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{path}: too large", f"it has more than {MAX_BYTES} bytes", "a recipe is a short text file")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8", f"byte {error.start} is no text", "save it as UTF-8") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The table a recipe file holds."""
    text = read_text(path)
    try:
        data = tomllib.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"{path}: not a TOML file", reason, "see recipes/README.md for the format") from None
    if not data:
        raise UsageError(f"{path}: the recipe is empty", "it sets no key", "start from recipes/demo.toml")
    return data


def apply_overrides(cls: type, data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Lay each "key=value" of `--set` over `data`, in order."""
    known = {key.path: key for key in keys(cls)}
    for text in overrides:
        name, equals, value = text.partition("=")
        name = name.strip()
        where = f"--set {reprlib.repr(text)}"
        if not equals:
            raise UsageError(f"{where}: not of the form key=value", "", "write --set key=value")
        matches = [name] if name in known else [path for path in known if path.endswith(f".{name}")]
        if len(matches) != 1:
            raise (
                _unknown(f"{where}: unknown key", name, list(known))
                if not matches
                else UsageError(
                    f"{where}: {name} is ambiguous", f"it can mean {' or '.join(matches)}", "write the whole dotted key"
                )
            )
        *sections, leaf = matches[0].split(".")
        table = data
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UsageError(f"{where}: {section} is not a table in the recipe", "", f"write [{section}] there")
        table[leaf] = _toml_value(value.strip(), known[matches[0]].type)


def _toml_value(text: str, kind: Any) -> Any:
    """A TOML value, or the text itself where it is none. A text key takes digits as they are (a commit hash)."""
    is_text = kind is str or typing.get_origin(kind) is Literal
    if (is_text and text[:1] not in "\"'") or "\n" in text or "\r" in text:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError, OverflowError):
        return text


def build_dataclass(cls: type, data: Any, file: str, prefix: str = "") -> Any:
    """`data` as an instance of `cls`; every unknown key, wrong type and number out of bounds is refused."""
    if not isinstance(data, dict):
        raise _wrong(file, prefix.rstrip("."), "a table", data)
    hints, fields = typing.get_type_hints(cls), {item.name: item for item in _fields(cls)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in fields:
            raise _unknown(f"{file}: unknown key", prefix + name, [prefix + known for known in fields])
        path, kind = prefix + name, hints[name]
        if dataclasses.is_dataclass(kind):
            values[name] = build_dataclass(typing.cast(type, kind), value, file, f"{path}.")
        else:
            values[name] = _convert(value, kind, fields[name].metadata, file, path)
    for name, item in fields.items():
        if name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise UsageError(f"{file}: {prefix}{name} is missing", "it has no default", f'add {name} = "…"')
    return cls(**values)


def inside(root: Path, value: str, file: str, key: str) -> Path:
    """`value` resolved below `root`. Raises UsageError if it is absolute or leaves the folder, also through a link."""
    try:
        base = root.resolve()
        path = (base / value).resolve()
        ok = not Path(value).is_absolute() and path.is_relative_to(base)
        path.exists()  # a name too long for the file system is told here, and nowhere later
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{file}: {key} is no usable path", str(error), "write a path beside the recipe") from None
    if not ok:
        raise UsageError(
            f"{file}: {key} leaves the recipe's folder",
            f"{reprlib.repr(value)} does not lie beside or below the recipe",
            "write a relative path without '..'; a model elsewhere is given by --model DIR",
        )
    return path


def type_name(kind: Any) -> str:
    """A type in the words of recipes/README.md."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(f'"{choice}"' for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"list of {type_name(typing.get_args(kind)[0])}s"
    if dataclasses.is_dataclass(kind):
        return "table"
    if isinstance(kind, types.UnionType):
        return type_name(typing.get_args(kind)[0])
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[kind]


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(cls) if item.metadata.get("key", True)]


def _convert(value: Any, kind: Any, metadata: Any, file: str, path: str) -> Any:
    if isinstance(kind, types.UnionType):  # "float | None": TOML has no null, so only the first can be written
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        most = metadata.get("most", _MAX_STRINGS)
        if not isinstance(value, list):
            raise _wrong(file, path, f"a {type_name(kind)}", value)
        if len(value) > most:
            raise UsageError(f"{file}: {path} is too long", f"{len(value)} entries, at most {most}", "list fewer")
        entry = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(entry):
            return tuple(
                build_dataclass(typing.cast(type, entry), item, file, f"{path}[{i}].") for i, item in enumerate(value)
            )
        return tuple(_convert(item, entry, metadata, file, f"{path}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if not isinstance(value, str) or value not in choices:
            near = difflib.get_close_matches(value[:100], choices, 1, 0.5) if isinstance(value, str) else []
            raise _wrong(file, path, type_name(kind), value, f'did you mean "{near[0]}"?' if near else "")
        return value
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise _wrong(file, path, f"{'an' if kind is int else 'a'} {type_name(kind)}", value)
    if "range" in metadata:
        low, high = metadata["range"]
        if not (math.isfinite(value) if isinstance(value, float) else True) or not low <= value <= high:
            raise _wrong(file, path, f"between {low} and {high}", value)
    return float(value) if kind is float else value


def _wrong(file: str, path: str, wanted: str, value: Any, fix: str = "") -> UsageError:
    name = {bool: "a boolean", dict: "a table", list: "a list", str: "a string"}.get(type(value), "")
    shown = f"{name} ({_short(value)})" if name else _short(value)
    return UsageError(f"{file}: {path} must be {wanted}", f"it is {shown}", fix or f"correct {path}")


def _short(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "an enormous number"


def _unknown(what: str, name: str, known: list[str]) -> UsageError:
    short = name[:100]
    near = difflib.get_close_matches(short, known, 1, 0.4)
    tails = {path.rpartition(".")[2]: path for path in known}
    near = near or [tails[tail] for tail in difflib.get_close_matches(short.rpartition(".")[2], tails, 1, 0.5)]
    listing = f"known keys: {', '.join(known)}"
    return UsageError(f"{what} {short!r}", listing, f"did you mean {near[0]}?" if near else "remove it")
