"""The meaning of every Ingot op in plain PyTorch.

Back ends compile either these functions or a kernel that must agree with them; tests and the numeric gate use them
as the oracle. They are written to be exact and readable, and to trace into a graph of fixed shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantized import quantize_rows

_GOLDEN = 0x9E3779B9
_MASK32 = 0xFFFFFFFF


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """Scaled, soft-capped scores in float32: q [B,H,T,D], k [B,Hkv,S,D] -> [B,H,T,S]; groups of q heads share k."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1) if groups > 1 else k
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _mix_values(scores: Tensor, visible: Tensor, v: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Softmax over visible keys (and the sink), weighted sum of values -> [B,T,H,Dv]; who sees nothing gets 0."""
    scores = scores.masked_fill(~visible, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.float()[None, :, None, None])
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[None, :, None, None] - top)
    total = total.masked_fill(total == 0, 1.0)
    groups = scores.shape[1] // v.shape[1]
    values = v.repeat_interleave(groups, dim=1) if groups > 1 else v
    return torch.matmul(weights / total, values.float()).to(dtype).transpose(1, 2).contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int, softcap: float, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention of a whole sequence without a cache.

    Args:
        q: [batch, heads, length, head_dim]; k: [batch, kv_heads, length, head_dim];
        v: [batch, kv_heads, length, v_dim].
        layer: index of the layer, for the passes; does not change the result.
        window: 0 sees everything before; else a token at p sees keys in (p - window, p].
        softcap: 0 is off; else scores become softcap * tanh(scores / softcap).
        sinks: [heads], one more logit per head in the softmax's denominator (gpt-oss).

    Returns:
        [batch, length, heads, v_dim] in q's dtype.
    """
    length = q.shape[2]
    index = torch.arange(length, device=q.device)
    visible = index[None, :] <= index[:, None]
    if window:
        visible = visible & (index[None, :] > index[:, None] - window)
    return _mix_values(_scores(q, k, scale, softcap), visible[None, None], v, sinks, q.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention over a paged KV cache that already holds the present tokens.

    Args:
        q: [batch, heads, length, head_dim].
        k_cache: [blocks, block_size, kv_heads, head_dim]; v_cache: [blocks, block_size, kv_heads, v_dim].
        k_scale, v_scale: [blocks, block_size, kv_heads] float32 for caches of int8 or float8_e4m3fn, which hold
            key / scale and value / scale; both or neither.
        block_tables: [batch, max_blocks] int32, the blocks of each row in order.
        positions: [batch, length] int64; -1 marks padding, whose result is zero.

    Returns:
        [batch, length, heads, v_dim] in q's dtype.
    """
    batch, blocks = block_tables.shape
    table = block_tables.reshape(-1).long()
    k, v = (
        _held(cache, scale, table).reshape(batch, blocks * cache.shape[1], *cache.shape[2:]).transpose(1, 2)
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    index = torch.arange(k.shape[2], device=q.device)
    visible = index[None, None, :] <= positions[:, :, None]
    if window:
        visible = visible & (index[None, None, :] > positions[:, :, None] - window)
    # What lies beyond a row's length is another row's or nobody's: it must not even reach a product (0 * NaN is NaN).
    seen = visible.any(1)[:, None, :, None]
    k, v = k.masked_fill(~seen, 0), v.masked_fill(~seen, 0)
    out = _mix_values(_scores(q, k, scale, softcap), visible[:, None], v, sinks, q.dtype)
    return out.masked_fill((positions < 0)[:, :, None, None], 0)


def _held(cache: Tensor, scale: Tensor | None, table: Tensor) -> Tensor:
    """Blocks of a cache, in float32 where they are quantized."""
    return cache[table] if scale is None else cache[table].float() * scale[table][..., None]


def cache_slots(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slot of every token in the flattened cache, [batch * length] int64; padding (-1) goes to the null block."""
    known = positions.clamp(min=0)
    block = torch.gather(block_tables.long(), 1, known // block_size)
    slots = block * block_size + known % block_size
    return torch.where(positions >= 0, slots, 0).reshape(-1)


def cache_write(cache: Tensor, x: Tensor, slots: Tensor, scale: Tensor | None = None) -> None:
    """Write x [batch, kv_heads, length, dim] into cache [blocks, block_size, kv_heads, dim] at `slots`, in place.

    Args:
        scale: [blocks, block_size, kv_heads] float32 for a cache of int8 or float8_e4m3fn, written as well: each
            token's head is quantized by its own scale, as in `quantized.quantize_rows`.
    """
    rows = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
    if scale is not None:
        rows, factors = quantize_rows(rows, "int8" if cache.dtype == torch.int8 else "fp8")
        scale.view(-1, scale.shape[2]).index_put_((slots,), factors[..., 0])
        rows = rows.to(cache.dtype)
    cache.view(-1, *cache.shape[2:]).index_put_((slots,), rows)


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] times weight [n, k] transposed, accumulated in float32, in x's dtype."""
    return torch.nn.functional.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, narrow_first: bool) -> Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467).

    Args:
        offset: added to the weight (Gemma stores weight - 1).
        narrow_first: round to x's dtype before the weight is applied (Llama), or after (Gemma).
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    weight = weight if narrow_first else weight.float()
    weight = weight + offset if offset else weight
    return weight * normed.to(x.dtype) if narrow_first else (normed * weight).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, narrow_first: bool
) -> tuple[Tensor, Tensor]:
    """x + residual in their dtype, and the `rms_norm` of this (rounded) sum."""
    total = x + residual
    return total, rms_norm(total, weight, eps, offset, narrow_first)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual in their dtype, and the layer norm over the last dimension of this (rounded) sum."""
    total = x + residual
    return total, torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps)


def gated_activation(x: Tensor, kind: str, gate_first: bool) -> Tensor:
    """act(gate) * up of the two halves of x [..., 2 * n] -> [..., n], each step rounded to x's dtype.

    Args:
        kind: "silu", "relu", "gelu" or "gelu_tanh"; gate_first: whether gate is the first half.
    """
    first, second = x.chunk(2, -1)
    gate, up = (first, second) if gate_first else (second, first)
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    if kind == "relu":
        return torch.relu(gate) * up
    if kind in ("gelu", "gelu_tanh"):
        return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up
    raise ValueError(f"gated_activation knows no {kind!r}")


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, length, dim] with tables [batch, 1, length, dim] (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def _mix32(x: Tensor) -> Tensor:
    """Finalizer of a 32-bit integer hash ("lowbias32", Wellons 2018) in int64 arithmetic."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise [batch, vocabulary] float32, a function of each row's seed and position alone."""
    low, high = seeds & _MASK32, (seeds >> 32) & _MASK32
    row = _mix32((low + _GOLDEN) & _MASK32)
    row = _mix32(row ^ high)
    row = _mix32(row ^ (positions & _MASK32))
    index = torch.arange(vocabulary, device=seeds.device) * _GOLDEN & _MASK32
    bits = _mix32(row[:, None] ^ index[None, :])
    # The largest hash would round up to 1, whose noise is infinite and would win whatever its logit.
    uniform = (((bits >> 8).float() + 0.5) * 2.0**-24).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log(uniform))


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """One token per row: argmax at temperature 0, else Gumbel-max over what min-p, top-k and top-p leave.

    Args:
        logits: [batch, vocabulary] float32; temperature, top_p, min_p: [batch] float32; top_k: [batch] int32, 0 is off;
        seeds: [batch] int64; positions: [batch] int64, the position whose logits these are (the random counter).

    Returns:
        [batch] int64. Ties at a threshold are all kept; among equals the lowest index wins.
    """
    greedy = logits.argmax(-1)
    z = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    floor = z.amax(-1) + torch.log(min_p)
    kept = z >= floor[:, None]
    order = z.masked_fill(~kept, float("-inf")).sort(-1, descending=True).values
    k = torch.where((top_k > 0) & (top_k < z.shape[1]), top_k, z.shape[1]).long()
    kth = order.gather(1, k[:, None] - 1)
    kept = kept & (z >= kth)
    order = order.masked_fill(order < kth, float("-inf"))
    mass = order.softmax(-1)
    # The smallest set whose sum reaches top_p: a token stays while the mass before it has not yet reached it.
    # The likeliest always stays, also where top_p is so small that float32 makes it zero.
    needed = (mass.cumsum(-1) - mass) < top_p.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    last = order.masked_fill(~needed, float("inf")).amin(-1, keepdim=True)
    kept = kept & ((z >= last) | (top_p >= 1)[:, None])
    noisy = (z + gumbel_noise(seeds, positions, z.shape[1])).masked_fill(~kept, float("-inf"))
    return torch.where(temperature > 0, noisy.argmax(-1), greedy)
