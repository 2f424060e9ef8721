"""The root folder is the package: what is listed in pyproject.toml and what stands in the folders is the same."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from .source import FOLDERS, ROOT, files, tree

# An overlong file has two ideas in it.
MOST_LINES = 320


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_packages_are_the_folders_with_an_init(project: dict[str, Any]) -> None:
    found = {".".join(["ingot", *path.parent.parts]) for path in files(*FOLDERS) if path.name == "__init__.py"}
    assert sorted({"ingot", *found}) == project["tool"]["setuptools"]["packages"]


def test_every_module_is_in_a_package() -> None:
    # The scripts that made the bundled model are shipped beside it as data; they are run, not imported.
    homeless = [path for path in files(*FOLDERS) if not (ROOT / path.parent / "__init__.py").is_file()]
    assert {path.parent for path in homeless} == {Path("recipes/demo_model")}


def test_the_root_holds_no_module_but_the_package_itself() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_every_data_file_is_shipped(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, globs in patterns.items()
        for pattern in globs
        for path in (ROOT / Path(*package.split(".")[1:])).glob(pattern)
    }
    wanted = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".toml", ".json", ".jsonl", ".jinja", ".cpp", ".h", ".safetensors")
        and not {"built", "results", "__pycache__"} & set(path.relative_to(ROOT).parts)
    }
    assert wanted - shipped == set()


def test_every_dependency_has_a_pinned_version(project: dict[str, Any]) -> None:
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    named = {re.split(r"[^A-Za-z0-9_-]", item)[0] for group in groups for item in group} - {"ingot"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    assert named - pinned == set()
    assert all("==" in line or line.startswith("#") or not line for line in lines)


@pytest.mark.parametrize("path", files(*FOLDERS), ids=str)
def test_a_module_says_what_it_is_for_and_stays_short(path: Path) -> None:
    text = (ROOT / path).read_text("utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    if text.strip():
        assert ast.get_docstring(tree(path)), "it has no docstring"
