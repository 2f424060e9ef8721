"""Turns a template and its facts into one HTML file that loads nothing, runs nothing and escapes everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..console import printable

_FOLDER = Path(__file__).resolve().parent


def render(template: str, **facts: Any) -> str:
    """The page of a template in this folder. Facts may be hostile text: they are escaped wherever they stand, and what
    would turn the direction of the text around it is shown by its code.

    The result encodes as UTF-8 whatever they are.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, finalize=_shown,
    )  # fmt: skip
    # The style sheet is ours and goes into an element whose content browsers do not unescape.
    style = (_FOLDER / "style.css").read_text("utf-8")
    page = environment.get_template(template).render(style=_Ours(style.strip()), **facts)
    return page.encode("utf-8", "xmlcharrefreplace").decode("utf-8")


def _shown(value: Any) -> Any:
    return printable(value) if type(value) is str else value


class _Ours(str):
    """Text of our own that is not escaped."""

    __slots__ = ()

    def __html__(self) -> str:
        return str(self)
