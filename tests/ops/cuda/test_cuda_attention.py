"""The CUDA attention kernels: results as the reference gives them, and code fit for Hopper."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.runtime.ops.cuda.spec import TRITON_DTYPES, KernelCall, Lowering, Operands, TensorSpec

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def contiguous(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return TensorSpec(shape, tuple(reversed(strides)), dtype)


STABLE = frozenset({"k_cache", "v_cache", "block_tables", "positions", "cos", "sin", "q_norm", "k_norm"})


def attention(
    op: str, heads: int, kv_heads: int, dim: int, batch: int = 1, length: int = 1, norm: bool = False, **changed: Any
) -> Operands:
    """A call whose q, k and v are slices of one product, with room for 2,048 tokens and RoPE's whole tables."""
    dtype = changed.pop("dtype", "bfloat16")
    width = (heads + 2 * kv_heads) * dim
    cut = (length * width, dim, width, 1)
    tensors: dict[str, TensorSpec | None] = {
        "q": TensorSpec((batch, heads, length, dim), cut, dtype),
        "k_cache": contiguous(300, 16, kv_heads, dim, dtype=dtype),
        "v_cache": contiguous(300, 16, kv_heads, dim, dtype=dtype),
        "block_tables": contiguous(batch, 128, dtype="int32"),
        "positions": contiguous(batch, length, dtype="int64"),
        "sinks": None,
    }
    values = {"scale": dim**-0.5, "window": 0, "softcap": 0.0}
    if op == "attention_step":
        tensors |= {name: TensorSpec((batch, kv_heads, length, dim), cut, dtype) for name in ("k", "v")}
        tensors |= {name: contiguous(2048, dim, dtype=dtype) for name in ("cos", "sin")}
        tensors |= {name: contiguous(dim, dtype=dtype) if norm else None for name in ("q_norm", "k_norm")}
        values |= {"eps": 1e-6, "offset": 0.0, "narrow_first": True}
    values |= {name: changed.pop(name) for name in list(changed) if name in values}
    stable = changed.pop("stable", STABLE)
    return Operands(tensors | changed, values, {"out": contiguous(batch, length, heads, dim, dtype=dtype)}, stable)


def compiled(call: KernelCall, operands: Operands, lowering: Lowering) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    known: dict[str, Any] = {**operands.tensors, **operands.outputs, **lowering.scratch}
    names = call.function.arg_names
    assert set(names) == {*call.pointers, *call.constants}
    assert [n for n in names if n in call.pointers] == sorted(call.pointers, key=names.index)
    source = triton.compiler.ASTSource(
        fn=call.function,
        signature={
            n: f"*{TRITON_DTYPES[known[call.pointers[n]].dtype]}" if n in call.pointers else "constexpr" for n in names
        },
        constexprs=dict(call.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in call.pointers},
    )
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory a thread uses: what the registers could not hold."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(report.split("STACK:")[1].split()[0])


def test_results_are_the_references_in_the_interpreter():
    script = Path(__file__).with_name("attention_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {case: error for case, error in json.loads(ran.stdout).items() if not error <= 1} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_results_are_the_references_on_the_gpu():
    from .attention_cases import run_cases

    assert {case: error for case, error in run_cases("cuda").items() if not error <= 1} == {}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "norm"), [(32, 8, 64, False), (32, 8, 128, False), (16, 8, 128, True)]
)
def test_a_step_compiles_for_hopper(heads, kv_heads, dim, norm):
    from ingot.runtime.ops.cuda.attention_step import candidates, lower

    operands = attention("attention_step", heads, kv_heads, dim, norm=norm)
    for config in candidates(operands)[:2]:
        lowering = lower(operands, config)
        (call,) = lowering.calls
        kernel = compiled(call, operands, lowering)
        assert stack_bytes(kernel.asm["cubin"]) == 0
        assert kernel.metadata.shared <= 232_448
        sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", kernel.asm["ptx"])
        assert {int(size, 0) for size in sizes} == {16}


def reads_before_the_wait(written: set[str], preload: bool) -> dict[str, int]:
    """Accesses to global memory before the wait, by instruction, if all but `written` was there before the run."""
    from ingot.runtime.ops.cuda.attention_step import lower

    operands = attention("attention_step", 32, 8, 64, norm=True, stable=STABLE - written)
    lowering = lower(operands, {"splits": 16, "block": 64, "warps": 4, "stages": 3, "preload": preload, "carveout": -1})
    ptx = compiled(lowering.calls[0], operands, lowering).asm["ptx"]
    early = ptx[: ptx.index("griddepcontrol.wait")]
    touched = re.findall(r"prefetch\.global|(?:ld|st|atom|red|cp\.async)[.\w]*global[.\w]*", early)
    return {name: touched.count(name) for name in touched}


def test_before_it_waits_a_step_reads_what_nobody_writes():
    everything = reads_before_the_wait(set(), True)
    # The position; its place in the block table and the first tile's; keys and values; cosine, sine, four norms' parts.
    assert everything.keys() == {"ld.global.b64", "ld.global.b32", "ld.global.v4.b32"}
    assert everything["ld.global.v4.b32"] == 2 * 64 * 64 * 2 // (128 * 16)
    tile = reads_before_the_wait({"cos", "sin", "q_norm", "k_norm"}, True)
    assert tile == everything | {"ld.global.b32": everything["ld.global.b32"] - 6}
    ahead = reads_before_the_wait({"k_cache"}, True)
    assert ahead == reads_before_the_wait(set(), False)
    assert ahead.keys() == {"ld.global.b64", "ld.global.b32", "prefetch.global"}
    for written in ("positions", "block_tables"):
        assert reads_before_the_wait({written}, True) == {}


def waits_first(ptx: str) -> None:
    touched = re.search(r"(ld|st|atom|cp\.async)[.\w]*\.global", ptx)
    assert touched is not None
    assert 0 < ptx.index("griddepcontrol.wait") < touched.start()


@pytest.mark.parametrize(("op", "dim"), [("paged_attention", 128), ("cache_write", 80)])
def test_prefill_compiles_for_hopper(op, dim):
    from ingot.runtime.ops.cuda import cache_write, paged_attention

    if op == "paged_attention":
        operands = attention(op, 32, 8, dim, length=2048)
        lowering = paged_attention.lower(operands, paged_attention.candidates(operands)[0])
    else:
        x = TensorSpec((1, 8, 512, dim), (512 * 24 * dim, dim, 24 * dim, 1), "bfloat16")
        tensors = {"cache": contiguous(300, 16, 8, dim), "x": x, "slots": contiguous(512, dtype="int64")}
        operands = Operands(tensors, {}, {})
        lowering = cache_write.lower(operands, cache_write.candidates(operands)[0])
    kernel = compiled(lowering.calls[0], operands, lowering)
    ptx = kernel.asm["ptx"]
    assert stack_bytes(kernel.asm["cubin"]) == 0
    assert ("wgmma.mma_async" if op == "paged_attention" else "st.global.v4.b32") in ptx
    waits_first(ptx)


@pytest.mark.parametrize(("batch", "kv_heads", "splits"), [(1, 8, 16), (2, 8, 8), (8, 8, 4), (64, 8, 1), (1, 1, 64)])
def test_splits_fill_the_gpu(batch, kv_heads, splits):
    from ingot.runtime.ops.cuda.attention_step import candidates

    configs = candidates(attention("attention_step", 32, kv_heads, 128, batch=batch))
    assert configs[0]["splits"] == splits
    assert 1 < len(configs) <= 9
    assert all(configs.count(config) == 1 for config in configs)


def test_a_single_split_needs_no_scratch():
    from ingot.runtime.ops.cuda.attention_step import candidates, lower

    operands = attention("attention_step", 32, 8, 128, batch=4)
    assert lower(operands, {**candidates(operands)[0], "splits": 1}).scratch == {}
    scratch = lower(operands, candidates(operands)[0]).scratch
    assert [name for name, made in scratch.items() if made.zeroed] == ["arrivals"]


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("attention_step", {"length": 2}, "2 tokens a row"),
        ("attention_step", {"sin": None}, "cos and sin"),
        ("attention_step", {"k": None}, "'k'"),
        ("attention_step", {"sin": contiguous(1, 1, 1, 64)}, "neither"),
        ("attention_step", {name: contiguous(2048, 32) for name in ("cos", "sin")}, "tables of 64 columns"),
        ("attention_step", {"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ("attention_step", {"k_cache": contiguous(300, 16, 8, 64, dtype="float32")}, "k_cache is float32"),
        ("attention_step", {"v_cache": contiguous(300, 16, 4, 64)}, "caches"),
        ("paged_attention", {"k_cache": contiguous(300, 16, 8, 128)}, "caches"),
        ("paged_attention", {"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_calls_it_cannot_take_are_refused(op, changed, message):
    from ingot.runtime.ops.cuda import attention_step, paged_attention

    provider = attention_step if op == "attention_step" else paged_attention
    config = provider.candidates(attention(op, 32, 8, 64))[0]
    with pytest.raises(ValueError, match=message):
        provider.lower(attention(op, 32, 8, 64, **changed), config)
