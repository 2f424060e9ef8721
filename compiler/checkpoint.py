"""Weights by name, whatever holds them: safetensors files, mapped and streamed, or random numbers.

The build asks for one tensor at a time and never holds them all. Files are checked before they are mapped; pickles are
refused. Which names a model expects, and which may be missing because they are tied, is the caller's business.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from ..artifacts.errors import ResourceError, UnsupportedModelError, UsageError
from ..artifacts.fingerprint import digest_files
from .random_weights import RandomCheckpoint
from .safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_header
from .strict_json import model_file, read_json

__all__ = ["Checkpoint", "RandomCheckpoint", "SafetensorsCheckpoint", "TensorInfo", "check_against"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


class Checkpoint(Protocol):
    """Named tensors that are loaded one by one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, by name."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU; not to be written to. Raises UsageError for NaN or infinity."""
        ...

    def digest(self) -> str:
        """Hex digest of everything the tensors depend on; may read all of it."""
        ...


class SafetensorsCheckpoint:
    """The weights in a model folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        UsageError: a file is missing, broken, listed twice or lies outside the folder.
        UnsupportedModelError: there are only weights in formats that can run code, or in none known here.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}  # file name -> resolved path
        self._where: dict[str, str] = {}  # tensor -> file name
        self.tensors: dict[str, TensorInfo] = {}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._checked: set[str] = set()
        index = self._read_index()
        for name in sorted(set(index.values())) if index is not None else [_SINGLE]:
            path = model_file(self.folder, name)
            if path is None:
                raise self._bad(f"the shard {name} is missing", "the index lists it", "fetch the missing file")
            self._files[name] = path
            for tensor, info in read_header(path).items():
                if tensor in self.tensors:
                    raise self._bad(f"{tensor} is stored twice", f"in {self._where[tensor]} and in {name}")
                if index is not None and index.get(tensor) != name:
                    raise self._bad(f"{name} holds {tensor}", f"the index says {index.get(tensor, 'nothing of it')}")
                self.tensors[tensor], self._where[tensor] = info, name
        for tensor in index or ():
            if tensor not in self.tensors:
                raise self._bad(f"{tensor} is missing", f"the index says it is in {(index or {})[tensor]}")

    def load(self, name: str) -> torch.Tensor:
        """The tensor `name` in its stored dtype, a view of the mapped file where alignment allows.

        Raises:
            UsageError: there is no such tensor, or it holds NaN or infinity.
            ResourceError: the file cannot be mapped any more.
        """
        if name not in self._where:
            raise self._bad(f"there is no tensor {name!r}", _near(name, self._where))
        from safetensors import SafetensorError, safe_open

        file = self._where[name]
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(self._files[file], framework="pt"))
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ResourceError(
                f"{self.folder / file}: {name} cannot be read", str(error), "check that nothing changes the file"
            ) from error
        info = self.tensors[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise self._bad(f"{file} changed while it was read", f"{name} is no longer what its header said")
        if name not in self._checked:
            if not is_finite(tensor):
                raise self._bad(
                    f"{name} holds NaN or infinity", f"{file} is damaged, or its training diverged", "use other weights"
                )
            self._checked.add(name)
        return tensor

    def digest(self) -> str:
        """Hex sha256 over the chunked digests of the weight files, in order of their names. Reads them all."""
        digests = digest_files(self._files.values())
        lines = "".join(f"{name} {digests[path]}\n" for name, path in sorted(self._files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def close(self) -> None:
        """Give the mappings back; tensors loaded before stay valid."""
        self._open.clear()
        self._stack.close()

    def _read_index(self) -> dict[str, str] | None:
        """tensor -> shard, from the index; None if the weights are one file."""
        if not self.folder.is_dir():
            raise UsageError(f"{self.folder}: no such folder", "it should hold the model", "give an existing folder")
        single, path = model_file(self.folder, _SINGLE), model_file(self.folder, _INDEX)
        if single is not None and path is not None:
            raise self._bad(f"both {_SINGLE} and {_INDEX} are there", "they may disagree", "remove the one not meant")
        if single is None and path is None:
            raise self._no_weights()
        shards = {item.name for item in self.folder.glob("model-*-of-*.safetensors")}
        index: Any = None
        if path is not None:
            index = read_json(path, MAX_HEADER_BYTES).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise self._bad(f"{_INDEX} has no weight_map", "it should map tensors to shards")
            for file in index.values():
                if not isinstance(file, str) or not _SHARD.fullmatch(file):
                    raise self._bad(f"{_INDEX} names {ascii(file)[:80]}", "a shard is a *.safetensors file beside it")
        if extra := shards - set(index.values() if index else ()):
            raise self._bad(f"the shard {min(extra)} belongs to nothing", "no index lists it", "remove it")
        return index

    def _no_weights(self) -> UsageError | UnsupportedModelError:
        pickles = sorted(item.name for pattern in _PICKLES for item in self.folder.glob(pattern))
        if pickles:
            return UnsupportedModelError(
                f"{self.folder}: no safetensors weights, only {pickles[0]}",
                "only safetensors are read: pickled files can run any code when they are opened",
                "take the model's safetensors revision, or convert it: model.save_pretrained(folder) in transformers",
            )
        what = f"neither {_SINGLE} nor {_INDEX} is there"
        return self._bad(what, "these two names hold a model's weights", "give the folder with config.json and weights")

    def _bad(self, what: str, why: str, fix: str = "fetch the model again") -> UsageError:
        return UsageError(f"{self.folder}: {what}", why, fix)


def check_against(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
    ignore: Collection[str] = (),
) -> None:
    """Compare a checkpoint's names and shapes with the model's.

    Args:
        checkpoint: the stored tensors.
        expected: shape by name, from the model.
        optional: names that may be missing (tied to another, or computed).
        ignore: stored names that the model may leave unread.

    Raises:
        UsageError: lists the missing, unexpected and mis-shaped tensors.
    """
    stored, lines = checkpoint.tensors, []
    missing = [name for name in expected if name not in stored and name not in optional]
    extra = [name for name in stored if name not in expected and name not in ignore]
    lines += [f"{name} is missing" + (f" ({_near(name, extra)})" if extra else "") for name in missing[:5]]
    lines += [f"{name} is not part of the model" for name in extra[:5]]
    wrong = [name for name, info in stored.items() if name in expected and info.shape != tuple(expected[name])]
    lines += [f"{name} is {list(stored[name].shape)}, the config says {list(expected[name])}" for name in wrong[:5]]
    # Integers and 8-bit floats would be taken for numbers of the same value; they are codes of somebody's quantization.
    codes = [n for n, i in stored.items() if n in expected and not (i.dtype.is_floating_point and i.dtype.itemsize > 1)]
    lines += [f"{name} holds {stored[name].dtype}, a model's weights are wider floats" for name in codes[:5]]
    if lines:
        count = len(missing) + len(extra) + len(wrong) + len(codes)
        raise UsageError(
            f"the weights do not fit the config: {count} of {len(expected)} tensors differ",
            "; ".join(lines) + ("; …" if count > len(lines) else ""),
            "check that config.json and the weights belong to the same model",
        )


def is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8 has no reductions
        return all(bool(part.float().isfinite().all()) for part in tensor.flatten().split(1 << 20))
    low, high = tensor.aminmax()  # one pass without a copy; NaN comes out as NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _near(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(names)[:2000], 1, 0.6)
    return f"the nearest is {near[0]}" if near else "no name is near it"
