"""CUDA provider of `ingot::attention_step`: all of a decode step's attention in one launch of `decode_kernel`.

Memory bound: each row's keys and values are read once. What is chosen per shape is into how many splits a row's tokens
fall, so that a small batch still fills the GPU; how long the splits are follows from the positions at run time.
"""

from __future__ import annotations

from .attention_operands import CACHE_WIDTHS, check, padded, power_of_two, shared_constants, strides, tensor
from .decode_kernel import decode_kernel
from .spec import Config, KernelCall, Lowering, Operands, Scratch

# Programs that fill an H200 once: a little below its 132 multiprocessors, so that powers of two come out right.
_PROGRAMS = 128
# The last split to arrive has to add all of them up.
_MOST_SPLITS = 64
# Tokens below which a split is not worth its launch; they are dealt to the splits in units of this.
_GRAIN = 16
# Shared memory for tiles on their way, of 227 KiB that a program can have.
_TILE_BYTES = 160 << 10
_OPTIONAL = ("cos", "sin", "q_norm", "k_norm", "sinks", "k_scale", "v_scale")
# Times that the programs fill the GPU, tokens a tile, warps, pipeline stages, preload, carve-out; by what a launch is
# bound by: latency (a few rows: best is a tile that holds a whole split), both, or memory alone. The products around a
# few rows stream their weights through L1: which carve-out leaves it to them shows in their company alone.
_Shapes = tuple[tuple[float, int, int, int, bool] | tuple[float, int, int, int, bool, int], ...]
_FEW: _Shapes = ((1, 128, 8, 3, True), (1, 64, 4, 3, True), (0.5, 128, 8, 3, True), (2, 64, 4, 3, True),
                 (1, 64, 4, 3, True, 0), (1, 128, 8, 3, True, 0), (2, 32, 4, 1, True, 7), (1, 64, 4, 1, True, 7),
                 (0.5, 128, 8, 3, True, 0))  # fmt: skip
_SOME: _Shapes = ((2, 64, 4, 3, True), (1, 128, 8, 3, False), (4, 64, 4, 3, True), (2, 64, 4, 4, False),
                  (1, 64, 4, 3, True))  # fmt: skip
_MANY: _Shapes = ((1, 32, 4, 4, False), (1, 64, 4, 4, False), (1, 32, 4, 4, True), (2, 64, 4, 3, True),
                  (1, 128, 8, 3, False))  # fmt: skip
# Keys and values of a token together beyond 512 bytes (heads of 256): a tile of many does not fit.
_WIDE: _Shapes = ((1, 64, 8, 3, True), (1, 64, 8, 3, False), (1, 32, 4, 3, True))
_FLOAT32: _Shapes = ((1, 32, 8, 2, True), (2, 16, 8, 2, True), (1, 16, 4, 2, False))


def candidates(operands: Operands) -> list[Config]:
    """Configurations worth measuring, best guess first; the keys are explained at `lower`."""
    check("attention_step", operands)
    k_cache, v_cache, table = (tensor(operands, name) for name in ("k_cache", "v_cache", "block_tables"))
    block_size, kv_heads = k_cache.shape[1:3]
    pairs = table.shape[0] * kv_heads
    fill = max(1, power_of_two(_PROGRAMS // pairs + 1) // 2)
    most = min(_MOST_SPLITS, power_of_two(-(-table.shape[1] * block_size // _GRAIN)))
    row_bytes = (padded(k_cache.shape[3]) + padded(v_cache.shape[3])) * CACHE_WIDTHS[k_cache.dtype]
    shapes = _FEW if fill > 2 else _SOME if pairs <= _PROGRAMS else _MANY
    if k_cache.dtype == "float32":
        shapes = _FLOAT32
    elif row_bytes > 512:
        shapes = _WIDE
    made: list[Config] = []
    for times, block, warps, stages, preload, *carveout in shapes:
        splits = max(1, min(most, int(fill * times)))
        config: Config = {
            "splits": splits, "block": block, "warps": warps, "stages": stages,
            "preload": preload and _early(operands) > 0 and _caches(operands) <= operands.stable,
            "carveout": carveout[0] if carveout else -1,
        }  # fmt: skip
        if config not in made and block * row_bytes * (stages - 1) <= _TILE_BYTES:
            made.append(config)
    return made


def _caches(operands: Operands) -> set[str]:
    """The caches of the call, those of scales among them."""
    return {n for n in ("k_cache", "v_cache", "k_scale", "v_scale") if operands.tensors.get(n) is not None}


def _early(operands: Operands) -> int:
    """What is read before the wait: 0 nothing, 1 positions, block tables and older tokens, 2 RoPE and norms as well."""
    if not {"positions", "block_tables"} <= operands.stable:
        return 0
    vectors = {name for name in ("cos", "sin", "q_norm", "k_norm") if operands.tensors.get(name) is not None}
    return 2 if vectors <= operands.stable else 1


def lower(operands: Operands, config: Config) -> Lowering:
    """One launch over (splits, kv heads, batch); with several splits also scratch for their partial results.

    Args:
        config: `splits`: into how many parts a row's tokens fall; `block`: tokens a tile, a power of two, at least 16;
            `warps`; `stages` of the pipeline; `preload`: whether the first tile is loaded into registers before the
            launch before has finished, if nobody writes to it, or is only brought into the L2 cache; `carveout`: see
            `KernelCall`.

    Raises:
        ValueError: the kernel cannot take the call.
    """
    check("attention_step", operands)
    q, k_cache, v_cache = tensor(operands, "q"), tensor(operands, "k_cache"), tensor(operands, "v_cache")
    batch, heads, length, dim = q.shape
    if length != 1:
        raise ValueError(f"attention_step: q {q.shape} holds {length} tokens a row; a decode step has one")
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    group, splits, warps, block = heads // kv_heads, int(config["splits"]), int(config["warps"]), int(config["block"])
    line = 128 // CACHE_WIDTHS[k_cache.dtype]
    early, cos, sin = _early(operands), operands.tensors.get("cos"), operands.tensors.get("sin")
    # Elements of the group's result that one thread adds up over the splits.
    share = max(1, power_of_two(group) * padded(v_dim) // (32 * warps))
    constants = {
        **shared_constants(operands),
        "KV_HEADS": kv_heads,
        "GROUP_PADDED": power_of_two(group),
        "K_STRIDES": tensor(operands, "k").strides,
        "V_STRIDES": tensor(operands, "v").strides,
        "POSITION_STRIDE": tensor(operands, "positions").strides[0],
        # From row to row (of the batch, or of the table) and along the head.
        "COS_STRIDES": (0, 0) if cos is None else (cos.strides[0], cos.strides[-1]),
        "SIN_STRIDES": (0, 0) if sin is None else (sin.strides[0], sin.strides[-1]),
        "Q_NORM_STRIDE": strides(operands, "q_norm", 1)[0],
        "K_NORM_STRIDE": strides(operands, "k_norm", 1)[0],
        "HAS_ROPE": cos is not None,
        "ROPE_BY_POSITION": cos is not None and len(cos.shape) == 2,
        "HAS_Q_NORM": operands.tensors.get("q_norm") is not None,
        "HAS_K_NORM": operands.tensors.get("k_norm") is not None,
        "EPS": float(operands.values["eps"]),
        "OFFSET": float(operands.values["offset"]),
        "NARROW_FIRST": bool(operands.values["narrow_first"]),
        "SPLITS": splits,
        # Splits added up at once, and neighbours that a thread loads at once: 64 float32 values fit into registers.
        "COMBINE_STEP": max(1, min(power_of_two(splits), 64 // share)),
        "COMBINE_VECTOR": min(4, share),
        "BLOCK": block,
        "GRAIN": min(block, _GRAIN),
        # Elements of a line of 128 bytes, and lines of a row of the cache.
        "LINE": line,
        "K_LINES": power_of_two(-(-dim // line)),
        "V_LINES": power_of_two(-(-v_dim // line)),
        "PRELOAD": bool(config["preload"]) and early > 0 and _caches(operands) <= operands.stable,
        # When it waits for the launch before; see `_early`.
        "WAIT": early,
        "PDL": True,
    }
    names = ("q", "k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "block_tables", "positions")
    pointers = {name: name for name in names}
    pointers |= {name: name if operands.tensors.get(name) is not None else "q" for name in _OPTIONAL}
    scratch = {}
    if splits > 1:
        scratch = {
            "partial": Scratch((batch, kv_heads, splits, group, v_dim), "float32"),
            # The base-2 logarithm of each split's share of the softmax, and behind them the new token's.
            "levels": Scratch((batch, kv_heads, splits + 1, group), "float32"),
            "arrivals": Scratch((batch, kv_heads), "int32", zeroed=True),
        }
    pointers |= {name: name if splits > 1 else "out" for name in ("partial", "levels", "arrivals")}
    call = KernelCall(
        function=decode_kernel,
        grid=(splits, kv_heads, batch),
        pointers=pointers | {"out": "out"},
        constants=constants,
        num_warps=warps,
        num_stages=int(config["stages"]),
        dependent=True,
        carveout=int(config["carveout"]),
        label=f"attention_step h{heads} kv{kv_heads} d{dim} splits{splits}",
    )
    return Lowering((call,), scratch)
