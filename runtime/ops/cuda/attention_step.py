"""CUDA provider of `ingot::attention_step`: all of a decode step's attention in one launch of `decode_kernel`.

Memory bound: each row's keys and values are read once. What is chosen per shape is into how many splits a row's tokens
fall, so that a small batch still fills the GPU; how long the splits are follows from the positions at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .decode_kernel import decode_kernel
from .spec import Config, KernelCall, Lowering, Operands, Scratch, TensorSpec

# Programs that fill an H200 once: a little below its 132 multiprocessors, so that powers of two come out right.
_PROGRAMS = 128
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
_OPTIONAL = ("cos", "sin", "q_norm", "k_norm", "sinks")


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def tensor(operands: Operands, name: str) -> TensorSpec:
    """The operand `name`.

    Raises:
        ValueError: the call does not have it.
    """
    spec = operands.tensors.get(name)
    if spec is None:
        raise ValueError(f"the attention kernels need the operand {name!r}, which this call does not give")
    return spec


def dot_precision(dtype: str) -> str:
    """How `tl.dot` multiplies: float32 exactly, not as tf32; narrower types have one way only."""
    return "ieee" if dtype == "float32" else "tf32"


def candidates(operands: Operands) -> list[Config]:
    """Configurations worth measuring: splits, tokens a tile, warps, pipeline stages; best guess first.

    `prefetch` reads positions and block_tables before `gdc_wait`, to bring the first tile into L2 while the launch
    before still runs. Stale values are harmless as long as they are in range, which holds for inputs of an engine
    but not for arena memory that other ops use in between.
    """
    k_cache, table = tensor(operands, "k_cache"), tensor(operands, "block_tables")
    batch, block_size, kv_heads = table.shape[0], k_cache.shape[1], k_cache.shape[2]
    capacity = table.shape[1] * block_size
    narrow = k_cache.dtype != "float32"
    shapes = (
        ((1, 64, 4, 3), (2, 64, 4, 3), (2, 32, 4, 4), (4, 32, 4, 3), (1, 128, 8, 3), (1, 64, 4, 4))
        if narrow
        else ((1, 32, 4, 2), (2, 32, 4, 2), (4, 16, 4, 2))
    )
    made: dict[tuple[int, ...], Config] = {}
    for times, block, warps, stages in shapes:
        wanted = times * _PROGRAMS // (batch * kv_heads)
        # No split is worth less than 16 tokens, and the last to arrive has to add them all up.
        most = min(64, power_of_two(-(-capacity // 16)))
        splits = max(1, min(most, power_of_two(wanted + 1) // 2))
        config = {"splits": splits, "block": block, "warps": warps, "stages": stages, "prefetch": True}
        made.setdefault((splits, block, warps, stages), config)
    return list(made.values())


def lower(operands: Operands, config: Config) -> Lowering:
    """One launch over (splits, kv heads, batch); with several splits also scratch for their partial results.

    Args:
        config: `splits` of a row's tokens; `block` tokens a tile; `warps`; `stages`; `prefetch`, see `candidates`.
    """
    q, k_cache, v_cache = tensor(operands, "q"), tensor(operands, "k_cache"), tensor(operands, "v_cache")
    batch, heads, _, dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    group, splits, warps = heads // kv_heads, int(config["splits"]), int(config["warps"])
    constants = {
        **_shape_constants(operands),
        **_value_constants(operands.values),
        "SPLITS": splits,
        "COMBINE_STEP": _combine_step(splits, power_of_two(group) * power_of_two(v_dim), warps),
        "BLOCK": int(config["block"]),
        # The unit in which tokens are dealt to splits: finer than a tile, so that their lengths differ little.
        "GRAIN": min(int(config["block"]), 16),
        "PRECISION": dot_precision(q.dtype),
        # Lines of 128 bytes in a row of the cache.
        "K_LINES": max(1, power_of_two(dim) * WIDTHS[k_cache.dtype] // 128),
        "V_LINES": max(1, power_of_two(v_dim) * WIDTHS[v_cache.dtype] // 128),
        "PREFETCH": bool(config["prefetch"]),
        "PDL": True,
    }
    names = ("q", "k", "v", "k_cache", "v_cache", "block_tables", "positions")
    pointers = {name: name for name in names}
    pointers |= {name: name if operands.tensors.get(name) is not None else "q" for name in _OPTIONAL}
    scratch = {}
    if splits > 1:
        scratch = {
            "partial": Scratch((batch, kv_heads, splits, group, v_dim), "float32"),
            "stats": Scratch((batch, kv_heads, 2, splits, group), "float32"),
            "arrivals": Scratch((batch, kv_heads), "int32", zeroed=True),
        }
    pointers |= {name: name if splits > 1 else "out" for name in ("partial", "stats", "arrivals")}
    call = KernelCall(
        function=decode_kernel,
        grid=(splits, kv_heads, batch),
        pointers=pointers | {"out": "out"},
        constants=constants,
        num_warps=warps,
        num_stages=int(config["stages"]),
        dependent=True,
        label=f"attention_step h{heads} kv{kv_heads} d{dim} splits{splits}",
    )
    return Lowering((call,), scratch)


def _combine_step(splits: int, values: int, warps: int) -> int:
    """Splits added up at once: 64 float32 values a thread fit into registers."""
    return max(1, min(power_of_two(splits), 64 * 32 * warps // values))


def _shape_constants(operands: Operands) -> dict[str, Any]:
    specs = operands.tensors
    q, k_cache, v_cache = tensor(operands, "q"), tensor(operands, "k_cache"), tensor(operands, "v_cache")
    table = tensor(operands, "block_tables")
    group = q.shape[1] // k_cache.shape[2]

    def strides(name: str, count: int) -> tuple[int, ...]:
        spec = specs.get(name)
        return (0,) * count if spec is None else spec.strides

    return {
        "KV_HEADS": k_cache.shape[2],
        "GROUP": group,
        # Tensor cores take 16 rows at least.
        "HEADS_PADDED": max(16, power_of_two(group)),
        "GROUP_PADDED": power_of_two(group),
        "DIM": q.shape[3],
        "DIM_PADDED": max(16, power_of_two(q.shape[3])),
        "V_DIM": v_cache.shape[3],
        "V_DIM_PADDED": max(16, power_of_two(v_cache.shape[3])),
        "BLOCK_SIZE": k_cache.shape[1],
        "CAPACITY": table.shape[1] * k_cache.shape[1],
        "Q_STRIDES": q.strides,
        "K_STRIDES": strides("k", 4),
        "V_STRIDES": strides("v", 4),
        "K_CACHE_STRIDES": k_cache.strides,
        "V_CACHE_STRIDES": v_cache.strides,
        "TABLE_STRIDES": table.strides,
        "POSITION_STRIDE": tensor(operands, "positions").strides[0],
        "COS_STRIDES": strides("cos", 4),
        "SIN_STRIDES": strides("sin", 4),
        "Q_NORM_STRIDE": strides("q_norm", 1)[0],
        "K_NORM_STRIDE": strides("k_norm", 1)[0],
        "SINK_STRIDE": strides("sinks", 1)[0],
        "HAS_ROPE": specs.get("cos") is not None,
        "HAS_Q_NORM": specs.get("q_norm") is not None,
        "HAS_K_NORM": specs.get("k_norm") is not None,
        "HAS_SINKS": specs.get("sinks") is not None,
    }


def _value_constants(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "EPS": float(values["eps"]),
        "OFFSET": float(values["offset"]),
        "NARROW_FIRST": bool(values["narrow_first"]),
        "SCALE": float(values["scale"]),
        "WINDOW": int(values["window"]),
        "SOFTCAP": float(values["softcap"]),
    }
