"""How far each quantized layer is off, one by one: what the gate names when a quantized build falls short.

One chunk of the gate's tokens runs through the planned prefill graph, eagerly. Each product with a quantized weight is
computed a second time with the weight it was made of, on the same input: its own error, not that of the layers before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.base import GraphPass
from ..passes.graph import operands
from ..passes.manager import run_passes
from ..passes.quantize.weights import QuantizeWeights
from ..passes.weights import Concat, Expression, Load, Quantized
from ..runtime.ops.schema import overload
from .evaluate import Evaluator, step_inputs
from .load_model import make_model
from .plan import Plan
from .trace import trace

_PRODUCT = overload("linear_quantized")


@dataclass(frozen=True)
class LayerError:
    """A product's relative error: the norm of what its output is off by over the norm of the output."""

    name: str
    format: str
    error: float

    def __str__(self) -> str:
        return f"{self.name} ({self.format}, off by {self.error:.1%})"


def worst_layers(plan: Plan, load: Load, tokens: Sequence[int], passes: Sequence[GraphPass]) -> list[LayerError]:
    """Every product with a quantized weight, the worst first.

    Args:
        tokens: as many as the shortest prefill chunk are used. passes: the build's; those behind quantization are left.
    """
    shape = next(e for e in plan.recipe.engines() if e.phase == "prefill")
    context = plan.contexts[shape.name]
    traced = trace(make_model(plan.config, plan.recipe.model.dtype), shape.batch, shape.length)
    last = next(i for i, p in enumerate(passes) if isinstance(p, QuantizeWeights))
    run_passes(traced, passes[: last + 1], context)
    observer = _Observer(traced, load)
    inputs = step_inputs([list(tokens[: shape.length])], [0], shape.length, context.max_blocks, context.block_size)
    with torch.no_grad():
        observer.run(inputs)
    return sorted(observer.errors, key=lambda layer: -layer.error)


class _Observer(Evaluator):
    """Notes the error of each quantized product that it computes."""

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        self.errors: list[LayerError] = []
        return super().run(inputs)

    def call(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        value = super().call(node, *args, **kwargs)
        weight = operands(node)[1] if node.target is _PRODUCT else None
        plain = _plain(self.traced.weights.entries[str(weight.target)]) if weight is not None else None
        if plain is not None:
            bias = None if args[4] is None else args[4].float()
            exact = torch.nn.functional.linear(args[0].float(), plain.evaluate(self.load).float(), bias)
            error = (value.float() - exact).norm() / exact.norm().clamp(min=1e-30)
            name = ", ".join(n.removesuffix(".weight") for n in plain.sources())
            self.errors.append(LayerError(name, args[5], float(error)))
        return value


def _plain(entry: Expression) -> Expression | None:
    """What a quantized weight was made of; None where there never was a plain one."""
    if isinstance(entry, Quantized):
        return entry.part
    if isinstance(entry, Concat):
        parts = [_plain(part) for part in entry.parts]
        return None if any(p is None for p in parts) else Concat(tuple(p for p in parts if p is not None))
    return None
