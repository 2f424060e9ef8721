"""Where finished layers wait for an interrupted build to come back: one safetensors file each, verified when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...artifacts.errors import ResourceError
from ...artifacts.fingerprint import digest_file

_INDEX = "digest"


class LayerStore(Protocol):
    """Tensors by layer and name."""

    def has(self, layer: str) -> bool:
        """Whether a layer is there, whole and undamaged."""
        ...

    def load(self, layer: str, name: str) -> Tensor:
        """One tensor of a layer that is there."""
        ...

    def names(self, layer: str) -> tuple[str, ...]:
        """Names of the tensors of a layer that is there."""
        ...

    def put(self, layer: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a finished layer and what is to be reported of it. Raises ResourceError where that fails."""
        ...

    def facts(self, layer: str) -> dict[str, Any]:
        """What was kept with a layer that is there."""
        ...


class FolderStore:
    """A `LayerStore` in one folder, which belongs to one key: recipe, weights and code.

    A file that is damaged, or half written, is as good as none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sound: dict[str, Any] = {}  # layer -> open file

    def _path(self, layer: str) -> Path:
        return self.folder / f"{hashlib.sha256(layer.encode()).hexdigest()[:32]}.safetensors"

    def has(self, layer: str) -> bool:
        """See `LayerStore`. The digest is checked the first time."""
        from safetensors import SafetensorError, safe_open

        if layer in self._sound:
            return True
        path = self._path(layer)
        try:
            wanted = path.with_suffix(f".{_INDEX}").read_text("ascii").strip()
            if digest_file(path) != wanted:
                return False
            self._sound[layer] = safe_open(path, framework="pt")
        except (OSError, ValueError, SafetensorError):
            return False
        return True

    def load(self, layer: str, name: str) -> Tensor:
        """See `LayerStore`."""
        tensor: Tensor = self._sound[layer].get_tensor(name)
        return tensor

    def names(self, layer: str) -> tuple[str, ...]:
        """See `LayerStore`."""
        return tuple(self._sound[layer].keys())

    def facts(self, layer: str) -> dict[str, Any]:
        """See `LayerStore`."""
        found: dict[str, Any] = json.loads(self._sound[layer].metadata()["facts"])
        return found

    def put(self, layer: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """See `LayerStore`. The digest is written last."""
        from safetensors.torch import save_file

        path = self._path(layer)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                file = Path(scratch) / "layer"
                save_file(
                    {name: t.cpu().contiguous() for name, t in tensors.items()}, file, {"facts": json.dumps(facts)}
                )
                digest = Path(scratch) / "digest"
                digest.write_text(digest_file(file) + "\n", "ascii")
                os.replace(file, path)
                os.replace(digest, path.with_suffix(f".{_INDEX}"))
        except OSError as error:
            raise ResourceError(
                f"cannot keep the quantized layer {layer} in {self.folder}", str(error), "free some disk space"
            ) from error
        self._sound.pop(layer, None)
        if not self.has(layer):
            raise ResourceError(
                f"the quantized layer {layer} cannot be read back", f"{path} is not what was written", "check the disk"
            )

    def remove(self) -> None:
        """Give the space back."""
        self._sound.clear()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)
