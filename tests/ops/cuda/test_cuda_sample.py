"""The CUDA sampler and `advance`: tokens as the reference gives them, and code that waits before it reads."""

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
from ingot.runtime.ops.cuda.spec import TRITON_DTYPES, KernelCall, Operands, TensorSpec

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

DTYPES = {
    **{"logits": "float32", "temperature": "float32", "top_k": "int32", "top_p": "float32", "min_p": "float32"},
    **{"seeds": "int64", "positions": "int64", "out": "int64", "next_tokens": "int64", "tokens": "int64"},
}


def operands_of(batch: int, vocabulary: int, **changed: TensorSpec | None) -> Operands:
    rows = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    tensors: dict[str, TensorSpec | None] = {name: TensorSpec((batch,), (1,), DTYPES[name]) for name in rows}
    tensors["logits"] = TensorSpec((batch, vocabulary), (vocabulary, 1), "float32")
    return Operands({**tensors, **changed}, {}, {"out": TensorSpec((batch,), (1,), "int64")})


def compile_to_ptx(call: KernelCall, dtypes: dict[str, str]) -> str:
    import triton
    from triton.backends.compiler import GPUTarget

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
    (call,) = lowering.calls
    ptx = compile_to_ptx(call, {**DTYPES, **{name: made.dtype for name, made in lowering.scratch.items()}})
    assert ("ld.global.v4.b32" in ptx) == (vocabulary % 4 == 0)
    assert ".local" not in ptx
    assert_waits_first(ptx)


def test_advance_compiles_for_hopper():
    from ingot.runtime.ops.cuda.advance import lower_advance

    (call,) = lower_advance(64).calls
    assert call.dependent
    assert_waits_first(compile_to_ptx(call, DTYPES))


def assert_waits_first(ptx: str) -> None:
    touched = re.search(r"(ld|st|atom)\.global", ptx)
    assert touched is not None
    assert 0 < ptx.index("griddepcontrol.wait") < touched.start()


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
