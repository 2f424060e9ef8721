"""What the attention providers share: looking operands up, refusing what the kernels cannot take, and the constants
that describe cache, block table and score.
"""

from __future__ import annotations

from typing import Any

from .spec import Operands, TensorSpec

# Dtypes of quantized KV caches that there are kernels for.
CACHE_DTYPES = frozenset({"int8", "float8_e4m3fn"})
# Bytes of an element of the types that the kernels compute in.
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
# And of those that a cache can hold.
CACHE_WIDTHS = WIDTHS | dict.fromkeys(CACHE_DTYPES, 1)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def padded(dim: int) -> int:
    """Width of a tile that holds `dim` columns and that `tl.dot` takes."""
    return max(16, power_of_two(dim))


def tensor(operands: Operands, name: str) -> TensorSpec:
    """The operand `name`.

    Raises:
        ValueError: the call does not have it.
    """
    spec = operands.tensors.get(name)
    if spec is None:
        raise ValueError(f"the CUDA kernel needs the operand {name!r}, which this call does not give")
    return spec


def strides(operands: Operands, name: str, count: int) -> tuple[int, ...]:
    """Strides of an operand that may be absent; the kernel then does not use them."""
    spec = operands.tensors.get(name)
    return (0,) * count if spec is None else spec.strides


def refuse_quantized(op: str, cache: TensorSpec, scale: TensorSpec | None) -> None:
    """Raise ValueError for a quantized cache of a dtype that is not among `CACHE_DTYPES`."""
    if scale is not None and cache.dtype not in CACHE_DTYPES:
        raise ValueError(f"{op} has no CUDA kernel for a KV cache of {cache.dtype}")


def check(op: str, operands: Operands) -> None:
    """Refuse a call that the attention kernels would compute wrongly.

    Raises:
        ValueError: a type they do not know, shapes that do not fit each other, cos without sin, or a scale that is not
            above zero.
    """
    q, k_cache, v_cache = tensor(operands, "q"), tensor(operands, "k_cache"), tensor(operands, "v_cache")
    refuse_quantized(op, k_cache, operands.tensors.get("k_scale"))
    quantized = _check_scales(op, operands)
    for name in ("q", "k", "v", *(() if quantized else ("k_cache", "v_cache")), "cos", "sin"):
        spec = operands.tensors.get(name)
        if spec is not None and (spec.dtype != q.dtype or q.dtype not in WIDTHS):
            raise ValueError(f"{op}: {name} is {spec.dtype}, q {q.dtype}; the kernel takes one of {', '.join(WIDTHS)}")
    if q.shape[1] % k_cache.shape[2] or k_cache.shape[:3] != v_cache.shape[:3] or q.shape[3] != k_cache.shape[3]:
        raise ValueError(f"{op}: q {q.shape} does not fit the caches {k_cache.shape} and {v_cache.shape}")
    cos, sin = operands.tensors.get("cos"), operands.tensors.get("sin")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: RoPE needs both cos and sin")
    if cos is not None and sin is not None:
        batch, dim = q.shape[0], q.shape[3]
        if cos.shape != sin.shape or (cos.shape != (batch, 1, 1, dim) and cos.shape[1:] != (dim,)):
            shapes = f"cos {cos.shape} and sin {sin.shape}"
            raise ValueError(f"{op}: {shapes} are neither ({batch}, 1, 1, {dim}) nor tables of {dim} columns")
    if not operands.values["scale"] > 0:
        raise ValueError(f"{op}: scale is {operands.values['scale']}; the kernel takes one above zero")


def cache_format(scale: TensorSpec | None, cache: TensorSpec) -> str:
    """ "" for a cache in the activations' dtype, else "int8" or "fp8"."""
    return "" if scale is None else "int8" if cache.dtype == "int8" else "fp8"


def _check_scales(op: str, operands: Operands) -> bool:
    """Whether the caches are quantized; raises ValueError where their scales do not fit them."""
    caches = [tensor(operands, name) for name in ("k_cache", "v_cache")]
    scales = [operands.tensors.get(name) for name in ("k_scale", "v_scale")]
    if scales == [None, None]:
        return False
    for cache, scale in zip(caches, scales):
        if scale is None or scale.dtype != "float32" or scale.shape != cache.shape[:3] or not scale.contiguous:
            raise ValueError(f"{op}: a cache {cache.shape} of {cache.dtype} does not have scales {scale}")
    if caches[0].dtype != caches[1].dtype:
        raise ValueError(f"{op}: keys are {caches[0].dtype}, values {caches[1].dtype}")
    return True


def shared_constants(operands: Operands) -> dict[str, Any]:
    """Constants of both kernels: heads, cache layout, block table, score."""
    q, k_cache, v_cache = tensor(operands, "q"), tensor(operands, "k_cache"), tensor(operands, "v_cache")
    return {
        "GROUP": q.shape[1] // k_cache.shape[2],
        "DIM": q.shape[3],
        "DIM_PADDED": padded(q.shape[3]),
        "V_DIM": v_cache.shape[3],
        "V_DIM_PADDED": padded(v_cache.shape[3]),
        "BLOCK_SIZE": k_cache.shape[1],
        "Q_STRIDES": q.strides,
        "K_CACHE_STRIDES": k_cache.strides,
        "V_CACHE_STRIDES": v_cache.strides,
        "SCALE_STRIDES": strides(operands, "k_scale", 3),
        "CACHE": cache_format(operands.tensors.get("k_scale"), k_cache),
        "TABLE_STRIDES": tensor(operands, "block_tables").strides,
        "SINK_STRIDE": strides(operands, "sinks", 1)[0],
        "HAS_SINKS": operands.tensors.get("sinks") is not None,
        "SCALE": float(operands.values["scale"]),
        "WINDOW": int(operands.values["window"]),
        "SOFTCAP": float(operands.values["softcap"]),
        # float32 is multiplied exactly, not as tf32; narrower types have one way only.
        "PRECISION": "ieee" if q.dtype == "float32" else "tf32",
    }
