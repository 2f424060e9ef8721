"""CUDA provider of `ingot::cache_write`: the keys or values of a prefill chunk go to their slots, in one launch.

(A decode step writes its one token inside of `attention_step`.) Padding tokens all write slot 0, the null block, in
any order: nobody reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..quantized import FP8_MOST, INT8_MOST
from .attention_operands import power_of_two, refuse_quantized, tensor
from .quantize import codes_of, row_scale_of
from .spec import Config, KernelCall, Lowering, Operands, TensorSpec


@triton.jit
def cache_write_kernel(
    cache: tl.tensor,
    x: tl.tensor,
    slots: tl.tensor,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    X_STRIDES: tl.constexpr,
    CACHE_STRIDES: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A tile of ROWS tokens and COLUMNS elements of their heads laid side by side."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + token * SLOT_STRIDE, mask=token < TOKENS, other=0)
    # tl.arange runs within a head as far as 16-byte accesses go, also where DIM is no power of two.
    head, d = column // DIM, column % DIM
    source = token // LENGTH * X_STRIDES[0] + token % LENGTH * X_STRIDES[2]
    target = slot // BLOCK_SIZE * CACHE_STRIDES[0] + slot % BLOCK_SIZE * CACHE_STRIDES[1]
    seen = (token < TOKENS)[:, None] & (column < HEADS * DIM)[None, :]
    values = tl.load(x + source[:, None] + (head * X_STRIDES[1] + d * X_STRIDES[3])[None, :], mask=seen)
    tl.store(cache + target[:, None] + (head * CACHE_STRIDES[2] + d * CACHE_STRIDES[3])[None, :], values, mask=seen)


@triton.jit
def cache_write_quantized_kernel(
    cache: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    slots: tl.tensor,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    X_STRIDES: tl.constexpr,
    CACHE_STRIDES: tl.constexpr,
    SCALE_STRIDES: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One head of ROWS tokens, each by its own scale."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM_PADDED)[None, :]
    slot = tl.load(slots + token * SLOT_STRIDE, mask=token < TOKENS, other=0)
    source = token // LENGTH * X_STRIDES[0] + token % LENGTH * X_STRIDES[2] + head * X_STRIDES[1]
    seen = (token < TOKENS)[:, None] & (d < DIM)
    value = tl.load(x + source[:, None] + d * X_STRIDES[3], mask=seen, other=0.0).to(tl.float32)
    factor = row_scale_of(value, MOST)
    codes = codes_of(value, factor, MOST, cache.dtype.element_ty)
    target = slot // BLOCK_SIZE * CACHE_STRIDES[0] + slot % BLOCK_SIZE * CACHE_STRIDES[1] + head * CACHE_STRIDES[2]
    tl.store(cache + target[:, None] + d * CACHE_STRIDES[3], codes, mask=seen)
    place = slot // BLOCK_SIZE * SCALE_STRIDES[0] + slot % BLOCK_SIZE * SCALE_STRIDES[1] + head * SCALE_STRIDES[2]
    tl.store(scale + place[:, None], factor, mask=(token < TOKENS)[:, None])


def candidates(operands: Operands) -> list[Config]:
    """The one configuration, elements of a program's tile and its warps: others are as fast."""
    return [{"elements": 2048, "warps": 4}]


def lower(operands: Operands, config: Config) -> Lowering:
    """One launch over (tiles of tokens, tiles of columns).

    Args:
        config: `elements` of a program's tile; `warps`.
    """
    cache, x, slots = tensor(operands, "cache"), tensor(operands, "x"), tensor(operands, "slots")
    scale = operands.tensors.get("scale")
    refuse_quantized("cache_write", cache, scale)
    batch, heads, length, dim = x.shape
    if scale is not None:
        return _quantized(cache, x, slots, scale, config)
    columns = min(power_of_two(heads * dim), int(config["elements"]))
    rows = min(power_of_two(batch * length), int(config["elements"]) // columns)
    call = KernelCall(
        function=cache_write_kernel,
        grid=(-(-batch * length // rows), -(-heads * dim // columns), 1),
        pointers={name: name for name in ("cache", "x", "slots")},
        constants={
            "TOKENS": batch * length,
            "LENGTH": length,
            "HEADS": heads,
            "DIM": dim,
            "BLOCK_SIZE": cache.shape[1],
            "X_STRIDES": x.strides,
            "CACHE_STRIDES": cache.strides,
            "SLOT_STRIDE": slots.strides[0],
            "ROWS": rows,
            "COLUMNS": columns,
            "PDL": True,
        },
        num_warps=int(config["warps"]),
        dependent=True,
        label=f"cache_write tokens{batch * length} h{heads} d{dim}",
    )
    return Lowering((call,))


def _quantized(cache: TensorSpec, x: TensorSpec, slots: TensorSpec, scale: TensorSpec, config: Config) -> Lowering:
    """One launch over (tiles of tokens, heads)."""
    batch, heads, length, dim = x.shape
    if scale.shape != cache.shape[:3] or scale.dtype != "float32":
        raise ValueError(f"cache_write: a cache {cache.shape} does not have scales {scale.shape} of {scale.dtype}")
    rows = min(power_of_two(batch * length), max(1, int(config["elements"]) // power_of_two(dim)))
    call = KernelCall(
        function=cache_write_quantized_kernel,
        grid=(-(-batch * length // rows), heads, 1),
        pointers={name: name for name in ("cache", "scale", "x", "slots")},
        constants={
            "TOKENS": batch * length,
            "LENGTH": length,
            "DIM": dim,
            "DIM_PADDED": power_of_two(dim),
            "BLOCK_SIZE": cache.shape[1],
            "X_STRIDES": x.strides,
            "CACHE_STRIDES": cache.strides,
            "SCALE_STRIDES": scale.strides,
            "SLOT_STRIDE": slots.strides[0],
            "MOST": INT8_MOST if cache.dtype == "int8" else FP8_MOST,
            "ROWS": rows,
            "PDL": True,
        },
        num_warps=int(config["warps"]),
        dependent=True,
        label=f"cache_write tokens{batch * length} h{heads} d{dim} {cache.dtype}",
    )
    return Lowering((call,))
