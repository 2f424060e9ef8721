"""A table of `quantization_config`, read key by key: what is not understood is refused by name, never skipped.

A key that is overlooked would be a model that computes something else, so a table says at the end which of its keys
nobody has asked for. Patterns of module names are data from anywhere: only those that no name can hold up are compiled.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from ...artifacts.errors import UnsupportedModelError, UsageError

FIX = "take another checkpoint of the model: docs/foreign-checkpoints.md lists what loads; a float one always does"
FETCH = "fetch the model again; config.json and the weights must be of one checkpoint"
_MISSING = object()
_LONGEST_PATTERN, _MOST_REPEATS = 500, 4


class Fields:
    """The keys of one JSON object; `where` names it in errors, such as "quantization_config.weights"."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise UsageError(f"{where} is no table", f"it is {_shown(value)}", "take the model's own config.json")
        self.where = where
        self._left = dict(value)
        self._known: list[str] = []

    def one_of(self, key: str, allowed: Collection[Any], default: Any = _MISSING) -> Any:
        """The value of `key`, which must be among `allowed`; without a default it must be there.

        Raises:
            UnsupportedModelError: it is something else; names key and value.
        """
        value = self._take(key, default)
        # True equals 1, and a list cannot be hashed: compared one by one, with their types.
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise UnsupportedModelError(
                f"{self.where}.{key} = {_shown(value)} is not supported",
                f"what is: {', '.join(_shown(known) for known in allowed)}",
                FIX,
            )
        return value

    def integer(self, key: str, default: Any = _MISSING, most: int = 1 << 20) -> int:
        """An integer from -1 to `most`."""
        value = self._take(key, default)
        if type(value) is not int or not -1 <= value <= most:
            raise UsageError(
                f"{self.where}.{key} = {_shown(value)} is no size", f"an integer up to {most} is expected", FIX
            )
        return value

    def strings(self, key: str, default: tuple[str, ...] | None = ()) -> tuple[str, ...]:
        """A list of strings; null is the default. Without a default it must be there."""
        value = self._take(key, _MISSING if default is None else None)
        if value is None and default is not None:
            return default
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(
                f"{self.where}.{key} = {_shown(value)} is no list of names", "", "take the model's own config.json"
            )
        return tuple(value)

    def integers(self, key: str) -> list[int] | None:
        """A list of integers, or None where it is absent or null."""
        value = self._take(key, None)
        if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise UnsupportedModelError(f"{self.where}.{key} = {_shown(value)} is not supported", "", FIX)
        return value

    def table(self, key: str) -> Fields | None:
        """A table inside this one, or None where it is absent, null or empty."""
        value = self._take(key, None)
        return Fields(value, f"{self.where}.{key}") if value else None

    def tables(self, key: str, default: Any = _MISSING) -> dict[str, Fields]:
        """A table of tables by name; without a default it must be there."""
        inner = Fields(self._take(key, default), f"{self.where}.{key}")
        return {name: Fields(value, f"{inner.where}.{name}") for name, value in inner._left.items()}

    def absent(self, key: str, why: str) -> None:
        """Raise UnsupportedModelError if `key` asks for anything: null, false and empty ones do not."""
        if value := self._take(key, None):
            raise UnsupportedModelError(f"{self.where}.{key} = {_shown(value)} is not supported", why, FIX)

    def finish(self, *harmless: str) -> None:
        """Raise UnsupportedModelError for keys that nobody asked for; `harmless` ones only tell how it was made."""
        for key in self._left:
            if key not in harmless:
                near = difflib.get_close_matches(key, [*self._known, *harmless], 1, 0.7)
                raise UnsupportedModelError(
                    f"{self.where}.{ascii(key)[1:81]} is unknown",
                    "it could change what the weights mean" + (f"; the nearest known key is {near[0]}" if near else ""),
                    FIX,
                )

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        value = self._left.pop(key, default)
        if value is None and default is not _MISSING:
            value = default
        if value is _MISSING:
            raise UsageError(f"{self.where}.{key} is missing", "the format needs it", "fetch the model again")
        return value


def module_pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression over module names that takes at most milliseconds on each of them.

    Raises:
        UsageError: it is none, or could take forever: repeated groups, references back, more than four repeats.
    """
    bare = re.sub(r"\\\\|\\[*+{(){}]", "", text)
    reason = ""
    if len(text) > _LONGEST_PATTERN:
        reason = f"it is longer than {_LONGEST_PATTERN} characters"
    elif re.search(r"\)\s*[*+{]|\\[1-9]|\(\?P=", bare):
        reason = "it repeats a group or refers back to one"
    elif len(re.findall(r"[*+{]", bare)) > _MOST_REPEATS:
        reason = f"it repeats more than {_MOST_REPEATS} times"
    else:
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            reason = str(error)
    raise UsageError(
        f"{where}: the pattern {ascii(text)[:80]} is refused",
        reason + "; such a pattern may never end",
        "write the names of the modules",
    )


def names_module(pattern: str, module: str) -> bool:
    """Whether a name from a list of modules left as they are stands for `module`: some of its parts in a row."""
    return bool(pattern) and f".{pattern.strip('.')}." in f".{module}."


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
