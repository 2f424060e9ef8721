"""Documents say what is: field names, links, tests and commands they name exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from ingot.artifacts import manifest as schema

from .source import FOLDERS, ROOT, tree

DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md"))
)
CLASSES = [cls for cls in vars(schema).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)
           and cls.__module__ == schema.__name__]  # fmt: skip


def section(text: str, heading: str) -> str:
    """The part of a Markdown text below one heading, up to the next of the same level or above."""
    level = heading.split(" ")[0]
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no {heading!r}"
    return found.group(1)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_format_document_has_every_field_in_order(cls: type) -> None:
    text = (ROOT / "docs" / "artifact-format.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", section(text, f"### {cls.__name__}"), re.MULTILINE)
    assert rows == [field.name for field in dataclasses.fields(cls)]


def test_the_format_document_names_the_present_version_and_the_unlisted_files() -> None:
    text = (ROOT / "docs" / "artifact-format.md").read_text("utf-8")
    assert f"Schema version {schema.SCHEMA_VERSION} " in text
    for path in (*schema.UNLISTED, schema.FILE_NAME):
        assert path in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (ROOT / document.parent / target.partition("#")[0]).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_tests_that_are_named_exist(document: Path) -> None:
    text = (ROOT / document).read_text("utf-8")
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / file).is_file(), f"{document}: {file}"
        functions = {n.name for n in ast.walk(tree(Path(file))) if isinstance(n, ast.FunctionDef)}
        assert not name or name in functions, f"{document}: {file}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_that_are_named_exist(document: Path) -> None:
    """Names in backticks that look like a file of one of our folders."""
    text = (ROOT / document).read_text("utf-8")
    for name in re.findall(rf"`((?:{'|'.join([*FOLDERS, 'tests', 'docs'])})/[\w./-]+\.\w+)`", text):
        if not name.startswith("artifacts/built"):
            assert (ROOT / name).exists(), f"{document}: {name}"


def test_threats_have_an_answer_each() -> None:
    text = (ROOT / "docs" / "threats.md").read_text("utf-8")
    for part in ("Recipe", "Checkpoint", "Artifact", "Generation"):
        table = section(text, f"## {part}")
        rows = re.findall(r"^\| (?!---|what comes in)(.+?) \| (.+?) \| (.+?) \|$", table, re.MULTILINE)
        assert len(rows) >= 8
        for threat, answer, shown in rows:
            assert len(answer) > 10, threat
            assert "`tests/" in shown or shown.startswith("argued: "), threat


def test_the_readme_names_every_command_and_make_target() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    cli = (ROOT / "compiler" / "cli.py").read_text("utf-8")
    for name in re.findall(r'command\("(\w+)"', cli):
        assert f"ingot {name}" in text, name
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    for target in set(phony.group(1).split()) - {"help", "types"}:
        assert f"make {target}" in text, target


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "__init__.py").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
