"""The weights of a model that somebody else has quantized: which module is stored how, in the model's own names.

Everything here follows from headers, so a checkpoint that disagrees with its config is refused before its weights are
read. Quantized weights can be had in the layout of the ops (the pass keep-quantized does) or made dense, exactly, as
the numeric gate's reference wants them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from ...artifacts.errors import UnsupportedModelError, UsageError
from ...passes.quantize.held import QuantizedWeight
from ..checkpoint import SafetensorsCheckpoint
from ..config_check import read_quantization
from .block_fp8 import FP8Reader
from .compressed_tensors import CompressedTensorsReader
from .fields import FETCH, FIX, Fields
from .gptq import AWQReader, GPTQReader
from .layer import Layer, Reader, Stored
from .mxfp4 import Experts, MXFP4Reader

READERS = {reader.method: reader for reader in (CompressedTensorsReader, GPTQReader, AWQReader, FP8Reader, MXFP4Reader)}


@dataclass(frozen=True, eq=False)
class ForeignWeights:
    """The quantized weights of one checkpoint, by the parameters' names in the model.

    Attributes:
        method: as `quantization_config` names it.
        layers: weights of Linear modules; experts: weights that are made dense when they are read.
    """

    checkpoint: SafetensorsCheckpoint
    method: str
    layers: Mapping[str, Layer]
    experts: Mapping[str, Experts]

    @cached_property
    def held(self) -> dict[str, QuantizedWeight]:
        """The Linear weights as the passes take them."""
        return {name: layer.quantized() for name, layer in self.layers.items()}

    @property
    def made_dense(self) -> dict[str, str]:
        """What no op reads quantized, and what it is."""
        return dict.fromkeys(self.experts, f"{self.method} experts")

    @property
    def held_bytes(self) -> int:
        """What the quantized Linear weights take as they are stored."""
        names = [name for layer in self.layers.values() for name in layer.names]
        infos = [self.checkpoint.tensors[name] for name in names]
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)

    @property
    def names(self) -> set[str]:
        """Tensors of the checkpoint that they are made of."""
        made: list[Layer | Experts] = [*self.layers.values(), *self.experts.values()]
        return {name for one in made for name in one.names}

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.layers or parameter in self.experts

    def dense(self, parameter: str) -> Tensor:
        """A weight as the floats it stands for. Raises UsageError where its numbers are none a quantizer makes."""
        made = self.layers.get(parameter) or self.experts[parameter]
        return made.dense(self.checkpoint.load)


def make_reader(config: object, where: str) -> Reader:
    """The reader of a `quantization_config`.

    Raises:
        UnsupportedModelError: a method, format, strategy or key that is not known; names it.
        UsageError: it contradicts itself.
    """
    fields = Fields(config, where)
    method = fields.one_of("quant_method", tuple(READERS))
    reader: Reader = READERS[method](fields)
    return reader


def reader_of(source: Path) -> Reader | None:
    """The reader for a model folder or config file; None if it says nothing of quantized weights.

    Raises:
        UnsupportedModelError, UsageError: as `make_reader`.
    """
    config = read_quantization(source)
    return None if config is None else make_reader(config, f"{source}: quantization_config")


def refuse_random(config: Path) -> None:
    """Raise UsageError if a config for random weights describes quantized ones."""
    if read_quantization(config) is not None:
        raise UsageError(
            f"{config}: quantization_config means nothing to random weights",
            "they are made dense",
            "remove it from the file, and set quantization.scheme in the recipe to quantize them",
        )


def open_foreign(model: nn.Module, folder: Path) -> ForeignWeights | None:
    """What of `model` the folder holds quantized; None if its config.json has no `quantization_config`.

    Args:
        model: the dense module, parameters on meta.

    Raises:
        UnsupportedModelError, UsageError: as `make_reader`; a tensor is missing, superfluous, or disagrees with
            the config in shape or dtype.
    """
    reader = reader_of(folder)
    if reader is None:
        return None
    checkpoint = SafetensorsCheckpoint(folder)
    stored = Stored(checkpoint.tensors, checkpoint.load)
    layers, experts = _layers(model, reader, stored), _experts(model, reader, stored)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and name not in experts and not stored.has(_stored_name(name, stored)):
            raise UnsupportedModelError(
                f"{name} is stored expert by expert, beside quantized weights",
                f"{reader.method} experts are understood where all of a layer are one tensor",
                FIX,
            )
    if not layers and not experts:
        raise UsageError(
            f"{folder}: no weight is quantized",
            f"its quantization_config says {reader.method}, and no module is stored so",
            FETCH,
        )
    return ForeignWeights(checkpoint, reader.method, layers, experts)


def _layers(model: nn.Module, reader: Reader, stored: Stored) -> dict[str, Layer]:
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    found: dict[str, Layer] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        prefix = _stored_prefix(module_name, stored)
        shape = (module.out_features, module.in_features)
        layer = reader.layer(module_name, [kind.__name__ for kind in type(module).__mro__], prefix, shape, stored)
        twins = shared[id(module.weight)]
        if layer is None:
            if len(twins) == 1 and not stored.has(f"{prefix}.weight"):
                raise UsageError(
                    f"{prefix}.weight is missing",
                    f"quantization_config ({reader.method}) leaves this module as it is, and it is not stored so",
                    FETCH,
                )
            continue
        if len(twins) > 1:
            raise UnsupportedModelError(
                f"{module_name} is quantized and shares its weight with {twins[0].removesuffix('.weight')}",
                "config.json ties the two, the checkpoint stores them in different forms",
                'set "tie_word_embeddings" to false in config.json if the checkpoint holds both',
            )
        found[f"{module_name}.weight"] = layer
    return found


def _experts(model: nn.Module, reader: Reader, stored: Stored) -> dict[str, Experts]:
    if not isinstance(reader, MXFP4Reader):
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        made = reader.experts(name, _stored_name(name, stored), tuple(parameter.shape), stored)
        if made is not None:
            found[name] = made
    return found


def _stored_prefix(module: str, stored: Stored) -> str:
    """A module's name in the checkpoint: its own, or without the base model's prefix."""
    short = module.split(".", 1)[-1]
    return short if module not in stored.modules and short in stored.modules else module


def _stored_name(parameter: str, stored: Stored) -> str:
    module, _, leaf = parameter.rpartition(".")
    return f"{_stored_prefix(module, stored)}.{leaf}"
