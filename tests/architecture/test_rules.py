"""House rules that no linter knows: data never executes anything, and wrong input is never met by an assert."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .source import FLOORS, files, imports, tree, within

# Each of these runs code out of the file that it reads.
EXECUTING = (
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "torch.load",
    "torch.export.load",
    "torch.jit",
)


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every call in a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_nothing_is_unpickled() -> None:
    product = files(*FLOORS, "benchmarks")
    wrong = [f"{p}:{line}: {m}" for p in product for line, m in imports(p) if within(m, *EXECUTING)]
    wrong += [f"{p}:{line}: {name}" for p in product for line, name in calls(p) if within(name, *EXECUTING)]
    assert wrong == []


def test_no_text_is_evaluated() -> None:
    wrong = [
        f"{p}:{line}: {name}" for p in files(*FLOORS) for line, name in calls(p) if name in ("eval", "exec", "compile")
    ]
    assert wrong == []


def test_numpy_reads_no_pickles() -> None:
    loads = [(p, node) for p in files(*FLOORS, "benchmarks") for node in ast.walk(tree(p))
             if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load")]  # fmt: skip
    for path, node in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("allow_pickle") == "False", f"{path}:{node.lineno}"


def test_no_remote_code_is_asked_for() -> None:
    for path in files(*FLOORS, "benchmarks"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", f"{path}:{node.value.lineno}"


def test_no_shell() -> None:
    for path in files(*FLOORS, "benchmarks"):
        for node in ast.walk(tree(path)):
            assert not (isinstance(node, ast.keyword) and node.arg == "shell"), f"{path}: shell="
        assert not [name for _, name in calls(path) if name in ("os.system", "os.popen")], path


@pytest.mark.parametrize("floor", [*FLOORS, "benchmarks"])
def test_no_assert_stands_in_the_product(floor: str) -> None:
    wrong = [f"{p}:{n.lineno}" for p in files(floor) for n in ast.walk(tree(p)) if isinstance(n, ast.Assert)]
    assert wrong == []


def test_no_error_is_swallowed() -> None:
    wrong = []
    for path in files(*FLOORS, "benchmarks"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
                idle = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
                wrong += [f"{path}:{node.lineno}"] if idle else []
    assert wrong == []
