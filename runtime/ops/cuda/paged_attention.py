"""CUDA provider of `ingot::paged_attention`: the attention of a prefill chunk, one launch of `prefill_kernel`.

Compute bound: bfloat16 runs on the tensor cores, float32 exactly and slowly. A single query per row works as well, but
`attention_step` is the op for that.
"""

from __future__ import annotations

from .attention_step import dot_precision, power_of_two, tensor
from .prefill_kernel import prefill_kernel
from .spec import Config, KernelCall, Lowering, Operands


def candidates(operands: Operands) -> list[Config]:
    """Configurations worth measuring: queries and keys a tile, warps, pipeline stages; best guess first."""
    q = tensor(operands, "q")
    length, dim = q.shape[2], max(q.shape[3], tensor(operands, "v_cache").shape[3])
    if q.dtype == "float32":
        shapes = ((32, 32, 4, 2), (16, 32, 4, 2))
    elif length < 64:
        shapes = ((16, 64, 4, 3), (16, 128, 4, 3))
    elif dim <= 128:
        shapes = ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 3))
    else:
        shapes = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2))
    most = max(16, power_of_two(length))
    return [
        {"queries": queries, "keys": keys, "warps": warps, "stages": stages}
        for queries, keys, warps, stages in shapes
        if queries <= most
    ]


def lower(operands: Operands, config: Config) -> Lowering:
    """One launch over (heads, query tiles, batch).

    Args:
        config: `queries` and `keys` a tile, powers of two, at least 16; `warps`; `stages`.
    """
    q, k_cache, v_cache = tensor(operands, "q"), tensor(operands, "k_cache"), tensor(operands, "v_cache")
    table, sinks = tensor(operands, "block_tables"), operands.tensors.get("sinks")
    batch, heads, length, dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    queries = int(config["queries"])
    constants = {
        "LENGTH": length,
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "DIM_PADDED": max(16, power_of_two(dim)),
        "V_DIM": v_dim,
        "V_DIM_PADDED": max(16, power_of_two(v_dim)),
        "BLOCK_SIZE": k_cache.shape[1],
        "CAPACITY": table.shape[1] * k_cache.shape[1],
        "Q_STRIDES": q.strides,
        "K_CACHE_STRIDES": k_cache.strides,
        "V_CACHE_STRIDES": v_cache.strides,
        "TABLE_STRIDES": table.strides,
        "POSITION_STRIDES": tensor(operands, "positions").strides,
        "SINK_STRIDE": 0 if sinks is None else sinks.strides[0],
        "HAS_SINKS": sinks is not None,
        "SCALE": float(operands.values["scale"]),
        "WINDOW": int(operands.values["window"]),
        "SOFTCAP": float(operands.values["softcap"]),
        "QUERIES": queries,
        "KEYS": int(config["keys"]),
        "PRECISION": dot_precision(q.dtype),
        "PDL": True,
    }
    names = ("q", "k_cache", "v_cache", "block_tables", "positions")
    pointers = {name: name for name in names} | {"sinks": "q" if sinks is None else "sinks", "out": "out"}
    call = KernelCall(
        function=prefill_kernel,
        grid=(heads, -(-length // queries), batch),
        pointers=pointers,
        constants=constants,
        num_warps=int(config["warps"]),
        num_stages=int(config["stages"]),
        dependent=True,
        label=f"paged_attention h{heads} kv{kv_heads} d{dim} length{length}",
    )
    return Lowering((call,))
