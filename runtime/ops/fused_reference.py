"""The meaning of the ops that exist for the GPU: several plain ones in one kernel, spelled out with the plain ones.

Each is a composition of `reference.py`; what a kernel gains by fusing is memory traffic and launches, never another
function. Where a fused op rounds less often than the plain ones would, its docstring says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import quantized, reference


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    narrow_first: bool,
    activation: str,
    gate_first: bool,
    wide: bool,
    scale: Tensor | None,
    zero: Tensor | None,
    format: str,
    group: list[int],
    activations: str,
) -> Tensor:
    """A linear layer with the RMSNorm before it and the gated activation or residual add behind it.

    Args:
        x: [..., k]; weight: [n, k]; bias: [n] or None.
        norm_weight: [k] or None; eps, offset, narrow_first as in `rms_norm`.
        activation: "" or a kind of `gated_activation`; the result then has n / 2 columns. gate_first as there.
        residual: [..., columns of the result] in x's dtype or None, added last.
        wide: return float32; the product is then not rounded to x's dtype.
        scale, zero, format, group, activations: as in `quantized.linear_quantized` where the weight is quantized;
            format "" is a weight in x's dtype, with neither.

    Returns:
        [..., n or n / 2] in x's dtype, contiguous.
    """
    if norm_weight is not None:
        x = reference.rms_norm(x, norm_weight, eps, offset, narrow_first)
    if scale is not None:
        y = quantized.product(x, weight, scale, zero, bias, format, group, activations)
        y = y if wide else y.to(x.dtype)
    elif wide:
        y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    else:
        y = torch.nn.functional.linear(x, weight, bias)
    if activation:
        y = reference.gated_activation(y, activation, gate_first)
    if residual is not None:
        y = y + residual
    return y.contiguous()


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    sinks: Tensor | None,
    eps: float,
    offset: float,
    narrow_first: bool,
    scale: float,
    window: int,
    softcap: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """All of a decode step's attention: norms of q and k, RoPE, cache write, attention over the paged cache.

    Args:
        q: [batch, heads, 1, head_dim]; k: [batch, kv_heads, 1, head_dim]; v: [batch, kv_heads, 1, v_dim], any strides.
        k_cache: [blocks, block_size, kv_heads, head_dim]; v_cache: [blocks, block_size, kv_heads, v_dim]; written.
        block_tables: [batch, max_blocks] int32; positions: [batch, 1] int64, -1 for padding (writes to slot 0).
        cos, sin: of `rotate_half`, in q's dtype, or None; both or neither. Either one row per row of the batch,
            [batch, 1, 1, head_dim], or both whole tables, [length, head_dim], whose row max(position, 0) is used.
        q_norm, k_norm: [head_dim] weights of an RMSNorm over each head before RoPE, or None; eps, offset,
            narrow_first as in `rms_norm`. scale, window, softcap, sinks as in `reference.paged_attention`.
        k_scale, v_scale: of quantized caches, as in `reference.cache_write`; written.

    Returns:
        [batch, 1, heads, v_dim] in q's dtype, contiguous; zeros for padding rows.
    """
    if q_norm is not None:
        q = reference.rms_norm(q, q_norm, eps, offset, narrow_first)
    if k_norm is not None:
        k = reference.rms_norm(k, k_norm, eps, offset, narrow_first)
    if cos is not None and sin is not None:
        if cos.dim() == 2:
            cos, sin = (torch.nn.functional.embedding(positions.clamp(0), x).unsqueeze(1) for x in (cos, sin))
        q, k = reference.rotate_half(q, cos, sin), reference.rotate_half(k, cos, sin)
    slots = reference.cache_slots(block_tables, positions, k_cache.shape[1])
    reference.cache_write(k_cache, k, slots, k_scale)
    reference.cache_write(v_cache, v, slots, v_scale)
    return reference.paged_attention(
        q, k_cache, v_cache, block_tables, positions, scale, window, softcap, sinks, k_scale, v_scale
    ).contiguous()


def sample_with_logit(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """One token per row and the logit it had, which tells a host that leaves the logits on the device of NaN.

    Args:
        all as in `reference.sample`.

    Returns:
        tokens [batch] int64 as `sample` gives them, and logits[i, tokens[i]] as [batch] float32.
    """
    tokens = reference.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
    return tokens, logits.gather(1, tokens[:, None])[:, 0]
