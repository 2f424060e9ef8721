"""CUDA provider of `ingot::paged_attention`: the attention of a prefill chunk, one launch of `prefill_kernel`.

Compute bound: bfloat16 runs on the tensor cores, float32 exactly and slowly. A single query per row works as well, but
`attention_step` is the op for that.
"""

from __future__ import annotations

from .attention_operands import check, padded, power_of_two, shared_constants, tensor
from .prefill_kernel import prefill_kernel
from .spec import Config, KernelCall, Lowering, Operands


def candidates(operands: Operands) -> list[Config]:
    """Configurations worth measuring: queries and keys a tile, warps, pipeline stages; best guess first."""
    check("paged_attention", operands)
    q = tensor(operands, "q")
    length, dim = q.shape[2], padded(max(q.shape[3], tensor(operands, "v_cache").shape[3]))
    shapes: tuple[tuple[int, int, int, int], ...]
    if q.dtype == "float32":
        shapes = ((32, 16, 8, 2), (16, 16, 4, 2))
    elif length < 64:
        shapes = ((16, 64, 4, 3), (16, 128, 4, 3))
    elif dim <= 128:
        shapes = ((64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3))
    else:
        shapes = ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2))
    if operands.tensors.get("k_scale") is not None:
        # Numbers made of bytes take registers: such tiles spill.
        shapes = tuple(shape for shape in shapes if shape[:2] != (128, 128))
    most = max(16, power_of_two(length))
    return [
        {"queries": queries, "keys": keys, "warps": warps, "stages": stages}
        for queries, keys, warps, stages in shapes
        if queries <= most
    ]


def lower(operands: Operands, config: Config) -> Lowering:
    """One launch over (heads, query tiles, batch).

    Args:
        config: `queries` and `keys` a tile, powers of two, at least 16; `warps`; `stages` of the pipeline.

    Raises:
        ValueError: the kernel cannot take the call.
    """
    check("paged_attention", operands)
    q, kv_heads = tensor(operands, "q"), tensor(operands, "k_cache").shape[2]
    batch, heads, length, dim = q.shape
    queries = int(config["queries"])
    constants = {
        **shared_constants(operands),
        "LENGTH": length,
        "HEADS": heads,
        "CAPACITY": tensor(operands, "block_tables").shape[1] * tensor(operands, "k_cache").shape[1],
        "POSITION_STRIDES": tensor(operands, "positions").strides,
        "QUERIES": queries,
        "KEYS": int(config["keys"]),
        "PDL": True,
    }
    names = ("q", "k_cache", "v_cache", "k_scale", "v_scale", "block_tables", "positions", "sinks")
    pointers = {name: "q" if operands.tensors.get(name) is None else name for name in names} | {"out": "out"}
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
