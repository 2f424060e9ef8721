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
from ingot.runtime.ops.cuda.spec import TRITON_DTYPES, KernelCall, Lowering, Operands, TensorSpec

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from ingot.runtime.ops.cuda import linear
from ingot.runtime.ops.cuda.linear_configs import MOST_CANDIDATES, split_count

PLAIN = {
    "eps": 1e-5,
    "offset": 0.0,
    "narrow_first": True,
    "activation": "",
    "gate_first": True,
    "wide": False,
    "format": "",
    "activations": "",
}
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
    return Operands(tensors, values, {"out": out}, frozenset({"weight", "norm_weight"}))


def compile_for_hopper(call: KernelCall, operands: Operands, lowering: Lowering) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    names = call.function.arg_names
    types: dict[str, Any] = {**operands.tensors, **operands.outputs, **lowering.scratch}
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


def inspect(tool: str, options: list[str], cubin: bytes, folder: Path) -> str:
    """What a tool that Triton brings says of a cubin."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [getattr(knobs.nvidia, tool).path, *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def local_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of registers spilled to memory."""
    usage = inspect("cuobjdump", ["--dump-resource-usage"], cubin, folder)
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
    assert 1 <= len(configs) <= MOST_CANDIDATES
    assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs)
    kinds = {config["kind"] for config in configs}
    assert kinds - {"tma"} == (
        {"gemm"} if m > 64 else {"gemv"} if m == 1 else {"gemv", "skinny"} if m <= 4 else {"skinny"}
    )
    item = 4 if dtype == "float32" else 2
    assert ("tma" in kinds) == (m > 64 and item == 2 and not {"bias", "wide"} & fused.keys() and k % 8 == 0)
    for config in configs:
        blocks: Any = config
        if config["kind"] != "gemv":
            halves = 2 if fused.get("activation") and config["kind"] == "skinny" else 1
            tile = blocks["block_m"] + blocks["block_n"] * halves
            assert blocks["num_stages"] * tile * blocks["block_k"] * item <= HOPPER_SHARED_BYTES
        lowering = linear.lower(operands, config)
        behind = config["kind"] == "tma" and "activation" in fused
        assert len(lowering.calls) == 1 + bool(config.get("apart")) + behind
        call = lowering.calls[-2 if behind else -1]
        before = [other for other in lowering.calls if other is not call]
        assert call.read_bytes == n * k * item and not any(other.read_bytes for other in before)
        named = {name for name, spec in operands.tensors.items() if spec} | {"out"} | set(lowering.scratch)
        for each in lowering.calls:
            assert each.dependent
            assert set(each.pointers.values()) <= named
            assert set(each.pointers) | set(each.constants) == set(each.function.arg_names)
            assert [name for name in each.function.arg_names if name in each.pointers] == list(each.pointers)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_what_is_asked_for_ahead_lies_within_the_weight(layer, m):
    n, k, fused = LAYERS[layer]
    operands = operands_of(m, n, k, **fused)
    for config in linear.candidates(operands):
        call = linear.lower(operands, config).calls[-1]
        constants = call.constants
        assert constants["AHEAD"] * 2 % 16 == 0
        if config["kind"] == "gemv":
            assert constants["AHEAD"] + constants["TILES"] * constants["BLOCK_K"] * bool(constants["AHEAD"]) <= k
            assert 0 <= constants["WAVE"] <= call.grid[0] // 2
        else:
            part = -(-k // constants["BLOCK_K"]) // constants["SPLITS"] * constants["BLOCK_K"]
            assert part * (constants["SPLITS"] - 1) + constants["AHEAD"] <= k
    # Rows that do not start at 16 bytes cannot be asked for.
    odd = operands_of(m, n, k + 2, **fused)
    for config in linear.candidates(odd):
        assert not config["ahead"] and not config.get("wave")


def test_splits_of_k_are_equal_parts_of_two_steps_or_more():
    for steps in range(1, 130):
        for most in range(10):
            splits = split_count(most, steps)
            assert splits >= 1 and steps % splits == 0
            assert splits == 1 or (splits <= most and steps // splits >= 2)


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
@pytest.mark.parametrize("m", [1, 16, 64, 128])
def test_hopper_code_is_vectorized_and_spills_nothing(layer, m, tmp_path):
    n, k, fused = LAYERS[layer]
    operands = operands_of(m, n, k, **(fused | {"norm": fused.get("norm", False) and m <= 64}))
    for config in linear.candidates(operands):
        lowering = linear.lower(operands, config)
        for call in lowering.calls:
            kernel = compile_for_hopper(call, operands, lowering)
            assert kernel.metadata.shared <= HOPPER_SHARED_BYTES
            assert local_bytes(kernel.asm["cubin"], tmp_path) == 0
            before, after = kernel.asm["ptx"].split("griddepcontrol.wait", 1)
            assert "griddepcontrol.launch_dependents" in before
            assert "st.global" not in before
            if call.function.__name__ == "tma_gemm":
                assert "cp.async.bulk.tensor" in after and "wgmma.mma_async" in after
        asks = bool(config.get("ahead") or config.get("wave"))
        assert ("cp.async.bulk.prefetch.L2" in before) == asks
        if m == 1:
            # Nothing of the weight is read narrower than 16 bytes a thread.
            assert not re.search(r"ld\.global\S*evict_first(?!\S*v4\.b32)", before + after)
            _held_before_the_wait(call, inspect("nvdisasm", ["-c"], kernel.asm["cubin"], tmp_path), asks)
        elif config["kind"] != "tma":
            assert re.search(r"cp\.async\.cg\.shared\.global \[[^,]*, \[[^,]*, 0x10", after)
            assert "cp.async.ca" not in after
            assert "wgmma.mma_async" in after


def _held_before_the_wait(call: KernelCall, code: str, asks: bool) -> None:
    """In the machine code, all that a program can hold of the weight is loaded before the wait, hints come first."""
    loads = [found.start() for found in re.finditer(r"LDG\.E\.EF\.128", code)]
    wait = code.index("ACQBULK")
    constants = call.constants
    rows = constants["BLOCK_N"] * (2 if constants["ACTIVATION"] else 1)
    held = rows * constants["TILES"] * constants["BLOCK_K"] * 2 // (16 * constants["THREADS"])
    assert sum(place < wait for place in loads) == held
    assert not asks or code.index("UBLKPF") < loads[0]


@pytest.mark.parametrize("m", [1, 16, 128])
def test_a_weight_that_a_launch_may_write_is_read_after_the_wait(m):
    operands = operands_of(m, 256, 512, norm=m <= 64)
    for stable in ((), ("norm_weight",)):
        unstable = Operands(operands.tensors, operands.values, operands.outputs, frozenset(stable))
        lowering = linear.lower(unstable, linear.candidates(unstable)[0])
        code = compile_for_hopper(lowering.calls[-1], unstable, lowering).asm["ptx"]
        before, _after = code.split("griddepcontrol.wait", 1)
        assert not re.search(r"ld\.global|cp\.async(?!\.bulk\.(commit|wait))|prefetch", before)


def test_descriptors_of_the_copy_engine_lie_in_memory_of_their_own():
    from ingot.compiler.backends.cuda.kernels import KernelStore

    operands = operands_of(200, 256, 128)
    config = next(c for c in linear.candidates(operands) if c["kind"] == "tma")
    (call,) = linear.lower(operands, config).calls
    kernel = KernelStore(90).add(call, [torch.bfloat16] * len(call.pointers), [True] * len(call.pointers))
    # x, weight and result, 128 bytes each, for every program; behind it one pointer that is null.
    assert (kernel.scratch_bytes, kernel.hidden) == (3 * 128, 1)
