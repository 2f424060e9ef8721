"""The OCI manifest of an artifact: one layer per file, under ModelPack's media types, and strict reading of others'.

An artifact always gives the same manifest: there is no time in it. What is read may be hostile: sizes, digests, counts
and file names are checked here, before a byte of a layer is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import strict
from ..fingerprint import sha256_files
from ..folder import scan
from ..manifest import FILE_NAME, Manifest, path_complaint

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
SETTING_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
CODE_TYPE = "application/vnd.cncf.model.code.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
PATH_KEY = "org.cncf.model.filepath"
TITLE_KEY = "org.opencontainers.image.title"  # what oras and others name a file by
DIGEST_KEY = "ingot.artifact.digest"

MAX_MANIFEST_BYTES = 4 << 20
MAX_LAYERS = 8192


@dataclasses.dataclass(frozen=True)
class Blob:
    """A piece of content: media type, digest ("sha256:…", plain), size in bytes, and for a layer its path."""

    media_type: str
    digest: str
    size: int
    path: str = ""


@dataclasses.dataclass(frozen=True)
class Image:
    """An artifact as OCI sees it. `content` is the manifest's bytes, whose digest is the image's."""

    content: bytes
    config: Blob
    layers: tuple[Blob, ...]

    @property
    def digest(self) -> str:
        return digest_of(self.content)


def digest_of(content: bytes) -> str:
    """The OCI digest of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def make_image(root: Path, manifest: Manifest) -> tuple[Image, bytes]:
    """The image of an intact artifact in the folder `root`, and the content of its config."""
    paths = sorted(path for path, status in scan(root).items() if not _is_folder(status))
    digests = sha256_files(root / path for path in paths)
    native, weights = manifest.native_code(), set(manifest.weights)
    layers = []
    for path in paths:
        kind = WEIGHT_TYPE if path in weights else CODE_TYPE if path in native else DOC_TYPE
        kind = kind if path.startswith("report/") or kind != DOC_TYPE else SETTING_TYPE
        layers.append(Blob(kind, f"sha256:{digests[root / path]}", (root / path).stat().st_size, path))
    config = _config(manifest, layers)
    blob = Blob(CONFIG_TYPE, digest_of(config), len(config))
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(blob),
        "layers": [_descriptor(layer) for layer in layers],
        "annotations": {DIGEST_KEY: f"sha256:{manifest.digest()}", TITLE_KEY: manifest.name},
    }
    return Image((json.dumps(value, indent=1) + "\n").encode(), blob, tuple(layers)), config


def read_image(content: bytes, source: str) -> Image:
    """Check a manifest that somebody sent; `source` is what messages call it.

    Raises:
        VerificationError: it is no manifest of an artifact, or names files that would leave a folder, twice, or none
            that an artifact must have.
    """
    value = strict.read_json(content, source)
    if not isinstance(value, dict) or value.get("schemaVersion") != 2:
        strict.refuse(source, "schemaVersion", "it is no OCI image manifest")
    if value.get("mediaType", MANIFEST_TYPE) != MANIFEST_TYPE or value.get("artifactType") != ARTIFACT_TYPE:
        strict.refuse(source, "artifactType", f"it is not {ARTIFACT_TYPE}: no artifact was pushed under this name")
    config = _read_blob(value.get("config"), source, "config")
    layers = value.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        strict.refuse(source, "layers", f"expected a list of at most {MAX_LAYERS}")
    found = tuple(_read_layer(layer, source, f"layers[{index}]") for index, layer in enumerate(layers))
    folded = [layer.path.lower() for layer in found]
    if len(set(folded)) != len(folded):
        strict.refuse(source, "layers", "two layers are the same file")
    names = set(folded)
    for index, path in enumerate(folded):
        if any(parent.as_posix() in names for parent in Path(path).parents):
            strict.refuse(source, f"layers[{index}]", f"{strict.quote(path)} lies in a file")
    if FILE_NAME not in names:
        strict.refuse(source, "layers", f"there is no {FILE_NAME} among them")
    return Image(content, config, found)


def _read_layer(value: Any, source: str, where: str) -> Blob:
    blob = _read_blob(value, source, where)
    annotations = value.get("annotations")
    path = annotations.get(PATH_KEY, annotations.get(TITLE_KEY)) if isinstance(annotations, dict) else None
    if not isinstance(path, str):
        strict.refuse(source, where, "the layer has no file name")
    if why := path_complaint(path):
        strict.refuse(source, where, why)
    if not blob.media_type.endswith(".raw"):
        strict.refuse(source, where, f"{strict.quote(blob.media_type)} is an archive; files are pushed as they are")
    return dataclasses.replace(blob, path=path)


def _read_blob(value: Any, source: str, where: str) -> Blob:
    if not isinstance(value, dict):
        strict.refuse(source, where, "expected an object")
    kind, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(kind, str) or len(kind) > 255:
        strict.refuse(source, f"{where}.mediaType", "expected a media type")
    if not isinstance(digest, str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        strict.refuse(source, f"{where}.digest", f"{strict.quote(digest)} is no sha256 digest")
    if type(size) is not int or not 0 <= size <= 1 << 50:
        strict.refuse(source, f"{where}.size", f"{strict.quote(size)} is no size")
    return Blob(kind, digest, size)


def _descriptor(blob: Blob) -> dict[str, Any]:
    names = {"annotations": {PATH_KEY: blob.path, TITLE_KEY: blob.path}} if blob.path else {}
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size, **names}


def _config(manifest: Manifest, layers: list[Blob]) -> bytes:
    """ModelPack's description of a model, without a time."""
    schemes = _schemes(manifest.recipe)
    value = {
        "descriptor": {"name": manifest.name, "family": manifest.model.model_type},
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
        "config": {
            "architecture": "transformer",
            "format": "ingot",
            "paramSize": _short(manifest.model.parameters),
            "precision": manifest.model.dtype,
            **({"quantization": schemes} if schemes else {}),
        },
    }
    return (json.dumps(value, indent=1) + "\n").encode()


def _schemes(value: Any) -> str:
    """The quantization schemes that a recipe names anywhere below `quantization`."""
    found: list[str] = []
    waiting = [value.get("quantization")] if isinstance(value, Mapping) else []
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            found += [item["scheme"]] if isinstance(item.get("scheme"), str) else []
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return ",".join(sorted(set(found) - {"none", ""}))


def _short(count: int) -> str:
    for unit, size in (("t", 10**12), ("b", 10**9), ("m", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _is_folder(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode)
