"""Which stored tensor is which parameter of the model.

Usually the names are the same, a tied head aside, and tensors are streamed from the files. Where transformers stores a
model in another form than it runs it (experts one by one, renamed prefixes), transformers itself loads it: its own
conversion is the only right one, at the price of one copy of the weights in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifacts.errors import UnsupportedModelError, UsageError
from .checkpoint import Checkpoint, RandomCheckpoint, SafetensorsCheckpoint, TensorInfo, check_against, is_finite
from .foreign.layer import RAW
from .foreign.weights import ForeignWeights
from .load_model import DTYPES


def expected_tensors(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of all parameters by name, and for each further name of a shared parameter the first one."""
    shapes: dict[str, tuple[int, ...]] = {}
    alias: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(param), name)
        if known != name:
            alias[name] = known
        shapes[name] = tuple(param.shape)
    return shapes, alias


class ModelWeights:
    """The model's parameters by the names the trace uses."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], foreign: ForeignWeights | None = None) -> None:
        self._checkpoint = checkpoint
        self._names = dict(names)
        self._foreign = foreign

    def load(self, name: str) -> torch.Tensor:
        """A parameter in its stored dtype, not to be written to; one that is stored quantized is made dense.

        After `foreign.layer.RAW` stands the name of a tensor, which is given as it is stored.
        """
        if name.startswith(RAW):
            return self._checkpoint.load(name.removeprefix(RAW))
        if self._foreign is not None and name in self._foreign:
            return self._foreign.dense(name)
        return self._checkpoint.load(self._names.get(name, name))

    def digest(self) -> str:
        """Digest of the checkpoint."""
        return self._checkpoint.digest()


class _Loaded:
    """Parameters that transformers loaded and converted."""

    def __init__(self, state: dict[str, torch.Tensor], digest: str) -> None:
        self._state, self._digest = state, digest
        self.tensors: dict[str, TensorInfo] = {}

    def load(self, name: str) -> torch.Tensor:
        value = self._state[name]
        if not is_finite(value):
            raise UsageError(
                f"{name} holds NaN or infinity",
                "the weights are damaged, or their training diverged",
                "use other weights",
            )
        return value

    def digest(self) -> str:
        return self._digest


def _load_by_transformers(folder: Path, dtype: str, digest: str) -> _Loaded | None:
    """The weights in the form transformers runs them, or None when even transformers misses some."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], output_loading_info=True, use_safetensors=True, trust_remote_code=False,
        local_files_only=True,
    )  # fmt: skip
    model, info = loaded
    if any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    return _Loaded(model.state_dict(), digest)


def open_weights(
    model: nn.Module, folder: Path | None, dtype: str, seed: int, foreign: ForeignWeights | None = None
) -> ModelWeights:
    """The weights of `model`: from the folder, or random ones when there is none.

    Args:
        foreign: those that the folder holds quantized.

    Raises:
        UsageError: names or shapes do not fit, files are broken.
        UnsupportedModelError: there are no safetensors.
    """
    shapes, alias = expected_tensors(model)
    if folder is None:
        unique = {name: shape for name, shape in shapes.items() if name not in alias}
        return ModelWeights(RandomCheckpoint(unique, DTYPES[dtype], seed), alias)
    checkpoint = foreign.checkpoint if foreign else SafetensorsCheckpoint(folder)
    shapes = {name: shape for name, shape in shapes.items() if foreign is None or name not in foreign}
    names = _names(checkpoint.tensors, shapes, alias)
    if names is None and foreign is None:
        loaded = _load_by_transformers(folder, dtype, checkpoint.digest())
        if loaded is not None:
            return ModelWeights(loaded, {})
        buffers = {name for name, _ in model.named_buffers()}
        check_against(checkpoint, shapes, optional=alias, ignore=buffers)
        raise UnsupportedModelError(
            f"the weights in {folder} do not fit the config",
            "some have no counterpart",
            "check that both belong to the same model",
        )
    renamed = {name: (names or {}).get(name, name) for name in shapes}
    wanted = {stored: shapes[name] for name, stored in renamed.items()}
    known = {*shapes, *alias, *(name for name, _ in model.named_buffers())}
    known |= {name.split(".", 1)[1] for name in known if "." in name}
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    spare = {n for n in checkpoint.tensors if n in known or any(re.search(p, n) for p in patterns)}
    spare |= foreign.names if foreign else set()
    check_against(checkpoint, wanted, ignore=spare - set(wanted))
    return ModelWeights(checkpoint, renamed, foreign)


def _names(stored: Mapping[str, Any], shapes: Mapping[str, Any], alias: Mapping[str, str]) -> dict[str, str] | None:
    """Stored name of every parameter: the plain one, its tied twin's, or one without the base prefix.

    None if a parameter has none.
    """
    twins = {**alias, **{first: name for name, first in alias.items()}}
    found = {}
    for name in shapes:
        candidates = [name, twins.get(name, name)]
        candidates += [c.split(".", 1)[1] for c in candidates if "." in c]
        hit = next((c for c in candidates if c in stored), None)
        if hit is None:
            return None
        found[name] = hit
    return found
