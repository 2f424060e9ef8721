"""CUDA provider of `fused_linear`: which of the kernels serves a call, and how it is launched.

One row of x goes to `gemv`, up to 64 rows to `skinny` (or a few to `gemv`), more to `tma_gemm` or `gemm`. With
quantized weights one row goes to either, and more than one to `skinny`, or to `gemm` if x is to be quantized as well.
`candidates` only lists what is worth measuring on the target.
"""

from __future__ import annotations

import math
from typing import Any

from ..quantized import FP8_MOST, INT8_MOST
from .gemm import gemm
from .gemv import gemv
from .linear_configs import GEMV_ROWS, MOST_CANDIDATES, gemv_configs, power_of_two, skinny_configs
from .linear_prefill_configs import gemm_configs, tall_configs, tma_configs
from .linear_problem import DECODE_ROWS, Problem, problem_of
from .skinny import prepare, skinny
from .spec import Config, KernelCall, Lowering, Operands, Scratch
from .tma_gemm import activate_product, tma_gemm

_KERNELS = {"gemv": gemv, "skinny": skinny, "gemm": gemm, "tma": tma_gemm}
# What the programs that share a tile leave to each other.
_SPLIT_SCRATCH = {
    "gemv": (),
    "skinny": ("partial", "partial_squares", "arrivals"),
    "gemm": ("partial", "arrivals"),
    "tma": (),
}


def candidates(operands: Operands) -> list[Config]:
    """Configurations worth measuring for this call, at most 5, best guess first.

    Raises:
        ValueError: the operands are not what the kernels take; the message says which.
    """
    problem = problem_of(operands)
    if problem.activations:
        return gemm_configs(problem)
    if problem.m > DECODE_ROWS and problem.format:
        return tall_configs(problem)
    if problem.m > DECODE_ROWS:
        return (tma_configs(problem) + gemm_configs(problem))[:MOST_CANDIDATES]
    if problem.m == 1:
        # The plain cores are hard put to keep up with memory where a byte holds one weight or two.
        return (gemv_configs(problem)[:3] + skinny_configs(problem)[:2]) if problem.format else gemv_configs(problem)
    if problem.m <= GEMV_ROWS and not problem.format:
        return (skinny_configs(problem)[:3] + gemv_configs(problem)[:2])[:MOST_CANDIDATES]
    return skinny_configs(problem)


def lower(operands: Operands, config: Config) -> Lowering:
    """The launch that computes the call with one of its `candidates`, behind one for the norm if that is `apart`.

    Raises:
        ValueError: the operands are not what the kernels take, or the configuration is not for them.
    """
    problem = problem_of(operands)
    kind = str(config.get("kind"))
    if kind not in _KERNELS:
        raise ValueError(f"fused_linear has no kernel {kind!r}; kinds are {', '.join(_KERNELS)}")
    if kind == "skinny" and problem.m > int(config["block_m"]) and not problem.format:
        raise ValueError(f"fused_linear: {problem.m} rows of x do not fit a skinny tile of {config['block_m']}")
    if problem.activations and kind != "gemm":
        raise ValueError(f"fused_linear: no kernel {kind} for activations of {problem.activations}")
    if kind == "gemm" and problem.format and not problem.activations:
        raise ValueError("fused_linear: the gemm kernel takes quantized weights with activations like them alone")
    if kind in ("gemm", "tma") and problem.normed and not problem.activations:
        raise ValueError(f"fused_linear: the {kind} kernel has no norm in front; normalize x before it")
    if kind == "tma" and not problem.tileable:
        raise ValueError("fused_linear: the copy engine takes none of these operands")
    apart = bool(config.get("apart")) or problem.activations != ""
    scratch: dict[str, Scratch] = {}
    calls: list[KernelCall] = []
    if apart:
        dtype = problem.stored if problem.activations else problem.dtype
        scratch["rows"] = Scratch((problem.m, problem.k), dtype)
        if problem.activations:
            scratch["row_scale"] = Scratch((problem.m,), "float32")
        calls.append(_prepared(operands, problem))
    if kind == "tma" and problem.activation:
        scratch["product"] = Scratch((problem.m, problem.n), problem.dtype)
    calls.append(_product(operands, problem, config, problem.normed and not apart, scratch))
    if "product" in scratch:
        calls.append(_activation(operands, problem))
    return Lowering(tuple(calls), scratch)


def _prepared(operands: Operands, problem: Problem) -> KernelCall:
    """The norm alone, from x into the scratch "rows", quantized with the scales "row_scale" where that is asked for."""
    most = {"int8": INT8_MOST, "fp8": FP8_MOST}.get(problem.activations, 0.0)
    constants = {
        **_norm_constants(operands),
        "K": problem.k,
        "X_STRIDE": problem.x_stride,
        "HAS_GAIN": problem.normed,
        "MOST": most,
        "BLOCK_K": power_of_two(problem.k),
        "EARLY": not problem.normed or "norm_weight" in operands.stable,
        "PDL": True,
    }
    pointers = {"x": "x", "gain": "norm_weight" if problem.normed else "x", "rows": "rows"}
    what = "+".join(("norm",) * problem.normed + (problem.activations,) * bool(most))
    return KernelCall(
        function=prepare,
        grid=(problem.m, 1, 1),
        pointers=pointers | {"row_scale": "row_scale" if most else "x"},
        constants=constants,
        num_warps=4 if problem.k <= 4096 else 8,
        dependent=True,
        label=f"fused_linear {what} of {problem.m}x{problem.k}",
    )


def _activation(operands: Operands, problem: Problem) -> KernelCall:
    """The gated activation alone, from the scratch "product"."""
    block = min(1024, power_of_two(problem.columns))
    return KernelCall(
        function=activate_product,
        grid=(problem.m, math.ceil(problem.columns / block), 1),
        pointers={"product": "product", "out": "out"},
        constants={
            "COLUMNS": problem.columns,
            "ACTIVATION": problem.activation,
            "GATE_FIRST": bool(operands.values["gate_first"]),
            "BLOCK": block,
            "PDL": True,
        },
        dependent=True,
        label=f"fused_linear {problem.activation} of {problem.m}x{problem.n}",
    )


def _norm_constants(operands: Operands) -> dict[str, Any]:
    values = operands.values
    return {
        "EPS": float(values["eps"]),
        "OFFSET": float(values["offset"]),
        "ROUND_GAIN": bool(values["narrow_first"]),
    }


def _product(
    operands: Operands, problem: Problem, config: Config, normed: bool, scratch: dict[str, Scratch]
) -> KernelCall:
    """The launch of `gemv`, `skinny` or `gemm`; adds what it needs to `scratch`, where "rows" stands for x."""
    kind = str(config["kind"])
    bias, residual, zero = (operands.tensors.get(name) for name in ("bias", "residual", "zero"))
    x_stride = problem.k if "rows" in scratch else problem.x_stride
    block_n, splits = int(config["block_n"]), int(config.get("splits", 1))
    reach = max(problem.n * problem.k, problem.m * max(x_stride, problem.residual_stride, problem.columns))
    constants: dict[str, Any] = {
        "M": problem.m,
        "N": problem.n,
        "K": problem.k,
        "X_STRIDE": x_stride,
        "R_STRIDE": problem.residual_stride,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": problem.activation,
        "GATE_FIRST": bool(operands.values["gate_first"]),
        "WIDE_OFFSETS": reach >= 1 << 31,
        "BLOCK_N": block_n,
        "BLOCK_K": int(config["block_k"]),
        "PDL": True,
    }
    tiles = math.ceil(problem.columns / block_n)
    rows = block_n * problem.gated
    # An absent operand's pointer is never followed.
    x = "rows" if "rows" in scratch else "x"
    pointers = {"x": x, "weight": "weight", "bias": "bias" if bias else "x"}
    if kind == "gemm":
        block_m = int(config["block_m"])
        tiles = math.ceil(problem.m / block_m) * math.ceil(problem.columns / (block_n // problem.gated))
        constants |= {"BLOCK_M": block_m, "GROUP": int(config["group"]), "SPLITS": splits, "FORMAT": problem.format}
        rows = block_n
    elif kind == "tma":
        tiles = int(config["programs"])
        # The copy engine counts for itself, and an activation comes behind.
        for name in ("WIDE_OFFSETS", "ACTIVATION", "GATE_FIRST"):
            del constants[name]
        constants |= {"BLOCK_M": int(config["block_m"]), "GROUP": int(config["group"]), "PROGRAMS": tiles}
    else:
        pointers["gain"] = "norm_weight" if normed else "x"
        paired = kind == "gemv" and problem.paired
        needed = {"weight", "norm_weight"} if normed else {"weight"}
        needed |= {"scale", "zero"} & {name for name, spec in operands.tensors.items() if spec is not None}
        constants |= _norm_constants(operands) | {
            "HAS_GAIN": normed,
            "AHEAD": int(config["ahead"]),
            "VECTOR": min(16 // problem.item_bytes, int(config["block_k"])) // (1 + paired),
            "THREADS": 32 * int(config["num_warps"]),
            "EARLY": needed <= operands.stable,
        }
        constants |= {
            "FORMAT": problem.format,
            "SCALE_ROWS": problem.group[0],
            "SCALE_COLUMNS": problem.group[1],
            "HAS_ZERO": zero is not None,
        }
    pointers["residual"] = "residual" if residual else "x"
    if kind == "skinny":
        block_m = int(config["block_m"])
        tiles *= math.ceil(problem.m / block_m)
        constants |= {"BLOCK_M": block_m, "SPLITS": splits, "GROUPED": problem.grouped}
    elif kind == "gemv":
        constants |= {"TILES": int(config["tiles"]), "WAVE": int(config["wave"]), "PAIRED": paired}
        if problem.format:
            constants["VECTOR"] = int(config["vector"])
    if splits > 1:
        scratch["partial"] = Scratch((tiles * splits, rows, block_m), "float32")
        scratch["arrivals"] = Scratch((tiles,), "int32", zeroed=True)
        if normed:
            scratch["partial_squares"] = Scratch((tiles * splits, block_m), "float32")
    if kind != "tma":
        pointers["scale"] = "scale" if problem.format else "x"
    if kind == "gemm":
        pointers["row_scale"] = "row_scale" if problem.activations else "x"
    elif kind != "tma":
        pointers["zero"] = "zero" if zero else "x"
    for name in _SPLIT_SCRATCH[kind]:
        pointers[name] = name if name in scratch else "out"
    return KernelCall(
        function=_KERNELS[kind],
        grid=(tiles * splits, 1, 1),
        pointers=pointers | {"out": "product" if "product" in scratch else "out"},
        constants=constants,
        num_warps=int(config["num_warps"]),
        num_stages=int(config["num_stages"]),
        dependent=True,
        read_bytes=problem.read_bytes,
        label=" ".join(("fused_linear", f"{problem.n}x{problem.k}", "+".join(problem.flags))).strip(),
    )
