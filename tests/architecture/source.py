"""The product's source files as parsed trees, for the tests beside this."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The floors, lowest first, and what stands beside them. An import may only point to a lower one.
FLOORS = ("artifacts", "runtime", "passes", "compiler")
FOLDERS = (*FLOORS, "benchmarks", "recipes")


@functools.cache
def files(*folders: str) -> tuple[Path, ...]:
    """Every .py file of these folders of the repository, relative to its root; builds and caches are left out."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    built = ROOT / "artifacts" / "built"
    return tuple(sorted(path.relative_to(ROOT) for path in found if built not in path.parents))


@functools.cache
def tree(path: Path) -> ast.Module:
    """One file, parsed."""
    return ast.parse((ROOT / path).read_text("utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, in functions too; ours begin with "ingot.".

    `from a import b` counts as a.b: b may be a module.
    """
    package = ["ingot", *path.parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])


def within(module: str, *names: str) -> bool:
    """Whether a module is one of these or below one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)
