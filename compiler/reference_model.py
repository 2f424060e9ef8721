"""Eager Hugging Face as the numeric gate's reference, without holding the model: weights are streamed in per module.

Each module gets its parameters right before its forward and loses them right after, so the peak is one module's
weights. Small models keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from .load_model import DTYPES, make_model

_KEEP_BYTES = 1 << 30
_SIMILAR = 1.6  # longest over shortest sequence of a batch


def fill_parameters(
    module: nn.Module, path: str, load: Callable[[str], torch.Tensor], device: torch.device, inner: bool = True
) -> None:
    """Give the parameters of a module that are on `meta` their values, in the dtype the module has them in.

    Args:
        path: the module's name in the model; inner: whether the modules inside of it are filled too.
    """
    for below, each in module.named_modules() if inner else [("", module)]:
        prefix = "".join(f"{name}." for name in (path, below) if name)
        for name, held in each._parameters.items():
            if held is not None and held.device.type == "meta":
                value = load(prefix + name).to(device)
                cast = value.to(held.dtype) if held.dtype.is_floating_point else value
                each._parameters[name] = nn.Parameter(cast, requires_grad=False)


def empty_parameters(module: nn.Module, inner: bool = True) -> None:
    """Put the parameters of a module back on `meta`."""
    for each in module.modules() if inner else [module]:
        for name, held in each._parameters.items():
            if held is not None:
                each._parameters[name] = nn.Parameter(held.to("meta"), requires_grad=False)


class ReferenceModel:
    """transformers' own eager model for one config and dtype.

    Args:
        config: config.json's content; dtype: "float32", "bfloat16" or "float16".
        load: gives a parameter by its name in the module.
        device: where it runs, "cpu" or "cuda".
    """

    def __init__(
        self, config: dict[str, object], dtype: str, load: Callable[[str], torch.Tensor], device: str = "cpu"
    ) -> None:
        self.model = make_model(config, dtype, attn="eager")
        self.load = load
        self.device = torch.device(device)
        for module in self.model.modules():
            for name, held in module._buffers.items():
                if held is not None:
                    module._buffers[name] = held.to(self.device)
        self.dtype = DTYPES[dtype]
        total = sum(p.numel() * p.element_size() for p in self.model.parameters())
        room = torch.cuda.mem_get_info()[0] // 2 if device == "cuda" else _KEEP_BYTES
        self.keep = total <= room
        for path, module in self.model.named_modules():
            if any(p is not None for p in module._parameters.values()):
                module.register_forward_pre_hook(self._fill(path))
                if not self.keep:
                    module.register_forward_hook(lambda module, _args, _out: empty_parameters(module, False))

    def _fill(self, path: str) -> Callable[..., None]:
        return lambda module, _: fill_parameters(module, path, self.load, self.device, False)

    def logits(self, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[np.ndarray]:
        """float32 logits of each sequence from position `firsts[i]` on, [length - first, vocabulary] each.

        Sequences of similar length share a batch, padded on the right; padding comes after what is read, so causality
        hides it.
        """
        found: list[np.ndarray] = [np.empty(0)] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        group: list[int] = []
        for i in [*order, None]:
            if group and (i is None or len(sequences[i]) > _SIMILAR * len(sequences[group[0]])):
                for j, logits in zip(group, self._batch([sequences[j] for j in group], [firsts[j] for j in group])):
                    found[j] = logits
                group = []
            if i is not None:
                group.append(i)
        return found

    @torch.no_grad()
    def _batch(self, sequences: list[Sequence[int]], firsts: list[int]) -> list[np.ndarray]:
        longest = max(map(len, sequences))
        tokens = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(sequences), -1)
        first = min(firsts)
        # logits_to_keep spares the logits before the first one wanted: they are most of the memory.
        out = self.model(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=longest - first
        ).logits
        wide = out.float().cpu().numpy()
        return [wide[i, f - first : len(s) - first].copy() for i, (s, f) in enumerate(zip(sequences, firsts))]
