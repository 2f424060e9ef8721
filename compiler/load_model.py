"""Builds the Hugging Face module without memory: parameters on `meta`, buffers with their real values.

The same module serves twice: traced with Ingot's attention (compiler/trace.py), and run eagerly as the numeric
gate's reference with its weights streamed in module by module (compiler/reference_model.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..artifacts.errors import IngotError, UnsupportedModelError
from . import attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter a module registers moves to `meta` at once; buffers stay real.

    Tables such as RoPE's frequencies are computed in constructors and are in no checkpoint, so they must be real;
    parameters are allocated (untouched pages) and dropped before anything writes to them.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def make_config(config: dict[str, Any]) -> Any:
    """transformers' configuration object for config.json's content.

    Raises:
        UnsupportedModelError: transformers does not know or does not accept the configuration.
    """
    from transformers import AutoConfig

    fields = {
        k: v for k, v in config.items() if k not in ("model_type", "transformers_version", "dtype", "torch_dtype")
    }
    try:
        return AutoConfig.for_model(config["model_type"], **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"config.json of type {config.get('model_type')!r} is not accepted",
            str(error),
            "check the file, or update transformers",
        ) from error


def make_model(config: dict[str, Any], dtype: str, attn: str = attention.NAME) -> nn.Module:
    """A causal LM in `dtype` for config.json's content, parameters on `meta`, in eval mode.

    Raises:
        UnsupportedModelError: no causal LM of this kind, or it has no attention seam.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    hf_config = make_config(config)
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config['model_type']} is an encoder-decoder model", "Ingot compiles decoders", ""
        )
    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                hf_config, attn_implementation=attn, dtype=DTYPES[dtype], experts_implementation="batched_mm"
            )
    except IngotError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot build a {config['model_type']} decoder with replaceable attention",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "see docs/architecture.md for what a model must offer",
        ) from error
    return model.eval().requires_grad_(False)
