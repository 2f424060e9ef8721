"""What each unit of weights costs in each form: KL divergence of the model with that unit alone quantized.

All variants walk through the model together, as further rows of one batch: each layer's weights are read once, a
variant costs nothing before its own layer, and nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...passes.quantize.round_to_nearest import RoundToNearest
from ...runtime.ops.quantized import dequantize
from ..streamed_model import Part, StreamedModel
from .assign import Form

Variant = Mapping[str, Form]  # by the weight's name, for the weights that are not as they were
Load = Callable[[str], Tensor]


def rounded(weight: Tensor, form: Form, transposed: bool) -> Tensor:
    """What a weight is after rounding to the nearest in a form, in its own orientation, float32."""
    wide = weight.float().t() if transposed else weight.float()
    if form.scheme != "none":
        make = RoundToNearest("int4" if form.scheme == "W4A16" else "int8", form.group_size)
        parts = make(wide)
        columns = form.group_size or wide.shape[1]
        wide = dequantize(parts["values"], parts["scale"], None, make.format, [1, columns])
    return wide.t() if transposed else wide


def divergences(
    model: StreamedModel,
    tokens: Tensor,
    variants: Sequence[Variant],
    transposed: Mapping[str, bool],
    advance: Callable[[str], None] = lambda _: None,
) -> list[float]:
    """Mean KL of every variant against the model as it is, over tokens [samples, length], in nats.

    Args:
        transposed: whether a weight of the variants is stored [k, n].
    """
    count = len(tokens)
    begun = [False] * len(variants)  # whether a variant differs by now
    found = [0.0] * len(variants)
    head = list(model.parts)[-1]

    def visit(part: Part) -> Any:
        advance(part.path)
        if part.path == head:
            wanted: list[Tensor] = []
            part.run(lambda _, out: wanted.append(torch.log_softmax(model.finish(out).float(), -1)), 0, count)
        whole = part.run(None, 0, count) if part.path != head else None
        for index, variant in enumerate(variants):
            own = {name: form for name, form in variant.items() if name in part.names}
            start = (index + 1) * count
            if not own and not begun[index]:
                if part.path != head:
                    part.repeat(whole, count, start)
                continue
            begun[index] = True
            exact = {name: part.parameter(name).clone() for name in own}
            for name, form in own.items():
                part.parameter(name).copy_(rounded(exact[name], form, transposed[name]))
            if part.path == head:
                found[index] = _divergence(model, part, wanted, start, start + count)
            else:
                whole = part.run(None, start, start + count, whole)
            for name, value in exact.items():
                part.parameter(name).copy_(value)
        return whole

    model.walk(tokens.repeat(len(variants) + 1, 1), visit, last=head)
    return found


def _divergence(model: StreamedModel, part: Part, wanted: Sequence[Tensor], start: int, stop: int) -> float:
    total, positions, seen = 0.0, 0, iter(wanted)

    def consume(_: int, out: Tensor) -> None:
        nonlocal total, positions
        p, q = next(seen), torch.log_softmax(model.finish(out).float(), -1)
        total += float((p.exp() * (p - q)).sum(-1).clamp(min=0).sum())
        positions += p.shape[0] * p.shape[1]

    part.run(consume, start, stop)
    return total / positions
