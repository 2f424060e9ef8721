"""Eager Hugging Face walked layer by layer with many sequences at once: each layer's weights are read once per walk.

One forward of the whole model over all sequences, in which each part that has parameters (an embedding, a decoder
layer, a norm, the head) is handed to a visitor. So at most one part's weights are in memory, and what lies between
parts is the model's own code, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        count: sequences of the walk.
        run: its forward with the parameters as they are, over all sequences in portions, or over some:
            `run(consume, start, stop, whole)`. Each portion's output goes to `consume`; without it the output of all
            sequences comes back, `whole` with those from start to stop put in.
    """

    path: str
    module: nn.Module
    names: tuple[str, ...]
    count: int
    run: Callable[..., Any]

    def parameter(self, name: str) -> Tensor:
        """One of its parameters, by the model's name for it."""
        return self.module.get_parameter(name.removeprefix(f"{self.path}."))

    def repeat(self, whole: Any, rows: int, at: int) -> None:
        """Give the sequences from `at` on the output of the first `rows`."""
        if isinstance(whole, Tensor) and whole.dim() and whole.shape[0] % self.count == 0:
            each = whole.shape[0] // self.count
            whole[at * each : (at + rows) * each] = whole[: rows * each]
        elif isinstance(whole, tuple | list):
            for item in whole:
                self.repeat(item, rows, at)


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
        self._last_output: Tensor | None = None
        self._blank: dict[str, Any] = {}

    def parts_of(self, weights: Iterable[str]) -> set[str]:
        """Paths of the parts that hold these parameters."""
        wanted = set(weights)
        return {
            path
            for path, part in self.parts.items()
            if any(f"{path}.{name}" in wanted for name, _ in part.named_parameters())
        }

    @torch.no_grad()
    def walk(self, tokens: Tensor, visit: Visit, last: str | None = None) -> None:
        """One forward over tokens [sequences, length]; `visit` gives each part's output in its order.

        Args:
            last: path of the part after which nothing is needed any more.
        """
        count, length = tokens.shape
        portion = max(1, _TOKENS_AT_ONCE // length)
        self._blank.clear()
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

    def finish(self, out: Tensor) -> Tensor:
        """Logits of some sequences from the head's output for them: what the model does behind its last part.

        For a visitor at that part: some models scale logits or bend them softly.
        """
        self._last_output = out
        try:
            tokens = torch.zeros(out.shape[:2], dtype=torch.int64, device=self.device)
            positions = torch.arange(out.shape[1], device=self.device)[None]
            logits: Tensor = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        finally:
            self._last_output = None
        return logits

    def _hand_over(
        self, path: str, module: nn.Module, count: int, portion: int, visit: Visit, last: str | None
    ) -> None:
        """Let `visit` stand in for the module's forward."""
        forward = module.forward
        names = tuple(f"{path}.{name}" for name, _ in module.named_parameters())

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            def run(
                consume: Callable[[int, Any], None] | None = None, first: int = 0, end: int = count, whole: Any = None
            ) -> Any:
                for start in range(first, end, portion):
                    stop = min(start + portion, end)
                    some_args, some_kwargs = _rows((args, kwargs), count, start, stop)
                    out = forward(*some_args, **some_kwargs)
                    self._blank.setdefault(path, _row_of(out))
                    if consume is not None:
                        consume(start, out)
                    else:
                        whole = _put(whole, out, start, stop - start, count)
                return whole

            if self._last_output is not None:
                if path == last:
                    return self._last_output
                return _repeated(self._blank[path], len(self._last_output))
            fill_parameters(module, path, self._load, self.device)
            out = visit(Part(path, module, names, count, run))
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


def _row_of(out: Any) -> Any:
    """The first row of an output, to be repeated by `_repeated`."""
    if isinstance(out, Tensor):
        return out[:1].clone() if out.dim() else out
    return type(out)(map(_row_of, out)) if isinstance(out, tuple | list) else out


def _repeated(row: Any, count: int) -> Any:
    if isinstance(row, Tensor):
        return row.repeat(count, *[1] * (row.dim() - 1)) if row.dim() else row
    return type(row)(_repeated(item, count) for item in row) if isinstance(row, tuple | list) else row
