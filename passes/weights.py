"""What each weight of a graph is made of, so that passes can merge and quantize without touching data.

A pass names a new weight and says how it follows from stored ones; the build evaluates one weight at a time, so
that no more than one merged tensor is ever in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..artifacts.errors import UsageError
from ..runtime.ops.packed import pack_groups, pack_weight

Load = Callable[[str], Tensor]


class Expression(Protocol):
    """How a weight follows from the checkpoint; compared by `==`, so that two engines can share one weight."""

    def evaluate(self, load: Load) -> Tensor:
        """The value, with `load` giving the checkpoint's tensors by name."""
        ...

    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors it is made of, in order."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint, by its name there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self, load: Load) -> Tensor:
        """The tensor in the graph's dtype."""
        return load(self.name).to(self.dtype)

    def sources(self) -> tuple[str, ...]:
        """Itself."""
        return (self.name,)


@dataclass(frozen=True, eq=False)
class Constant:
    """A value known at build: a buffer of the model, or the result of folding."""

    value: Tensor

    def evaluate(self, load: Load) -> Tensor:
        """The value itself."""
        return self.value

    def sources(self) -> tuple[str, ...]:
        """None: it is in no checkpoint."""
        return ()

    def digest(self) -> str:
        """Hex digest of dtype, shape and bytes: equal constants of several engines share one name."""
        head = f"{self.value.dtype}{tuple(self.value.shape)}".encode()
        return hashlib.sha256(
            head + self.value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


@dataclass(frozen=True)
class Concat:
    """Several weights one after another along dimension 0."""

    parts: tuple[Expression, ...]

    def evaluate(self, load: Load) -> Tensor:
        """The concatenation; parts are loaded one by one."""
        return torch.cat([part.evaluate(load) for part in self.parts])

    def sources(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(name for part in self.parts for name in part.sources())


@dataclass(frozen=True)
class Transposed:
    """A matrix turned round and made contiguous."""

    part: Expression

    def evaluate(self, load: Load) -> Tensor:
        """[n, k] of a stored [k, n]."""
        return self.part.evaluate(load).t().contiguous()

    def sources(self) -> tuple[str, ...]:
        """Those of its part."""
        return self.part.sources()


@dataclass(frozen=True)
class Applied:
    """What a function makes of a weight: the same values stored otherwise."""

    part: Expression
    function: Callable[[Tensor], Tensor]

    def evaluate(self, load: Load) -> Tensor:
        """The function's result."""
        return self.function(self.part.evaluate(load))

    def sources(self) -> tuple[str, ...]:
        """Those of its part."""
        return self.part.sources()


@dataclass(frozen=True)
class Quantized:
    """One output of a quantization scheme: `parts(tensor)[output]`."""

    part: Expression
    scheme: Callable[[Tensor], dict[str, Tensor]]
    output: str

    def evaluate(self, load: Load) -> Tensor:
        """The quantized values or their scales."""
        return self.scheme(self.part.evaluate(load))[self.output]

    def sources(self) -> tuple[str, ...]:
        """Those of its part."""
        return self.part.sources()


@dataclass(frozen=True)
class Scales:
    """The scales of a quantized weight: such as no number can be made with are refused, wherever they come from."""

    part: Expression

    def evaluate(self, load: Load) -> Tensor:
        """The scales. Raises UsageError where one is zero, NaN or infinite; exponents (uint8) where one is NaN's."""
        value = self.part.evaluate(load)
        bad = value == 255 if value.dtype == torch.uint8 else (value == 0) | ~torch.isfinite(value.float())
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise UsageError(
                f"the scales of {', '.join(self.sources()) or 'a quantized weight'} hold {value[where].item()}",
                f"{int(bad.sum())} of {bad.numel()} are zero, NaN or infinite, the first at {list(where)}",
                "leave the weight out (quantization.ignore), or use sound weights",
            )
        return value

    def sources(self) -> tuple[str, ...]:
        """Those of its part."""
        return self.part.sources()


@dataclass(frozen=True)
class Packed:
    """A weight, or its scales or zero points, in the CPU kernels' layout (see runtime/ops/packed.py).

    Attributes:
        format: of the weight; "" for scales and zero points.
    """

    part: Expression
    format: str

    def evaluate(self, load: Load) -> Tensor:
        """The panels."""
        value = self.part.evaluate(load)
        return pack_weight(value, self.format) if self.format else pack_groups(value)

    def sources(self) -> tuple[str, ...]:
        """Those of its part."""
        return self.part.sources()


@dataclass
class Weights:
    """The weights of one graph by attribute name."""

    entries: dict[str, Expression] = field(default_factory=dict)

    @staticmethod
    def attribute(name: str) -> str:
        """A flat attribute name for a dotted one (graph modules hold weights flat)."""
        return name.replace(".", "__")

    def evaluate(self, attribute: str, load: Load) -> Tensor:
        """The value of one weight, contiguous, on the CPU."""
        return self.entries[attribute].evaluate(load).detach().contiguous()
