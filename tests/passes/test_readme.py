"""passes/README.md quotes the code as it is, and names only what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "passes" / "README.md").read_text("utf-8")
QUOTES = re.findall(r"```python\n# (\S+)\n(.*?)```", README, re.DOTALL)


def test_it_quotes_something() -> None:
    assert len(QUOTES) == README.count("```python") >= 3


@pytest.mark.parametrize(("file", "quote"), QUOTES, ids=[f for f, _ in QUOTES])
def test_quotes_are_the_code(file: str, quote: str) -> None:
    assert quote in (ROOT / file).read_text("utf-8")


def test_links_and_files_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    files = re.findall(r"`((?:runtime|compiler|tests)/[\w/.]+)`", README)
    assert links and files
    for path in [*(ROOT / "passes" / link for link in links), *(ROOT / file for file in files)]:
        assert path.exists(), path


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 100
