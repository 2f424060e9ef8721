"""The walk over the model: each layer sees what the quantized layers before it give, and is quantized in its turn.

Peak memory is one layer's weights, what its quantization needs, and the calibration activations between two layers.
Finished layers are kept, so that an interrupted build goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Progress
from ..streamed_model import Part, StreamedModel
from .layers import Method, Quantized, quantize_layer
from .sites import Site
from .store import LayerStore

Load = Callable[[str], Tensor]
_PART, _DENSE, _OTHER = "part", "dense", "other"


def part_name(weight: str, output: str) -> str:
    """The name under which a calibrated weight's values, scale or zero point are loaded."""
    return f"{weight}:{output}"


class CalibratedWeights:
    """A checkpoint whose calibrated weights are there in parts, and whose norms have taken what AWQ folds into them."""

    def __init__(self, load: Load, store: LayerStore, layers: Sequence[str]) -> None:
        self._load = load
        self._store = store
        self._where: dict[str, tuple[str, str]] = {}
        for layer in layers:
            for stored in store.names(layer):
                kind, _, name = stored.partition(" ")
                if kind != _DENSE:
                    self._where[name] = (layer, stored)
        self.facts = {name: facts for layer in layers for name, facts in store.facts(layer).items()}

    def load(self, name: str) -> Tensor:
        """A tensor of the checkpoint, or one that calibration made."""
        if name in self._where:
            return self._store.load(*self._where[name])
        return self._load(name)


def calibrate(
    model: StreamedModel,
    load: Load,
    tokens: Tensor,
    sites: Sequence[Site],
    methods: Mapping[str, Method],
    store: LayerStore,
    progress: Progress,
) -> CalibratedWeights:
    """Quantize every weight of `methods`.

    Args:
        tokens: calibration text, int64 [samples, length]; sites: of the model's graph.
    """
    readers = _readers(model, sites, methods)
    by_part = _by_part(model, sites, methods, readers)
    done: list[str] = []

    def visit(part: Part) -> Any:
        if part.path not in by_part:
            return part.run()
        names = [linear.name for site in by_part[part.path] for linear in site.linears if linear.name in methods]
        if not store.has(part.path):
            progress.update(f"{part.path}: {len(names)} weights")
            modules = {name: readers[name] for name in names}
            made = quantize_layer(
                by_part[part.path],
                methods,
                modules,
                load,
                lambda: part.run(lambda _, __: None),
                tokens.numel(),
                model.device,
            )
            store.put(part.path, _tensors(made, model), made.facts)
        done.append(part.path)
        progress.update(part.path, advance=1)
        if part.path == last:
            return None
        for linear in (x for site in by_part[part.path] for x in site.linears if x.name in methods):
            dense = store.load(part.path, f"{_DENSE} {linear.name}")
            held = readers[linear.name].weight
            with torch.no_grad():
                held.copy_(dense.t() if linear.transposed else dense)  # type: ignore[operator]
        return part.run()

    last = [path for path in model.parts if path in by_part][-1]
    model.walk(tokens, visit, last)
    return CalibratedWeights(load, store, done)


def _tensors(made: Quantized, model: StreamedModel) -> dict[str, Tensor]:
    """A layer as it is kept: parts, what they stand for in the model's dtype, and norms."""
    kept = {
        f"{_PART} {part_name(name, output)}": value
        for name, parts in made.parts.items()
        for output, value in parts.items()
    }
    kept |= {f"{_DENSE} {name}": value.to(model.dtype) for name, value in made.dense.items()}
    return kept | {f"{_OTHER} {name}": value for name, value in made.others.items()}


def _readers(model: StreamedModel, sites: Sequence[Site], methods: Mapping[str, Method]) -> dict[str, nn.Module]:
    """The linear layer that reads each weight."""
    return {
        linear.name: model.model.get_submodule(linear.name.rpartition(".")[0])
        for site in sites
        for linear in site.linears
        if linear.name in methods
    }


def _by_part(
    model: StreamedModel, sites: Sequence[Site], methods: Mapping[str, Method], readers: Mapping[str, nn.Module]
) -> dict[str, list[Site]]:
    """The sites of every part that has any to quantize."""
    where = {id(module): path for path, part in model.parts.items() for module in part.modules()}
    found: dict[str, list[Site]] = {}
    for site in sites:
        for path in {where[id(readers[linear.name])]: None for linear in site.linears if linear.name in methods}:
            found.setdefault(path, []).append(site)
    return found
