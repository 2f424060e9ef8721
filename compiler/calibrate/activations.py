"""What is kept of a layer's inputs over all calibration text: a Gram matrix for GPTQ, or a sample for AWQ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SAMPLED = 2048  # tokens of a sample


class GramMatrix:
    """Sum of x xᵀ over all inputs x, float32 [k, k]."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.matrix = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Inputs [..., k] of some tokens."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.matrix.addmm_(flat.t(), flat)
        self.tokens += len(flat)


class InputSample:
    """Mean |x| per channel, float32 [k], and about `SAMPLED` inputs evenly from all of them.

    Args:
        total: tokens that will come.
    """

    def __init__(self, k: int, total: int, device: torch.device) -> None:
        self._sum = torch.zeros(k, dtype=torch.float32, device=device)
        self._kept: list[Tensor] = []
        self._stride = max(1, total // SAMPLED)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Inputs [..., k] of some tokens."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        self._sum += flat.float().abs().sum(0)
        self._kept.append(flat[-self.tokens % self._stride :: self._stride].clone())
        self.tokens += len(flat)

    @property
    def magnitude(self) -> Tensor:
        """Mean |x| per channel."""
        return self._sum / max(1, self.tokens)

    @property
    def inputs(self) -> Tensor:
        """The sample, [tokens, k] in the model's dtype."""
        return torch.cat(self._kept)


Statistics = GramMatrix | InputSample


def watch(module: nn.Module, statistics: Statistics) -> Callable[[], None]:
    """Let `statistics` see every input of a linear layer; returns what ends it."""
    handle = module.register_forward_pre_hook(lambda _, args: statistics.add(args[0]))
    return handle.remove
