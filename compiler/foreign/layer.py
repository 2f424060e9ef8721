"""One Linear as a checkpoint of somebody else's holds it: what must be stored for it, and how it is repacked.

A reader of a layout makes one `Layer` per module from the headers alone; values are read and checked when they are
asked for, tensor by tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from ...artifacts.errors import UsageError
from ...passes.quantize.held import QuantizedPart, QuantizedWeight
from ...passes.weights import Constant, Load
from ...runtime.ops.quantized import PACKED, dequantize, pack_nibbles, unpack_nibbles
from ..safetensors_header import TensorInfo
from .fields import FETCH

# Before a tensor's name: the tensor as it is stored, even where a parameter of the same name is made of it.
RAW = "stored:"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer(ABC):
    """A quantized weight [n, k]; subclasses know one layout each.

    Attributes:
        prefix: name of its module in the checkpoint; shape: [n, k].
        format, group, activations: as `linear_quantized` takes them.
        scale_dtype: of the scale in the layout of the ops.
        names: the tensors it is made of.
        columns: the column of the checkpoint that stands at each place, where groups were made in another order than
            the input's; None for the input's own order.
        note: what the checkpoint asks for and is not done, "" if nothing.
    """

    prefix: str
    shape: tuple[int, int]
    format: str
    group: tuple[int, int]
    scale_dtype: torch.dtype
    names: tuple[str, ...]
    activations: str = ""
    asymmetric: bool = False
    columns: Constant | None = None
    note: str = field(default="", compare=False)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Groups of rows and of columns."""
        return -(-self.shape[0] // self.group[0]), -(-self.shape[1] // self.group[1])

    @property
    def values_spec(self) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype of `values`."""
        n, k = self.shape
        if self.format in PACKED:
            return (n, k // 2), torch.uint8
        return (n, k), torch.int8 if self.format == "int8" else torch.float8_e4m3fn

    def quantized(self) -> QuantizedWeight:
        """The weight as the passes take it, nothing of it read yet."""
        zero = QuantizedPart(_Part(self, "zero"), self.scale_shape, torch.uint8) if self.asymmetric else None
        return QuantizedWeight(
            self.format, self.group, self.activations, QuantizedPart(_Part(self, "values"), *self.values_spec),
            QuantizedPart(_Part(self, "scale"), self.scale_shape, self.scale_dtype), zero, self.columns, self.note,
        )  # fmt: skip

    @abstractmethod
    def values(self, load: Load) -> Tensor:
        """The codes in the layout of the ops. Raises UsageError where they contradict the config."""

    @abstractmethod
    def scale(self, load: Load) -> Tensor:
        """The scale in the layout of the ops. Raises UsageError for one that is NaN, infinite or zero."""

    def zero(self, load: Load) -> Tensor | None:
        """Zero points uint8 in the scale's shape, None where the weight is symmetric."""
        return None

    def dense(self, load: Load) -> Tensor:
        """The weight it stands for, float32 [n, k], columns in the input's order."""
        wide = dequantize(self.values(load), self.scale(load), self.zero(load), self.format, list(self.group))
        return wide if self.columns is None else wide[:, self.columns.value.argsort()]

    def refused(self, what: str, why: str) -> UsageError:
        """An error about this layer's numbers."""
        return UsageError(f"{self.prefix}: {what}", why, "fetch the model again, or take another checkpoint of it")

    def checked_scale(self, scale: Tensor) -> Tensor:
        """`scale` itself, in the dtype and shape the layer promises. Raises UsageError for NaN, infinity and zero."""
        wide = scale.float()
        if not bool(wide.isfinite().all()) or not bool(wide.all()):
            bad = "zero" if bool(wide.isfinite().all()) else "NaN or infinite"
            raise self.refused(f"a scale is {bad}", "no quantizer makes such a one")
        return scale.to(self.scale_dtype).expand(self.scale_shape).contiguous()

    def from_codes(self, raw: Tensor) -> Tensor:
        """`values` of unsigned codes in the checkpoint's order: bytes [n, k], or [n, k/2] of two codes each."""
        if self.format == "int8":
            return ((raw if self.columns is None else raw[:, self.columns.value]) ^ 128).view(torch.int8)
        if self.columns is None:
            return raw
        return pack_nibbles(unpack_nibbles(raw)[:, self.columns.value])


@dataclass(frozen=True)
class _Part:
    """Values, scale or zero points of a layer as a weight of a graph."""

    layer: Layer
    output: Literal["values", "scale", "zero"]

    def evaluate(self, load: Load) -> Tensor:
        """Repacked from the checkpoint's tensors."""
        made: Tensor = getattr(self.layer, self.output)(lambda name: load(RAW + name))
        return made

    def sources(self) -> tuple[str, ...]:
        """The checkpoint's tensors, as they are stored."""
        return tuple(RAW + name for name in self.layer.names)


class Reader(Protocol):
    """Reads one `quantization_config`; made from it, it has refused what it does not know."""

    method: str

    def layer(
        self, module: str, kinds: Collection[str], prefix: str, shape: tuple[int, int], stored: Stored
    ) -> Layer | None:
        """The quantized layer of a Linear, None if it is dense.

        Args:
            module: its name in the model; kinds: names of its class and of those above it.
            prefix: its name in the checkpoint; shape: [n, k].
        """
        ...


@dataclass(frozen=True, eq=False)
class Stored:
    """What a checkpoint's headers say, and its small tensors where the graph depends on them."""

    tensors: Mapping[str, TensorInfo]
    load: Load

    @cached_property
    def modules(self) -> frozenset[str]:
        """Names of the modules that have a tensor of their own."""
        return frozenset(name.rpartition(".")[0] for name in self.tensors)

    def has(self, *names: str) -> bool:
        """Whether any of the tensors is stored."""
        return any(name in self.tensors for name in names)

    def need(
        self, name: str, shapes: Collection[tuple[int, ...]], dtypes: Collection[torch.dtype], why: str
    ) -> TensorInfo:
        """A tensor that must be there in one of these shapes and dtypes.

        Args:
            why: what makes it so, in the config's words.

        Raises:
            UsageError: it is missing, or disagrees with the config.
        """
        info = self.tensors.get(name)
        if info is None:
            raise UsageError(f"{name} is missing", f"quantization_config asks for it: {why}", FETCH)
        if tuple(info.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise UsageError(f"{name} is {list(info.shape)}", f"{wanted} is expected: {why}", FETCH)
        if info.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise UsageError(f"{name} holds {info.dtype}", f"{wanted} is expected: {why}", FETCH)
        return info


def group_columns(size: int, k: int, prefix: str) -> int:
    """Columns per group: `size`, or all `k` for -1. Raises UsageError if groups are not all of one size."""
    columns = k if size == -1 else size
    if columns < 1 or k % columns:
        raise UsageError(
            f"{prefix}: groups of {size} columns do not divide its {k} columns",
            "quantization_config's group size and the model's shapes disagree",
            FETCH,
        )
    return columns


def grouped_order(g_idx: Tensor, groups: int, layer: str) -> Constant | None:
    """Which column stands where once each group's columns are together; None if they are already.

    Args:
        g_idx: the group of each column, [k].

    Raises:
        UsageError: a group that is not there, or groups of different sizes.
    """
    index = g_idx.long()
    size = index.numel() // groups
    reason = ""
    if bool((index < 0).any()) or bool((index >= groups).any()):
        reason = f"it names group {int(index.min())} to {int(index.max())}, there are {groups}"
    elif not bool((index.bincount(minlength=groups) == size).all()):
        reason = f"its groups have not all {size} columns"
    if reason:
        raise UsageError(f"{layer}: g_idx is out of range", reason, "fetch the model again")
    order = index.argsort(stable=True)
    return None if torch.equal(order, torch.arange(index.numel())) else Constant(order)
