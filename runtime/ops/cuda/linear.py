"""CUDA provider of `fused_linear`: which of the three kernels serves a call, and with which tiles.

One row of x goes to `gemv`, up to 64 rows to `skinny` (or a few to `gemv`), more to `gemm`. `candidates` only lists
what is worth measuring on the target; its order is an estimate from shapes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from .gemm import gemm
from .gemv import gemv, skinny
from .spec import Config, KernelCall, Lowering, Operands, TensorSpec

ACTIVATIONS = ("", "silu", "relu", "gelu", "gelu_tanh")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
DECODE_ROWS = 64
GEMV_ROWS = 8
MOST_CANDIDATES = 8

# Rows of the weight a program takes, bytes of each row it takes at once, warps. Best guess first for many rows; for
# few, one row per program fills the machine better.
_GEMV_TILES = ((2, 4096, 4), (4, 4096, 4), (1, 4096, 4), (4, 4096, 8), (2, 8192, 8), (1, 8192, 4), (4, 2048, 2))
# Rows of the weight, bytes of each row a step, warps, stages: for wide weights, then for those of few rows.
_SKINNY_TILES = (
    (64, 256, 4, 4),
    (128, 256, 8, 4),
    (64, 512, 4, 3),
    (128, 256, 4, 3),
    (64, 256, 4, 6),
    (128, 128, 4, 4),
)
_SKINNY_TILES_FEW = (
    (32, 512, 4, 4),
    (64, 256, 4, 6),
    (16, 512, 4, 6),
    (32, 256, 4, 6),
    (16, 1024, 4, 4),
    (64, 512, 4, 4),
)
# Rows of x, rows of the weight, columns a step, warps, stages, and the share of the matmul rate such a tile can reach.
_GEMM_TILES = (
    (128, 256, 64, 8, 4, 1.00),
    (128, 256, 64, 8, 3, 0.99),
    (256, 128, 64, 8, 4, 0.97),
    (256, 128, 64, 8, 3, 0.96),
    (128, 128, 64, 4, 3, 0.88),
    (128, 128, 64, 8, 4, 0.86),
    (64, 256, 64, 4, 4, 0.84),
    (64, 128, 64, 4, 5, 0.70),
    (128, 64, 64, 4, 5, 0.68),
    (64, 64, 128, 4, 4, 0.50),
)
# float32 has no tensor cores here: exact products on the plain cores, small tiles.
_SKINNY_TILES_EXACT = ((32, 128, 4, 3), (16, 128, 4, 3), (64, 64, 4, 3))
_GEMM_TILES_EXACT = ((64, 64, 16, 4, 3, 1.0), (128, 64, 16, 8, 3, 1.0), (32, 64, 32, 4, 3, 0.8))


@dataclass(frozen=True)
class _Problem:
    """What a call asks for: m rows of x [m, k] times weight [n, k], the result [m, columns]; strides in elements."""

    m: int
    n: int
    k: int
    columns: int
    item_bytes: int
    x_stride: int
    residual_stride: int
    normed: bool
    activation: str
    flags: tuple[str, ...]

    @property
    def gated(self) -> int:
        """Rows of the weight behind a column of the result."""
        return 2 if self.activation else 1


def candidates(operands: Operands) -> list[Config]:
    """Configurations worth measuring for this call, at most 8, best guess first.

    Raises:
        ValueError: the operands are not what the kernels take; the message says which.
    """
    problem = _problem(operands)
    if problem.m > DECODE_ROWS:
        found = _gemm_configs(problem)
    elif problem.m == 1:
        found = _gemv_configs(problem)
    elif problem.m <= GEMV_ROWS // 2:
        found = _gemv_configs(problem)[:4] + _skinny_configs(problem)[:4]
    elif problem.m <= GEMV_ROWS:
        found = _skinny_configs(problem)[:6] + _gemv_configs(problem)[:2]
    else:
        found = _skinny_configs(problem)
    return found[:MOST_CANDIDATES]


def lower(operands: Operands, config: Config) -> Lowering:
    """The one launch that computes the call with one of its `candidates`.

    Raises:
        ValueError: the operands are not what the kernels take, or the configuration is not for them.
    """
    problem = _problem(operands)
    values = operands.values
    weight, bias, residual = (operands.tensors.get(name) for name in ("weight", "bias", "residual"))
    kind = config.get("kind")
    if kind not in ("gemv", "skinny", "gemm"):
        raise ValueError(f"fused_linear has no kernel {kind!r}; kinds are gemv, skinny and gemm")
    if kind == "skinny" and problem.m > int(config["block_m"]):
        raise ValueError(f"fused_linear: {problem.m} rows of x do not fit a skinny tile of {config['block_m']}")
    if kind == "gemm" and problem.normed:
        raise ValueError("fused_linear: the gemm kernel has no norm in front; normalize x before it")
    # An absent operand's pointer is never followed.
    pointers = {"x": "x", "weight": "weight", "bias": "bias" if bias else "x"}
    if kind != "gemm":
        pointers["gain"] = "norm_weight" if problem.normed else "x"
    pointers |= {"residual": "residual" if residual else "x", "out": "out"}
    reach = max(problem.n * problem.k, problem.m * max(problem.x_stride, problem.residual_stride, problem.columns))
    constants: dict[str, Any] = {
        "M": problem.m,
        "N": problem.n,
        "K": problem.k,
        "X_STRIDE": problem.x_stride,
        "R_STRIDE": problem.residual_stride,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": problem.activation,
        "GATE_FIRST": bool(values["gate_first"]),
        "WIDE_OFFSETS": reach >= 1 << 31,
        "BLOCK_N": int(config["block_n"]),
        "BLOCK_K": int(config["block_k"]),
        "PDL": True,
    }
    if kind == "gemm":
        constants |= {"BLOCK_M": int(config["block_m"]), "GROUP": int(config["group"])}
        tiles = math.ceil(problem.m / int(config["block_m"]))
        programs = tiles * math.ceil(problem.columns / (int(config["block_n"]) // problem.gated))
    else:
        constants |= {
            "EPS": float(values["eps"]),
            "OFFSET": float(values["offset"]),
            "ROUND_GAIN": bool(values["narrow_first"]),
            "HAS_GAIN": problem.normed,
            "EARLY": "weight" in operands.stable,
            "VECTOR": min(16 // problem.item_bytes, int(config["block_k"])),
        }
        if kind == "skinny":
            constants |= {"BLOCK_M": int(config["block_m"]), "AHEAD": int(config["ahead"])}
        programs = math.ceil(problem.columns / int(config["block_n"]))
    call = KernelCall(
        function={"gemv": gemv, "skinny": skinny, "gemm": gemm}[str(kind)],
        grid=(programs, 1, 1),
        pointers=pointers,
        constants=constants,
        num_warps=int(config["num_warps"]),
        num_stages=int(config["num_stages"]),
        dependent=True,
        read_bytes=sum(_nbytes(spec) for spec in (weight, bias) if spec is not None),
        label=" ".join(("fused_linear", f"{problem.n}x{problem.k}", "+".join(problem.flags))).strip(),
    )
    return Lowering((call,))


def _gemv_configs(problem: _Problem) -> list[Config]:
    tiles = list(_GEMV_TILES)
    if problem.n <= 32 * MULTIPROCESSORS:
        tiles.sort(key=lambda tile: tile[0])
    vector = 16 // problem.item_bytes
    found: dict[tuple[int, int, int], Config] = {}
    for rows, row_bytes, warps in tiles:
        block_n = rows // problem.gated
        block_k = min(row_bytes // problem.item_bytes, _power_of_two(problem.k))
        # All warps side by side along k, so that a program meets once, at its end.
        warps = min(warps, max(1, block_k // (32 * vector)))
        while problem.k % block_k and block_k > 32 * vector * warps:
            block_k //= 2
        if block_n and (block_n, block_k, warps) not in found:
            found[block_n, block_k, warps] = {
                "kind": "gemv", "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": 2,
            }  # fmt: skip
    return list(found.values())


def _skinny_configs(problem: _Problem) -> list[Config]:
    block_m = max(16, _power_of_two(problem.m))
    line = 128 // problem.item_bytes
    few = problem.n < 2 * 64 * MULTIPROCESSORS
    tiles = [*_SKINNY_TILES_FEW, *_SKINNY_TILES] if few else [*_SKINNY_TILES, *_SKINNY_TILES_FEW]
    if problem.item_bytes == 4:
        tiles = list(_SKINNY_TILES_EXACT)
    found: dict[tuple[int, ...], Config] = {}
    for rows, row_bytes, warps, stages in tiles:
        block_k = max(16, min(row_bytes // problem.item_bytes, _power_of_two(problem.k)))
        shape = (rows // problem.gated, block_k, warps, stages)
        fits = stages * (rows + block_m) * block_k * problem.item_bytes <= SHARED_BYTES
        # Below 64 rows, warps scale x in registers, each the whole of it: more than this spills.
        if problem.normed and rows < 64:
            fits = fits and block_m * block_k <= 256 * rows
        if fits and shape not in found:
            found[shape] = {
                "kind": "skinny", "block_m": block_m, "block_n": shape[0], "block_k": block_k, "num_warps": warps,
                "num_stages": stages, "ahead": max(line, min(8 * line, 1 << problem.k.bit_length() - 1)),
            }  # fmt: skip
    return list(found.values())


def _gemm_configs(problem: _Problem) -> list[Config]:
    found: list[tuple[float, Config]] = []
    for block_m, block_n, block_k, warps, stages, rate in _GEMM_TILES_EXACT if problem.item_bytes == 4 else _GEMM_TILES:
        if stages * (block_m + block_n) * block_k * problem.item_bytes > SHARED_BYTES:
            continue
        tiles = math.ceil(problem.m / block_m) * math.ceil(problem.n / block_n)
        cost = math.ceil(tiles / MULTIPROCESSORS) * block_m * block_n / rate
        config: Config = {
            "kind": "gemm", "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
            "num_stages": stages, "group": 8,
        }  # fmt: skip
        found.append((cost, config))
    return [config for _cost, config in sorted(found, key=lambda pair: pair[0])]


def _problem(operands: Operands) -> _Problem:
    x, weight = operands.tensors.get("x"), operands.tensors.get("weight")
    out = operands.outputs.get("out")
    if x is None or weight is None or out is None:
        raise ValueError("fused_linear needs x, weight and the output out")
    if len(weight.shape) != 2 or not x.shape or x.shape[-1] != weight.shape[1] or 0 in x.shape + weight.shape:
        raise ValueError(f"fused_linear: x {list(x.shape)} and weight {list(weight.shape)} do not multiply")
    if x.dtype not in ITEM_BYTES or weight.dtype != x.dtype:
        raise ValueError(
            f"fused_linear takes {', '.join(ITEM_BYTES)}, the same twice, not {x.dtype} and {weight.dtype}"
        )
    if not weight.contiguous:
        raise ValueError("fused_linear: weight must be contiguous")
    activation, wide = str(operands.values["activation"]), bool(operands.values["wide"])
    n, k = weight.shape
    if activation not in ACTIVATIONS or (activation and n % 2):
        raise ValueError(f"fused_linear: activation {activation!r} over {n} columns is not one of {ACTIVATIONS[1:]}")
    m, columns = math.prod(x.shape[:-1]), n // 2 if activation else n
    if out.shape != (*x.shape[:-1], columns) or not out.contiguous or out.dtype != ("float32" if wide else x.dtype):
        raise ValueError(f"fused_linear: out {list(out.shape)} {out.dtype} is not what it computes")
    bias, gain, residual = (operands.tensors.get(name) for name in ("bias", "norm_weight", "residual"))
    for name, spec, shape in (("bias", bias, (n,)), ("norm_weight", gain, (k,)), ("residual", residual, out.shape)):
        if spec is not None and spec.shape != shape:
            raise ValueError(f"fused_linear: {name} is {list(spec.shape)}, not {list(shape)}")
        if spec is not None and name != "residual" and not spec.contiguous:
            raise ValueError(f"fused_linear: {name} must be contiguous")
    if gain is not None and m > DECODE_ROWS:
        raise ValueError(f"fused_linear: no norm in front of {m} rows of x; {DECODE_ROWS} are the most")
    notes = {"norm": gain, activation: activation, "bias": bias, "residual": residual, "wide": wide}
    return _Problem(
        m=m,
        n=n,
        k=k,
        columns=columns,
        item_bytes=ITEM_BYTES[x.dtype],
        x_stride=_row_stride("x", x),
        residual_stride=0 if residual is None else _row_stride("residual", residual),
        normed=gain is not None,
        activation=activation,
        flags=tuple(name for name, present in notes.items() if present),
    )


def _row_stride(name: str, spec: TensorSpec) -> int:
    """Elements from a row to the next when all leading dimensions are taken as one."""
    sizes = [(size, stride) for size, stride in zip(spec.shape[:-1], spec.strides[:-1]) if size != 1]
    if spec.shape[-1] != 1 and spec.strides[-1] != 1:
        raise ValueError(f"fused_linear: the last dimension of {name} must be dense, its stride is {spec.strides[-1]}")
    for (_, outer), (size, inner) in itertools.pairwise(sizes):
        if outer != size * inner:
            raise ValueError(f"fused_linear: the rows of {name}, strides {list(spec.strides)}, have no common stride")
    return sizes[-1][1] if sizes else spec.shape[-1]


def _power_of_two(number: int) -> int:
    """The least power of two not below `number`."""
    return 1 << (number - 1).bit_length()


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * ITEM_BYTES[spec.dtype]
