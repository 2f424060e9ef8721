"""The CUDA kernels of `fused_linear`: right numbers, sane candidates, refusals, and machine code worth running."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.runtime.ops.cuda.spec import TRITON_DTYPES, KernelCall, Operands, TensorSpec

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from ingot.runtime.ops.cuda import linear

PLAIN = {"eps": 1e-5, "offset": 0.0, "narrow_first": True, "activation": "", "gate_first": True, "wide": False}
HOPPER_SHARED_BYTES = 232_448
# Llama-3.2-1B and Llama-3.1-8B: rows and columns of the weight, and what is fused.
LAYERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "1b-qkv": (3072, 2048, {"norm": True}),
    "1b-down": (2048, 8192, {"residual": True}),
    "8b-gate-up": (28672, 4096, {"norm": True, "activation": "silu"}),
    "8b-down": (4096, 14336, {"residual": True}),
    "8b-head": (128256, 4096, {"norm": True, "wide": True}),
}


def dense(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorSpec(shape, tuple(strides), dtype)


def operands_of(m: int, n: int, k: int, norm=False, residual=False, dtype="bfloat16", x=None, **values) -> Operands:
    values = PLAIN | values
    columns = n // 2 if values["activation"] else n
    tensors = {
        "x": x or dense(m, 1, k, dtype=dtype),
        "weight": dense(n, k, dtype=dtype),
        "bias": None,
        "norm_weight": dense(k, dtype=dtype) if norm else None,
        "residual": dense(m, 1, columns, dtype=dtype) if residual else None,
    }
    out = dense(m, 1, columns, dtype="float32" if values["wide"] else dtype)
    return Operands(tensors, values, {"out": out}, frozenset({"weight"}))


def compile_for_hopper(call: KernelCall, operands: Operands) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    names = call.function.arg_names
    types: dict[str, Any] = {**operands.tensors, **operands.outputs}
    source = triton.compiler.ASTSource(
        fn=call.function,
        signature={
            name: f"*{TRITON_DTYPES[types[call.pointers[name]].dtype]}" if name in call.pointers else "constexpr"
            for name in names
        },
        constexprs=dict(call.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in call.pointers},
    )
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def local_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of registers spilled to memory, from the tool that Triton brings."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def test_numbers_are_the_references_in_the_interpreter():
    script = Path(__file__).with_name("linear_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shares = json.loads(ran.stdout)
    assert {case: share for case, share in shares.items() if not share <= 1} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_numbers_are_the_references_on_the_gpu():
    from .linear_cases import run_cases

    assert {case: share for case, share in run_cases("cuda").items() if not share <= 1} == {}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("m", [1, 4, 8, 64, 2048])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_candidates_are_few_different_and_fit(layer, m, dtype):
    n, k, fused = LAYERS[layer]
    operands = operands_of(m, n, k, dtype=dtype, **(fused | {"norm": fused.get("norm", False) and m <= 64}))
    configs = linear.candidates(operands)
    assert 1 <= len(configs) <= 8
    assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs)
    kinds = {config["kind"] for config in configs}
    assert kinds <= ({"gemm"} if m > 64 else {"gemv"} if m == 1 else {"gemv", "skinny"} if m <= 8 else {"skinny"})
    item = 4 if dtype == "float32" else 2
    for config in configs:
        if config["kind"] != "gemv":
            blocks: Any = config
            halves = 2 if fused.get("activation") and config["kind"] == "skinny" else 1
            tile = blocks["block_m"] + blocks["block_n"] * halves
            assert blocks["num_stages"] * tile * blocks["block_k"] * item <= HOPPER_SHARED_BYTES
        (call,) = linear.lower(operands, config).calls
        assert call.dependent
        assert call.read_bytes == n * k * item
        assert set(call.pointers) | set(call.constants) == set(call.function.arg_names)
        assert [name for name in call.function.arg_names if name in call.pointers] == list(call.pointers)


def test_the_label_says_what_is_fused():
    operands = operands_of(1, 28672, 4096, norm=True, activation="silu")
    (call,) = linear.lower(operands, linear.candidates(operands)[0]).calls
    assert call.label == "fused_linear 28672x4096 norm+silu"


def test_rows_with_a_common_stride_are_taken_others_refused():
    row = TensorSpec((2, 4, 64), (4 * 96, 96, 1), "bfloat16")
    good = Operands(
        {**operands_of(8, 32, 64).tensors, "x": row}, PLAIN, {"out": TensorSpec((2, 4, 32), (128, 32, 1), "bfloat16")}
    )
    (call,) = linear.lower(good, linear.candidates(good)[0]).calls
    assert (call.constants["M"], call.constants["X_STRIDE"]) == (8, 96)
    for strides, message in (((1000, 96, 1), "no common stride"), ((4 * 192, 192, 2), "must be dense")):
        bad = Operands({**good.tensors, "x": TensorSpec((2, 4, 64), strides, "bfloat16")}, PLAIN, good.outputs)
        with pytest.raises(ValueError, match=message):
            linear.candidates(bad)


def test_what_no_kernel_computes_is_refused():
    good = operands_of(1, 32, 64)
    for name, spec in (
        ("weight", TensorSpec((32, 64), (1, 32), "bfloat16")),
        ("weight", dense(32, 64, dtype="float16")),
        ("weight", dense(32, 60)),
        ("x", None),
        ("bias", dense(31)),
        ("norm_weight", TensorSpec((64,), (2,), "bfloat16")),
        ("residual", dense(1, 1, 64)),
    ):
        with pytest.raises(ValueError, match="fused_linear"):
            linear.candidates(Operands({**good.tensors, name: spec}, good.values, good.outputs))
    with pytest.raises(ValueError, match="norm in front"):
        linear.candidates(operands_of(65, 32, 64, norm=True))
    with pytest.raises(ValueError, match="activation"):
        linear.candidates(operands_of(1, 33, 64, activation="silu"))
    with pytest.raises(ValueError, match="no kernel"):
        linear.lower(good, {"kind": "magic"})
    skinny = next(c for c in linear.candidates(operands_of(16, 32, 64)) if c["kind"] == "skinny")
    with pytest.raises(ValueError, match="do not fit"):
        linear.lower(operands_of(17, 32, 64), skinny)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("m", [1, 16, 2048])
def test_hopper_code_is_vectorized_and_spills_nothing(layer, m, tmp_path):
    n, k, fused = LAYERS[layer]
    operands = operands_of(m, n, k, **(fused | {"norm": fused.get("norm", False) and m <= 64}))
    (call,) = linear.lower(operands, linear.candidates(operands)[0]).calls
    kernel = compile_for_hopper(call, operands)
    assert kernel.metadata.shared <= HOPPER_SHARED_BYTES
    assert local_bytes(kernel.asm["cubin"], tmp_path) == 0
    before, after = kernel.asm["ptx"].split("griddepcontrol.wait", 1)
    assert "griddepcontrol.launch_dependents" in before
    assert "st.global" not in before
    if m == 1:
        # The first weights are on their way before the wait, 16 bytes a thread; nothing is read narrower in the loop.
        assert re.search(r"ld\.global\S*evict_first\S*v4\.b32", before)
        assert not re.search(r"ld\.global\S*evict_first(?!\S*v4\.b32)", before + after)
    else:
        assert ("prefetch.global.L2" in before) == (m == 16)
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^,]*, \[[^,]*, 0x10", after)
        assert "cp.async.ca" not in after
        assert "wgmma.mma_async" in after or (m == 16 and "mma.sync" in after)


@pytest.mark.parametrize("m", [1, 16, 128])
def test_a_weight_that_a_launch_may_write_is_read_after_the_wait(m):
    operands = operands_of(m, 256, 512)
    unstable = Operands(operands.tensors, operands.values, operands.outputs)
    (call,) = linear.lower(unstable, linear.candidates(unstable)[0]).calls
    before, _after = compile_for_hopper(call, unstable).asm["ptx"].split("griddepcontrol.wait", 1)
    assert not re.search(r"ld\.global|cp\.async|prefetch", before)
