"""Imports point down, and the lean floors stay lean: in the source, and in a fresh process after a generation."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .source import FLOORS, FOLDERS, files, imports, tree, within

LEAN = ("artifacts", "runtime")


@pytest.mark.parametrize("floor", FLOORS)
def test_no_import_points_up(floor: str) -> None:
    above = [f"ingot.{name}" for name in ("benchmarks", *FLOORS[FLOORS.index(floor) + 1 :])]
    wrong = [f"{path}:{line}: {module}" for path in files(floor) for line, module in imports(path)
             if within(module, *above)]  # fmt: skip
    assert wrong == []


def test_our_own_modules_are_imported_relatively() -> None:
    # An absolute `ingot.…` would find an installed Ingot in place of the file next door.
    wrong = []
    for path in files(*FOLDERS):
        for node in ast.walk(tree(path)):
            absolute = isinstance(node, ast.ImportFrom) and not node.level and within(node.module or "", "ingot")
            plain = isinstance(node, ast.Import) and any(within(alias.name, "ingot") for alias in node.names)
            wrong += [f"{path}:{node.lineno}"] if absolute or plain else []  # type: ignore[attr-defined]
    assert wrong == []


def test_the_contract_floor_is_the_standard_library() -> None:
    known = {*sys.stdlib_module_names, "ingot"}
    wrong = [f"{path}:{line}: {module}" for path in files("artifacts") for line, module in imports(path)
             if module.split(".")[0] not in known]  # fmt: skip
    assert wrong == []


def test_torch_is_met_in_the_ops_alone() -> None:
    ops = Path("runtime/ops")
    wrong = [
        f"{path}:{line}: {module}"
        for path in files(*LEAN)
        for line, module in imports(path)
        if ops not in path.parents
        and within(module, "torch", "transformers", "onnx", "safetensors", "ingot.runtime.ops")
    ]
    assert wrong == []


def test_the_ops_know_no_compiler() -> None:
    compilers = ("torch._inductor", "torch._dynamo", "torch.export", "torch.fx", "transformers")
    wrong = [f"{path}:{line}: {module}" for path in files("runtime/ops") for line, module in imports(path)
             if within(module, *compilers)]  # fmt: skip
    assert wrong == []


def loaded(code: str, *arguments: str) -> set[str]:
    """The modules a fresh process has loaded after running `code`."""
    tail = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code + tail, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> list[str]:
    """Those of the modules that no lean process may load."""
    names = ("torch", "transformers", "onnx", "safetensors", "huggingface_hub", "jinja2", "rich")
    return sorted(m for m in modules if within(m, *names, "ingot.compiler", "ingot.passes", "ingot.runtime.ops"))


@pytest.mark.parametrize("module", ["ingot", "ingot.artifacts.store", "ingot.runtime", "ingot.runtime.engines.aoti"])
def test_an_import_is_lean(module: str) -> None:
    modules = loaded(f"import {module}")
    assert module in modules
    assert heavy(modules) == []


def test_the_contract_floor_loads_no_numpy() -> None:
    assert "numpy" not in loaded("import ingot.artifacts.store, ingot.artifacts.target")


def test_a_generation_is_lean(demo_artifact: Path) -> None:
    code = """
import sys
from ingot.runtime import LLM, SamplingParams
with LLM(sys.argv[1]) as llm:
    assert llm.generate("Once upon a time", SamplingParams(max_tokens=5, seed=1))[0].outputs[0].token_ids
    assert llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=3))[0].outputs[0].token_ids
    assert list(llm.stream([1, 5, 7], SamplingParams(max_tokens=3, stop="x", logprobs=2)))
"""
    modules = loaded(code, str(demo_artifact))
    assert {"ingot.runtime.engines.aoti", "tokenizers"} <= modules
    assert heavy(modules) == []


def test_a_generation_works_where_torch_cannot_be_imported(demo_artifact: Path) -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from ingot.runtime import LLM, SamplingParams
with LLM(sys.argv[1]) as llm:
    print(len(llm.generate([[1, 5, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", code, str(demo_artifact)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4", done.stderr
