"""The walk over the model: each layer sees what the quantized layers before it give, and is quantized in its turn.

Peak memory is one layer's weights, what its quantization needs, and the calibration activations between two layers.
Finished layers are kept, so that an interrupted build goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...runtime.ops.quantized import dequantize
from ..console import Progress
from ..streamed_model import Part, StreamedModel
from .layers import Method, Quantized, quantize_layer
from .sites import Linear, Site
from .store import LayerStore

Load = Callable[[str], Tensor]
_PART, _COLUMNS, _ROWS, _OTHER = "part", "columns", "rows", "other"


def part_name(weight: str, output: str) -> str:
    """The name under which a calibrated weight's values, scale or zero point are loaded."""
    return f"{weight}:{output}"


class CalibratedWeights:
    """A checkpoint whose calibrated weights are there in parts, and whose norms have taken what AWQ folds into them.

    Asked for as a whole, a calibrated weight is what its parts stand for.
    """

    def __init__(self, load: Load, store: LayerStore, layers: Sequence[str], linears: Mapping[str, Linear]) -> None:
        self._load, self._store, self._linears = load, store, linears
        self._where: dict[str, tuple[str, str]] = {}
        for layer in layers:
            for stored in store.names(layer):
                kind, _, name = stored.partition(" ")
                if kind in (_PART, _OTHER):
                    self._where[name] = (layer, stored)
        self.facts = {name: facts for layer in layers for name, facts in store.facts(layer).items()}

    def load(self, name: str) -> Tensor:
        """A tensor of the checkpoint, or one that calibration made."""
        if name in self._where:
            return self._store.load(*self._where[name])
        if name in self._linears:
            linear = self._linears[name]
            dense = _stands_for(self._store, self._where[part_name(name, "values")][0], linear)
            return dense.t().contiguous() if linear.transposed else dense
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
    linears = {linear.name: linear for site in sites for linear in site.linears if linear.name in methods}
    readers = {name: model.model.get_submodule(name.rpartition(".")[0]) for name in linears}
    by_part = _by_part(model, sites, readers)
    done: list[str] = []

    def visit(part: Part) -> Any:
        if part.path not in by_part:
            return part.run()
        names = [linear.name for site in by_part[part.path] for linear in site.linears if linear.name in methods]
        progress.update(part.path)
        if not store.has(part.path):
            made = quantize_layer(
                by_part[part.path], methods, {name: readers[name] for name in names}, load,
                lambda: part.run(lambda _, __: None), tokens.numel(), model.device,
            )  # fmt: skip
            store.put(part.path, _tensors(made), made.facts)
        done.append(part.path)
        progress.update(part.path, advance=1)
        if part.path == last:
            return None
        for name in names:
            dense, held = _in_place(store, part.path, linears[name]), readers[name].weight
            held.copy_(dense.t() if linears[name].transposed else dense)  # type: ignore[operator]
        return part.run()

    last = [path for path in model.parts if path in by_part][-1]
    model.walk(tokens, visit, last)
    return CalibratedWeights(load, store, done, linears)


def _tensors(made: Quantized) -> dict[str, Tensor]:
    """A layer as it is kept."""
    kept = {
        f"{_PART} {part_name(name, output)}": value
        for name, parts in made.parts.items()
        for output, value in parts.items()
    }
    for kind, tensors in ((_COLUMNS, made.columns), (_ROWS, made.rows), (_OTHER, made.others)):
        kept |= {f"{kind} {name}": value for name, value in tensors.items()}
    return kept


def _stands_for(store: LayerStore, layer: str, linear: Linear) -> Tensor:
    """Float32 [n, k] of a finished weight, as its parts have it."""
    values, scale, zero = (f"{_PART} {part_name(linear.name, output)}" for output in ("values", "scale", "zero"))
    zeros = store.load(layer, zero) if zero in store.names(layer) else None
    scales = store.load(layer, scale)
    return dequantize(store.load(layer, values), scales, zeros, "int4", [1, linear.k // scales.shape[1]])


def _in_place(store: LayerStore, layer: str, linear: Linear) -> Tensor:
    """The weight that computes the same in a layer whose norms and other weights are as they were."""
    dense, names = _stands_for(store, layer, linear), store.names(layer)
    if (columns := f"{_COLUMNS} {linear.name}") in names:
        dense /= store.load(layer, columns)
    if (rows := f"{_ROWS} {linear.name}") in names:
        dense *= store.load(layer, rows)[:, None]
    return dense


def _by_part(model: StreamedModel, sites: Sequence[Site], readers: Mapping[str, nn.Module]) -> dict[str, list[Site]]:
    """The sites of every part that has any to quantize."""
    where = {id(module): path for path, part in model.parts.items() for module in part.modules()}
    found: dict[str, list[Site]] = {}
    for site in sites:
        for path in {where[id(readers[linear.name])]: None for linear in site.linears if linear.name in readers}:
            found.setdefault(path, []).append(site)
    return found
