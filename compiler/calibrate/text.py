"""Calibration text as tokens: from the recipe's file, or made by the model itself.

A model's own samples need no data and no licence, and are what the model will see most: text like what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifacts.errors import UsageError
from ..console import Progress
from ..reference_model import ReferenceModel

_MOST_BYTES = 64 << 20


def read_samples(path: Path, encode: Callable[[str], list[int]] | None, samples: int, length: int, seed: int) -> Tensor:
    """`samples` pieces of `length` tokens of a text file, int64 [samples, length], drawn evenly and at random.

    Raises:
        UsageError: there is no such file or no tokenizer, it is no text, or too short for one piece each.
    """
    key = "quantization.calibration.file"
    if encode is None:
        raise UsageError(
            f"{key} cannot be read as tokens",
            "the model has no tokenizer.json",
            "leave it out: the model samples itself",
        )
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= _MOST_BYTES else b""
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{key}: {path} cannot be read", str(error), "give a UTF-8 text file") from None
    if size > _MOST_BYTES:
        raise UsageError(
            f"{key}: {path} has {size >> 20} MiB", f"at most {_MOST_BYTES >> 20} are read", "give a part of it"
        )
    tokens = torch.tensor(encode(text), dtype=torch.int64)
    pieces = len(tokens) // length
    if pieces < samples:
        raise UsageError(
            f"{key}: {path} is too short for calibration",
            f"its {len(tokens)} tokens are {pieces} samples of {length}, and {samples} are asked for",
            "give a longer text, or lower quantization.calibration.samples or .length",
        )
    chosen = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return tokens[: pieces * length].view(pieces, length)[chosen]


@torch.no_grad()
def own_samples(
    model: ReferenceModel, config: dict[str, Any], samples: int, length: int, seed: int, progress: Progress
) -> Tensor:
    """What the model writes at temperature 1 after its first token, int64 [samples, length].

    Where a text ends, another begins. A model that does not fit into memory is read once for every token, as the gate's
    reference is.
    """
    first, ends = _boundaries(config)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((samples, length), first, dtype=torch.int64)
    cache: Any = None
    for i in range(length - 1):
        out = model.model(
            input_ids=tokens[:, i : i + 1].to(model.device), past_key_values=cache, use_cache=True,
            position_ids=torch.full((1, 1), i, device=model.device),
        )  # fmt: skip
        cache = out.past_key_values
        likely = torch.softmax(out.logits[:, -1].float(), -1).cpu()
        drawn = torch.multinomial(likely, 1, generator=generator)[:, 0]
        over = torch.isin(tokens[:, i], ends) if len(ends) else torch.zeros(samples, dtype=torch.bool)
        tokens[:, i + 1] = torch.where(over, first, drawn)
        if i % 16 == 15:
            progress.update(f"{i + 1} of {length} tokens", advance=16)
    return tokens


def _boundaries(config: dict[str, Any]) -> tuple[int, Tensor]:
    """The token that begins a text, and those that end one."""
    end = config.get("eos_token_id")
    ends = [t for t in (end if isinstance(end, list) else [end]) if isinstance(t, int)]
    begin = config.get("bos_token_id")
    first = begin if isinstance(begin, int) else (ends or [0])[0]
    return first, torch.tensor([t for t in ends if t != first], dtype=torch.int64)
