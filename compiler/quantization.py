"""A recipe's quantization, held against the target's kernels and the model's shapes before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..artifacts.errors import UnsupportedModelError, UsageError
from ..passes.base import QuantizationGroup
from ..passes.instruments import PassRecord
from ..passes.quantize.kv_cache import CACHE_DTYPES
from ..passes.quantize.schemes import SCHEMES
from ..passes.quantize.weights import QuantizeWeights
from ..runtime.ops.cuda.attention_operands import CACHE_DTYPES as CUDA_CACHE_DTYPES
from ..runtime.ops.cuda.linear_problem import FORMATS as CUDA_FORMATS
from .foreign.weights import ForeignWeights
from .recipe import Recipe
from .recipe_sections import GROUP_SIZES, Quantization


def groups_of(asked: Quantization) -> tuple[QuantizationGroup, ...]:
    """The recipe's groups as passes know them."""
    return tuple(QuantizationGroup(g.scheme, g.targets, g.ignore, g.group_size, g.symmetric) for g in asked.active)


def fitting(device: str) -> list[str]:
    """The schemes that a target has kernels for."""
    return [s.name for s in SCHEMES.values() if device == "cpu" or (s.format, s.activations) in CUDA_FORMATS]


def check_target(recipe: Recipe) -> None:
    """Raise UsageError for a scheme that the target has no kernel for (names those it has), or words without effect."""
    device, known = recipe.target.device, fitting(recipe.target.device)
    for scheme in recipe.quantization.schemes:
        if scheme not in known:
            raise UsageError(
                f"quantization.scheme {scheme!r} has no kernel for {device}",
                f"target.device is {device!r}, whose schemes are: {', '.join(['none', *known])}",
                f"--set quantization.scheme={known[0] if known else 'none'}, or --set target.device=cpu",
            )
    kept = recipe.shapes.kv_cache_dtype
    if device == "cuda" and kept != "auto" and str(CACHE_DTYPES[kept]).removeprefix("torch.") not in CUDA_CACHE_DTYPES:
        raise UsageError(
            f"shapes.kv_cache_dtype {kept!r} has no kernel for cuda",
            "target.device is 'cuda', which keeps keys and values in the model's dtype",
            "--set shapes.kv_cache_dtype=auto, or --set target.device=cpu",
        )
    if not recipe.quantization.active and recipe.quantization.ignore:
        raise UsageError(
            "quantization.ignore has no effect", 'quantization.scheme is "none"', "set a scheme, or drop it"
        )


def check_held(recipe: Recipe, foreign: ForeignWeights) -> None:
    """Raise UnsupportedModelError where the checkpoint's own quantized weights have no kernel on the target."""
    if recipe.target.device == "cpu" or "keep-quantized" in recipe.passes.skip:
        return
    for name, layer in foreign.layers.items():
        if (layer.format, layer.activations) not in CUDA_FORMATS:
            kind = f"{layer.format} weights with {layer.activations or 'plain'} activations"
            raise UnsupportedModelError(
                f"{name} has no kernel for {recipe.target.device}",
                f"the checkpoint ({foreign.method}) holds {kind}",
                "--set target.device=cpu, or make the weights dense: --set passes.skip='[\"keep-quantized\"]'",
            )


def check_shapes(recipe: Recipe, records: Mapping[str, Sequence[PassRecord]]) -> None:
    """Raise UsageError where a group size does not divide a weight's columns, or where a scheme reached no weight."""
    asked = recipe.quantization
    if not asked.active:
        return
    for engine, passes in records.items():
        lossy = [record for record in passes if record.name == QuantizeWeights.name]
        for record in lossy:
            if unfit := record.facts.get("indivisible"):
                raise _indivisible(unfit)  # type: ignore[arg-type]
        if not any(record.changed for record in lossy if "held" not in record.facts):
            patterns = "; ".join(f"targets {list(g.targets)}, ignore {list(g.ignore)}" for g in asked.active)
            raise UsageError(
                f"quantization reached no weight of engine {engine}",
                f"{patterns} leave none",
                'use targets = ["Linear"], or patterns of weight names as --dump-ir shows them',
            )


def _indivisible(unfit: list[dict[str, Any]]) -> UsageError:
    first, more = unfit[0], f" (and of {len(unfit) - 1} more)" if len(unfit) > 1 else ""
    sizes = [size for size in GROUP_SIZES if all(entry["columns"] % size == 0 for entry in unfit)]
    advice = f"set quantization.group_size = {sizes[-1]}, or " if sizes else ""
    size = (
        f"quantization.group_size = {first['group_size']}"
        if first["group_size"]
        else "int4 packs two columns a byte; it"
    )
    return UsageError(
        f"{size} does not divide the {first['columns']} columns of {first['weight']}{more}",
        "a scale belongs to a whole group of columns",
        f"{advice}leave such weights out: quantization.ignore = [{first['weight']!r}]",
    )
