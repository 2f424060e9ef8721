"""Registers Ingot's ops with PyTorch: schema, shapes (for tracing on `meta`) and the reference semantics.

Importing this module once is what makes `torch.ops.ingot.*` exist. Passes and back ends refer to the ops by these
schemas; `_OPS` is the whole dialect. All of them are pure but `cache_write` and `attention_step`, which write the
cache. What the operands of each are (shapes, and where there is a choice of them) its semantics say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import fused_reference, packed, quantized, reference

_LIBRARY = torch.library.Library("ingot", "DEF")


def _attention_shape(q: Tensor, v_like: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_like.shape[-1])


def _fused_linear_shape(x: Tensor, weight: Tensor, activation: str, wide: bool) -> Tensor:
    columns = weight.shape[0] // 2 if activation else weight.shape[0]
    return x.new_empty(*x.shape[:-1], columns, dtype=torch.float32 if wide else x.dtype)


def _sum_and_norm(x: Tensor, residual: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual)
    return total, torch.empty_like(total, memory_format=layout)


_OPS: dict[str, tuple[str, Callable[..., object], Callable[..., object]]] = {
    "attention": (
        "(Tensor q, Tensor k, Tensor v, int layer, float scale, int window, float softcap, Tensor? sinks) -> Tensor",
        reference.attention,
        lambda q, k, v, layer, scale, window, softcap, sinks: _attention_shape(q, v),
    ),
    "paged_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor positions, float scale, int window, "
        "float softcap, Tensor? sinks, Tensor? k_scale, Tensor? v_scale) -> Tensor",
        reference.paged_attention,
        lambda q, k_cache, v_cache, *rest: _attention_shape(q, v_cache),
    ),
    "cache_slots": (
        "(Tensor block_tables, Tensor positions, int block_size) -> Tensor",
        reference.cache_slots,
        lambda block_tables, positions, block_size: positions.new_empty(positions.numel()),
    ),
    "cache_write": (
        "(Tensor(a!) cache, Tensor x, Tensor slots, Tensor(b!)? scale) -> ()",
        reference.cache_write,
        lambda cache, x, slots, scale: None,
    ),
    "linear_dense": (
        "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        reference.linear_dense,
        lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    ),
    "linear_quantized": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias, str format, int[] group, str activations)"
        " -> Tensor",
        quantized.linear_quantized,
        lambda x, weight, scale, zero, bias, format, group, activations: x.new_empty(*x.shape[:-1], weight.shape[0]),
    ),
    "embedding_quantized": (
        "(Tensor ids, Tensor weight, Tensor scale, Tensor? zero, Tensor like, str format, int[] group) -> Tensor",
        quantized.embedding_quantized,
        lambda ids, weight, scale, zero, like, format, group: like.new_empty(
            *ids.shape, weight.shape[1] * (2 if format in quantized.PACKED else 1)
        ),
    ),
    "linear_packed": (
        "(Tensor x, Tensor weight, Tensor? scale, Tensor? zero, Tensor? bias, int rows, str format, int group, "
        "str activations) -> Tensor",
        packed.linear_packed,
        lambda x, weight, scale, zero, bias, rows, format, group, activations: x.new_empty(*x.shape[:-1], rows),
    ),
    "embedding_packed": (
        "(Tensor ids, Tensor weight, Tensor? scale, Tensor? zero, Tensor like, int columns, str format, int group)"
        " -> Tensor",
        packed.embedding_packed,
        lambda ids, weight, scale, zero, like, columns, format, group: like.new_empty(*ids.shape, columns),
    ),
    "rms_norm": (
        "(Tensor x, Tensor weight, float eps, float offset, bool narrow_first) -> Tensor",
        reference.rms_norm,
        lambda x, weight, eps, offset, narrow_first: torch.empty_like(x),
    ),
    "add_rms_norm": (
        "(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool narrow_first) -> (Tensor, Tensor)",
        reference.add_rms_norm,
        lambda x, residual, weight, eps, offset, narrow_first: _sum_and_norm(x, residual, torch.preserve_format),
    ),
    "add_layer_norm": (
        "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
        reference.add_layer_norm,
        lambda x, residual, weight, bias, eps: _sum_and_norm(x, residual, torch.contiguous_format),
    ),
    "gated_activation": (
        "(Tensor x, str kind, bool gate_first) -> Tensor",
        reference.gated_activation,
        lambda x, kind, gate_first: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    ),
    "rotate_half": (
        "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
        reference.rotate_half,
        lambda x, cos, sin: torch.empty_like(x),
    ),
    "fused_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? residual, float eps, float offset, "
        "bool narrow_first, str activation, bool gate_first, bool wide, Tensor? scale, Tensor? zero, str format, "
        "int[] group, str activations) -> Tensor",
        fused_reference.fused_linear,
        lambda x, weight, bias, norm_weight, residual, eps, offset, narrow_first, activation, gate_first, wide, *rest: (
            _fused_linear_shape(x, weight, activation, wide)
        ),
    ),
    "attention_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_tables, Tensor positions, "
        "Tensor? cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, Tensor? sinks, float eps, float offset, "
        "bool narrow_first, float scale, int window, float softcap, Tensor(c!)? k_scale, Tensor(d!)? v_scale)"
        " -> Tensor",
        fused_reference.attention_step,
        lambda q, k, v, k_cache, v_cache, *rest: _attention_shape(q, v_cache),
    ),
    "sample": (
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions)"
        " -> Tensor",
        reference.sample,
        lambda logits, temperature, top_k, top_p, min_p, seeds, positions: seeds.new_empty(logits.shape[0]),
    ),
    "sample_with_logit": (
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions)"
        " -> (Tensor tokens, Tensor logit)",
        fused_reference.sample_with_logit,
        lambda logits, temperature, top_k, top_p, min_p, seeds, positions: (
            seeds.new_empty(logits.shape[0]),
            logits.new_empty(logits.shape[0]),
        ),
    ),
}

for _name, (_schema, _semantics, _shape) in _OPS.items():
    _LIBRARY.define(f"{_name}{_schema}")
    _LIBRARY.impl(_name, _semantics, "CPU")
    _LIBRARY.impl(_name, _semantics, "CUDA")
    torch.library.register_fake(f"ingot::{_name}", _shape, lib=_LIBRARY)


def overload(name: str) -> torch._ops.OpOverload:
    """The op's overload, as it stands in a graph."""
    return getattr(torch.ops.ingot, name).default


SEMANTICS: dict[torch._ops.OpOverload, Callable[..., object]] = {overload(n): s for n, (_, s, _) in _OPS.items()}
