"""The seam: the one place where Ingot enters a Hugging Face model.

`AttentionInterface.register("ingot", …)` replaces attention in every model that supports it. No mask function is
registered under the name, so transformers builds no mask; what the op needs (scale, window, softcap, sinks) arrives
in the call. Whatever it cannot express is refused here, before it could be computed wrongly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..artifacts.errors import UnsupportedModelError
from ..runtime.ops.schema import overload

NAME = "ingot"

# Arguments of transformers' attention call that do not change a causal decoder's result.
_HARMLESS = frozenset(
    {"dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits",
     "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_embeddings", "is_causal",
     "output_hidden_states", "return_dict", "logits_to_keep", "num_items_in_batch", "training"}
)  # fmt: skip


def _layer_window(module: torch.nn.Module, layer: int, passed: int | None) -> int:
    """The layer's sliding window, 0 for full attention.

    Most models pass it; some only put it into the mask, which is not built here. The configuration's `layer_types`
    is transformers' own common word for it, so it decides where a model is silent.
    """
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and layer < len(kinds) else None
    if kind == "chunked_attention":
        raise UnsupportedModelError(
            f"layer {layer} uses chunked attention",
            "its mask restarts at every chunk",
            "use a model with causal or sliding-window attention",
        )
    if passed is not None:
        return int(passed)
    if kind == "sliding_attention":
        return int(getattr(config, "sliding_window", 0) or 0)
    if kind is None and getattr(config, "use_sliding_window", True):
        return int(getattr(config, "sliding_window", 0) or 0)
    return 0


def ingot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, answered by one pure op.

    Args:
        query: [batch, heads, length, head_dim]; key, value: [batch, kv_heads, length, head_dim].

    Returns:
        [batch, length, heads, head_dim] and no weights.

    Raises:
        UnsupportedModelError: the call carries something the op cannot express.
    """
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no layer index", "its cache cannot be named", "")
    if attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} builds an attention mask of its own",
            "only causal and sliding-window attention can be cached",
            "",
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{type(module).__name__} is not causal", "Ingot compiles decoders", "")
    softcap = kwargs.pop("softcap", None) or kwargs.pop("logit_cap", None)
    sinks = kwargs.pop("s_aux", None)
    window = _layer_window(module, int(layer), kwargs.pop("sliding_window", None))
    strange = sorted(n for n, v in kwargs.items() if v is not None and v is not False and n not in _HARMLESS)
    if strange:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(strange)} to attention",
            "the attention op cannot express it",
            "",
        )
    scale = float(scaling) if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    out = overload("attention")(query, key, value, int(layer), scale, window, float(softcap or 0.0), sinks)
    return out, None


def register() -> None:
    """Make `attn_implementation="ingot"` known to transformers; repeating it changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, ingot_attention)
