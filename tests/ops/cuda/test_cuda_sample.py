"""The CUDA sampler: tokens as the reference gives them, and code that waits before it touches what others write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ingot.runtime.ops.cuda.spec import TRITON_DTYPES, Lowering, Operands, TensorSpec

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

DTYPES = {
    "logits": "float32", "temperature": "float32", "top_k": "int32", "top_p": "float32", "min_p": "float32",
    "seeds": "int64", "positions": "int64", "out0": "int64", "out1": "float32", "input.tokens": "int64",
    "input.positions": "int64",
}  # fmt: skip
PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")


def operands_of(batch: int, vocabulary: int, stable: tuple[str, ...] = (), **changed: TensorSpec | None) -> Operands:
    tensors: dict[str, TensorSpec | None] = {name: TensorSpec((batch,), (1,), DTYPES[name]) for name in PARAMETERS}
    tensors["logits"] = TensorSpec((batch, vocabulary), (vocabulary, 1), "float32")
    outputs = {name: TensorSpec((batch,), (1,), DTYPES[name]) for name in ("out0", "out1")}
    return Operands({**tensors, **changed}, {}, outputs, frozenset(stable))


def compile_to_ptx(lowering: Lowering) -> str:
    import triton
    from triton.backends.compiler import GPUTarget

    (call,) = lowering.calls
    assert call.dependent
    dtypes = {**DTYPES, **{name: made.dtype for name, made in lowering.scratch.items()}}
    names = call.function.arg_names
    source = triton.compiler.ASTSource(
        fn=call.function,
        signature={
            n: f"*{TRITON_DTYPES[dtypes[call.pointers[n]]]}" if n in call.pointers else "constexpr" for n in names
        },
        constexprs=dict(call.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in call.pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": call.num_warps}).asm["ptx"]


def test_tokens_are_the_references_in_the_interpreter():
    script = Path(__file__).with_name("sample_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {name: rows for name, rows in json.loads(ran.stdout).items() if rows} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tokens_are_the_references_on_the_gpu():
    from .sample_cases import run_cases

    assert {name: rows for name, rows in run_cases("cuda").items() if rows} == {}


@pytest.mark.parametrize("vocabulary", [50257, 128256, 151936])
def test_it_compiles_for_hopper(vocabulary):
    from ingot.runtime.ops.cuda.sample import candidates, lower

    operands = operands_of(2, vocabulary)
    (config,) = candidates(operands)
    lowering = lower(operands, config)
    ptx = compile_to_ptx(lowering)
    assert ("ld.global.v4.b32" in ptx) == (vocabulary % 4 == 0)
    assert ".local" not in ptx
    before, after = ptx.split("griddepcontrol.wait;")
    assert touched(before) == []
    assert set(touched(after)) == {"ld", "st", "atom"}


def test_parameters_that_no_launch_writes_are_read_before_it_waits():
    from ingot.runtime.ops.cuda.sample import candidates, lower

    operands = operands_of(2, 50257, stable=PARAMETERS)
    ptx = compile_to_ptx(lower(operands, candidates(operands)[0]))
    before, _ = ptx.split("griddepcontrol.wait;")
    assert touched(before) == ["ld"] * len(PARAMETERS)
    operands = operands_of(2, 50257, stable=PARAMETERS[:-1])
    assert lower(operands, candidates(operands)[0]).calls[0].constants["EARLY"] is False


def test_with_advance_it_stores_two_numbers_more():
    from ingot.runtime.ops.cuda.sample import candidates, lower, with_advance

    operands = operands_of(2, 50257)
    plain = lower(operands, candidates(operands)[0])
    advancing = with_advance(plain, "input.tokens", "input.positions")
    counts = [touched(compile_to_ptx(lowering)).count("st") for lowering in (plain, advancing)]
    assert counts[1] == counts[0] + 2


def touched(ptx: str) -> list[str]:
    """Accesses to global memory, in order."""
    return re.findall(r"(ld|st|atom)\.global", ptx)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": TensorSpec((2, 50), (50, 1), "bfloat16")}, "logits"),
        ({"logits": TensorSpec((2, 50), (100, 2), "float32")}, "neighbouring"),
        ({"logits": TensorSpec((2, 1 << 21), (1 << 21, 1), "float32")}, "neighbouring"),
        ({"top_k": TensorSpec((2,), (1,), "int64")}, "top_k"),
        ({"seeds": TensorSpec((3,), (1,), "int64")}, "seeds"),
        ({"positions": None}, "positions"),
    ],
)
def test_operands_it_cannot_take_are_refused(changed, message):
    from ingot.runtime.ops.cuda.sample import candidates, lower

    operands = operands_of(2, 50, **changed)
    with pytest.raises(ValueError, match=f"sample: .*{message}"):
        lower(operands, candidates(operands)[0])
