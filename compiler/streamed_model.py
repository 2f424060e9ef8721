"""Eager Hugging Face walked layer by layer with many sequences at once: each layer's weights are read once per walk.

One forward of the whole model over all sequences, in which each part that has parameters (an embedding, a decoder
layer, a norm, the head) is handed to a visitor. So at most one part's weights are in memory, and what lies between
parts is the model's own code, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .load_model import DTYPES, make_model
from .reference_model import empty_parameters, fill_parameters

_TOKENS_AT_ONCE = 2048


class _Enough(Exception):
    """Raised through the model's forward when the visitor needs no more of it."""


@dataclass(frozen=True, eq=False)
class Part:
    """A module with parameters whose turn it is.

    Attributes:
        path: its name in the model; names: of its parameters, in the model's words.
        run: its forward with the parameters as they are, over all sequences in portions. Each portion's output goes to
            the function given, the whole output comes back unless a function is given.
    """

    path: str
    module: nn.Module
    names: tuple[str, ...]
    run: Callable[..., Any]


Visit = Callable[[Part], Any]


class StreamedModel:
    """transformers' eager model for one config, without weights.

    Args:
        config: config.json's content; dtype: "float32", "bfloat16" or "float16".
        load: gives a parameter by its name in the module; device: where it runs, "cpu" or "cuda".
    """

    def __init__(self, config: dict[str, Any], dtype: str, load: Callable[[str], Tensor], device: str = "cpu") -> None:
        self.model = make_model(config, dtype, attn="eager")
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self._load = load
        for module in self.model.modules():
            for name, held in module._buffers.items():
                if held is not None:
                    module._buffers[name] = held.to(self.device)
        self.parts = _parts(self.model)

    def owners(self, weight: str) -> list[str]:
        """Paths of the modules that hold a parameter, by any of its names; it may be tied."""
        wanted = dict(self.model.named_parameters(remove_duplicate=False))[weight]
        return [
            path for path, module in self.model.named_modules() if any(p is wanted for p in module._parameters.values())
        ]

    @torch.no_grad()
    def walk(self, tokens: Tensor, visit: Visit, last: str | None = None) -> None:
        """One forward over tokens [sequences, length]; `visit` gives each part's output in its order.

        Args:
            last: path of the part after which nothing is needed any more.
        """
        count, length = tokens.shape
        portion = max(1, _TOKENS_AT_ONCE // length)
        for path, module in self.parts.items():
            self._hand_over(path, module, count, portion, visit, last)
        try:
            positions = torch.arange(length, device=self.device)[None]
            self.model(input_ids=tokens.to(self.device), position_ids=positions, use_cache=False)
        except _Enough:
            pass
        finally:
            for module in self.parts.values():
                del module.forward  # the instance's; the class's own is behind it
                empty_parameters(module)

    def _hand_over(
        self, path: str, module: nn.Module, count: int, portion: int, visit: Visit, last: str | None
    ) -> None:
        """Let `visit` stand in for the module's forward."""
        forward = module.forward
        names = tuple(f"{path}.{name}" for name, _ in module.named_parameters())

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            def run(consume: Callable[[int, Any], None] | None = None) -> Any:
                whole: Any = None
                for start in range(0, count, portion):
                    stop = min(start + portion, count)
                    some_args, some_kwargs = _rows((args, kwargs), count, start, stop)
                    out = forward(*some_args, **some_kwargs)
                    if consume is not None:
                        consume(start, out)
                    else:
                        whole = _put(whole, out, start, stop - start, count)
                return whole

            fill_parameters(module, path, self._load, self.device)
            out = visit(Part(path, module, names, run))
            empty_parameters(module)
            if path == last:
                raise _Enough
            return out

        module.forward = stand_in


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Decoder layers, whole, and every other module that has parameters of its own, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{known}.") for known in found)
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        repeated = isinstance(parent, nn.ModuleList) and any(True for _ in module.parameters())
        if not inside and (repeated or any(p is not None for p in module._parameters.values())):
            found[path] = module
    return found


def _rows(value: Any, count: int, start: int, stop: int) -> Any:
    """Rows start:stop of every tensor with one row per sequence, in whatever holds them."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() > 1 and value.shape[0] == count else value
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, count, start, stop) for item in value)
    if isinstance(value, dict):
        return {key: _rows(item, count, start, stop) for key, item in value.items()}
    return value


def _put(whole: Any, out: Any, start: int, rows: int, count: int) -> Any:
    """A portion's output put in its place in the whole, which is made for the first one."""
    if isinstance(out, Tensor):
        if not out.dim() or out.shape[0] % rows:
            return out
        each = out.shape[0] // rows  # 1, or the tokens of a sequence where they are laid out flat
        if whole is None:
            whole = torch.empty(count * each, *out.shape[1:], dtype=out.dtype, device=out.device)
        whole[start * each : (start + rows) * each] = out
        return whole
    if isinstance(out, tuple | list):
        return type(out)(
            _put(None if whole is None else whole[i], item, start, rows, count) for i, item in enumerate(out)
        )
    return out


def sequences_tensor(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of one length each as int64 [sequences, length]."""
    return torch.tensor([list(sequence) for sequence in sequences], dtype=torch.int64)
