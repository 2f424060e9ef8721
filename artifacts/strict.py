"""Strict JSON: text that is hostile or broken ends in one VerificationError naming the field, never in anything else.

`read_json` accepts less than `json.loads` does (no duplicate keys, NaN, lone surrogates, huge numbers, deep nesting).
`build` turns the result into frozen dataclasses by their type hints; a hint may carry constraints:
`Annotated[int, Range(1, 8)]`. Keys must match the fields exactly, and a bool is not an int.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, Protocol, TypeVar

from .errors import VerificationError

MAX_BYTES = 16 << 20
MAX_DEPTH = 32
MAX_ITEMS = 1 << 20
FIX = "fetch an intact copy of the artifact, or build it again with `ingot build`"

T = TypeVar("T")


class Constraint(Protocol):
    """A rule on one value, written into the type hint."""

    def complaint(self, value: Any) -> str:
        """Why the value is refused; empty when it is fine."""
        ...


@dataclasses.dataclass(frozen=True)
class Range:
    """An integer between `low` and `high`, both included."""

    low: int
    high: int

    def complaint(self, value: int) -> str:
        return "" if self.low <= value <= self.high else f"{value} is not between {self.low} and {self.high}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def complaint(self, value: str) -> str:
        return "" if value in self.words else f"{quote(value)} is not one of {', '.join(self.words)}"


@dataclasses.dataclass(frozen=True)
class Matches:
    """A string that matches the whole of a regular expression; `meaning` says in words what it asks for."""

    pattern: str
    meaning: str
    longest: int = 512

    def complaint(self, value: str) -> str:
        if len(value) > self.longest:
            return f"{len(value)} characters are too many, at most {self.longest}"
        return "" if re.fullmatch(self.pattern, value) else f"{quote(value)} is not {self.meaning}"


@dataclasses.dataclass(frozen=True)
class AtMost:
    """A list or tuple of at most `count` items."""

    count: int

    def complaint(self, value: tuple[Any, ...]) -> str:
        return "" if len(value) <= self.count else f"{len(value)} items are too many, at most {self.count}"


def quote(value: object, longest: int = 80) -> str:
    """The value as it stands in JSON, shortened for a message; control characters come out escaped."""
    text = ascii(value)
    return text if len(text) <= longest else text[:longest] + "…"


def refuse(source: str, where: str, why: str) -> NoReturn:
    """Raise the error every defect in `source` ends in; `where` names the field, empty for the whole text."""
    raise VerificationError(f"{source}: {where or 'the file'} is not valid", f"{where}: {why}" if where else why, FIX)


class _Defect:
    """Stands in the parsed value where JSON itself cannot say no with the field's name."""

    def __init__(self, why: str) -> None:
        self.why = why


def read_json(text: str | bytes, source: str) -> Any:
    """Parse strict JSON.

    Args:
        text: UTF-8 bytes or a string, at most 16 MiB.
        source: what to call it in messages, for example the file's path.

    Raises:
        VerificationError: not UTF-8, not JSON, or JSON with duplicate keys, NaN, infinities, integers beyond 64 bits,
            lone surrogates, or nested deeper than 32 levels.
    """
    if len(text) > MAX_BYTES:
        refuse(source, "", f"larger than {MAX_BYTES >> 20} MiB")
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            decoded, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
    except UnicodeDecodeError as error:
        refuse(source, "", f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        refuse(source, "", f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        refuse(source, "", f"nested deeper than {MAX_DEPTH} levels")
    _walk(value, source, "", 0)
    return value


def _object(pairs: list[tuple[str, Any]]) -> Any:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return _Defect(f"the key {quote(key)} stands there twice")
        seen.add(key)
    return result


def _integer(text: str) -> Any:
    # The length is looked at first: int() of a long text is quadratic, and refused by Python with a ValueError.
    if len(text) <= 21 and -(1 << 63) <= (number := int(text)) < 1 << 64:
        return number
    return _Defect("an integer beyond 64 bits")


def _float(text: str) -> Any:
    number = float(text)
    return number if math.isfinite(number) else _Defect("a number beyond the range of a double")


def _constant(text: str) -> Any:
    return _Defect(f"{text} is not a number in JSON")


def _walk(value: Any, source: str, where: str, depth: int) -> None:
    """Refuse what `json.loads` lets through, with the path to it."""
    if depth > MAX_DEPTH:
        refuse(source, where, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, _Defect):
        refuse(source, where, value.why)
    elif isinstance(value, str):
        _check_text(value, source, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, source, where)
            _walk(item, source, _join(where, key), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, int | float):  # long lists of numbers need no path
                continue
            _walk(item, source, f"{where}[{index}]", depth + 1)


def _check_text(text: str, source: str, where: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        refuse(source, where, "a lone surrogate is not a character")


def _join(where: str, key: str) -> str:
    name = key if key.isidentifier() and len(key) <= 64 else quote(key)
    return f"{where}.{name}" if where else name


def build(hint: Any, value: Any, source: str, where: str = "") -> Any:
    """Turn parsed JSON into the type `hint`: a dataclass, tuple, list, dict, str, int, float, bool or `Any`.

    Raises:
        VerificationError: the first field of another type, missing, unknown, or against a constraint.
    """
    try:
        return _builder(hint)(value)
    except _Wrong as wrong:
        for part in reversed(wrong.path):
            where = f"{where}[{part}]" if isinstance(part, int) else _join(where, part)
        refuse(source, where, wrong.why)


class _Wrong(Exception):
    """A value that is refused; its path grows from the inside out while the error passes through."""

    def __init__(self, why: str, *path: str | int) -> None:
        self.why, self.path = why, list(path)


@functools.cache
def _builder(hint: Any) -> Callable[[Any], Any]:
    """The function that builds values of a type: made once per type, since a kernel plan has thousands of them."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *constraints = typing.get_args(hint)
        return _constrained(_builder(inner), [constraint.complaint for constraint in constraints])
    if hint is Any:
        return lambda value: value
    if dataclasses.is_dataclass(hint):
        return _dataclass_builder(hint)
    if origin in (tuple, list):
        return _sequence_builder(origin, typing.get_args(hint))
    if origin is dict:
        return _dict_builder(_builder(typing.get_args(hint)[1]))
    return lambda value: value if type(value) is hint else _expect(value, hint)


def _constrained(inner: Callable[[Any], Any], complaints: list[Callable[[Any], str]]) -> Callable[[Any], Any]:
    def build_value(value: Any) -> Any:
        result = inner(value)
        for complaint in complaints:
            if why := complaint(result):
                raise _Wrong(why)
        return result

    return build_value


def _dataclass_builder(hint: Any) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(hint, include_extras=True)
    builders = [(name, _builder(kind)) for name, kind in hints.items()]

    def build_object(value: Any) -> Any:
        _expect(value, dict)
        if value.keys() != hints.keys():
            for key in value:
                if key not in hints:
                    raise _Wrong("unknown key", key)
            raise _Wrong("missing", next(name for name in hints if name not in value))
        fields = []
        name = ""
        try:
            for name, make in builders:
                fields.append(make(value[name]))
        except _Wrong as wrong:
            wrong.path.append(name)
            raise
        return hint(*fields)

    return build_object


def _sequence_builder(origin: Callable[..., Any], kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    any_length = origin is list or kinds[-1] is Ellipsis
    fixed = [_builder(kind) for kind in (kinds[:1] if any_length else kinds)]

    def build_items(value: Any) -> Any:
        _expect(value, list)
        if any_length and len(value) > MAX_ITEMS:
            raise _Wrong(f"{len(value)} items are too many, at most {MAX_ITEMS}")
        if not any_length and len(value) != len(fixed):
            raise _Wrong(f"expected {len(fixed)} items, found {len(value)}")
        items: list[Any] = []
        try:
            for item, make in zip(value, itertools.repeat(fixed[0]) if any_length else fixed):
                items.append(make(item))
        except _Wrong as wrong:
            wrong.path.append(len(items))
            raise
        return origin(items)

    return build_items


def _dict_builder(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def build_entries(value: Any) -> Any:
        _expect(value, dict)
        result = {}
        for key, entry in value.items():
            try:
                result[key] = make(entry)
            except _Wrong as wrong:
                wrong.path.append(key)
                raise
        return result

    return build_entries


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number with a point"}
        names |= {bool: "true or false", types.NoneType: "null"}
        raise _Wrong(f"expected {names.get(kind, kind.__name__)}, found {names[type(value)]}")
    return value
