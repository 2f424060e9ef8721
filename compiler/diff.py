"""`ingot diff A B`: what two artifacts differ in, from what their manifests and weights say; nothing is run.

Weights are compared tensor by tensor through safetensors' headers: shape, dtype and a digest of the bytes. Speed is not
in an artifact; `ingot compare` measures it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import strict
from ..artifacts.files import open_plain, os_errors
from ..artifacts.manifest import Manifest
from ..artifacts.store import OpenArtifact, open_artifact
from .accuracy_facts import headline, numbers
from .console import print_table

_MAX_HEADER = 25 << 20
_ABSENT = "-"
_SHOWN = 40  # rows of a section


@dataclass(frozen=True)
class Change:
    """One difference: where, and what stands there in the first and in the second artifact."""

    where: str
    first: Any
    second: Any


@dataclass
class Difference:
    """All differences by section, in the order of SECTIONS; `same` counts the tensors that are alike."""

    digests: tuple[str, str]
    sections: dict[str, list[Change]] = field(default_factory=dict)
    same: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        sections = {name: [asdict(change) for change in changes] for name, changes in self.sections.items()}
        return {"equal": self.equal, "digests": list(self.digests), "tensors_alike": self.same, "sections": sections}

    @property
    def equal(self) -> bool:
        """Whether the artifacts are one and the same."""
        return self.digests[0] == self.digests[1]


def diff(first: Path, second: Path, weights: bool = True) -> Difference:
    """What differs between two artifacts; their entries and sizes are checked, their code is not touched.

    Args:
        weights: read the weights, to compare them tensor by tensor; else only their files' digests say something.

    Raises:
        UsageError, VerificationError, ResourceError: as `open_artifact`, or a weights file is no safetensors.
    """
    a, b = open_artifact(first, "sizes"), open_artifact(second, "sizes")
    one, two = a.manifest, b.manifest
    result = Difference((one.digest(), two.digest()))
    if result.equal:
        return result
    sides = {
        "recipe": (one.recipe, two.recipe),
        "toolchain": (one.toolchain, two.toolchain),
        "model and target": (_model(one), _model(two)),
        "engines": (_engines(one), _engines(two)),
        "passes": (_passes(one), _passes(two)),
        "accuracy": (_accuracy(one), _accuracy(two)),
        "size": (_sizes(one), _sizes(two)),
    }  # fmt: skip
    result.sections = {name: list(_changes(x, y)) for name, (x, y) in sides.items()}
    if weights:
        before, after = (_tensors(artifact) for artifact in (a, b))
        result.sections["weights"] = list(_changes(before, after))
        result.same = sum(before[name] == after.get(name) for name in before)
    else:
        result.sections["weights"] = list(_changes(_weight_files(one), _weight_files(two)))
    return result


def _model(manifest: Manifest) -> dict[str, Any]:
    cache = manifest.kv_cache
    return {
        **asdict(manifest.model),
        **{f"target.{name}": value for name, value in asdict(manifest.target).items()},
        "kv_cache": f"{cache.num_blocks} blocks of {cache.block_size}, {cache.dtype}, {len(cache.layers)} layers",
    }


def _engines(manifest: Manifest) -> dict[str, Any]:
    sizes = {entry.path: entry for entry in manifest.files}
    return {
        engine.name: {
            "shape": f"{engine.kind}, {engine.batch} x {engine.length}",
            "code": sizes[engine.file].sha256[:16],
            "bytes": sizes[engine.file].size,
            "memory_bytes": engine.memory_bytes,
        }
        for engine in manifest.engines
    }


def _passes(manifest: Manifest) -> dict[str, Any]:
    """Sites changed and near misses per engine and pass."""
    found: dict[str, Any] = {}
    for record in manifest.passes:
        missed = record.get("missed")
        count = len(missed) if isinstance(missed, list) else missed
        found[f"{record.get('engine', '?')} {record.get('name', '?')}"] = {
            "changed": record.get("changed"), "missed": count,
        }  # fmt: skip
    return found


def _accuracy(manifest: Manifest) -> dict[str, Any]:
    engines = manifest.gate.get("engines")
    measured = engines.items() if isinstance(engines, dict) else ()
    return {**headline(manifest.gate), **{name: numbers(value) for name, value in measured}}


def _sizes(manifest: Manifest) -> dict[str, Any]:
    sizes = {entry.path: entry.size for entry in manifest.files}
    weights = sum(sizes[path] for path in manifest.weights)
    return {"files": len(sizes), "total_bytes": sum(sizes.values()), "weights_bytes": weights}


def _weight_files(manifest: Manifest) -> dict[str, Any]:
    digests = {entry.path: entry.sha256[:16] for entry in manifest.files}
    return {path: digests[path] for path in manifest.weights}


def _tensors(artifact: OpenArtifact) -> dict[str, Any]:
    """Name to dtype, shape and digest of every tensor but the padding."""
    found: dict[str, Any] = {}
    for relative in artifact.manifest.weights:
        path = artifact.path(relative)
        with open_plain(path) as descriptor, os_errors(f"cannot read {path}"):
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if length > _MAX_HEADER:
                strict.refuse(str(path), "the header", f"it would be {length} bytes long")
            header = strict.read_json(os.pread(descriptor, length, 8), str(path))
            if not isinstance(header, dict):
                strict.refuse(str(path), "the header", "it is no object")
            for name, entry in header.items():
                if name == "__metadata__" or name.startswith("ingot_padding_"):
                    continue
                offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
                if not isinstance(offsets, list) or [type(x) for x in offsets] != [int, int]:
                    strict.refuse(str(path), name, "it has no offsets")
                shape = "x".join(map(str, entry.get("shape", ()))) or "scalar"
                digest = _digest(descriptor, 8 + length + offsets[0], 8 + length + offsets[1])
                found[name] = f"{entry.get('dtype')} {shape} {digest}"
    return found


def _digest(descriptor: int, start: int, end: int) -> str:
    digest = hashlib.sha256()
    while start < end and (piece := os.pread(descriptor, min(1 << 20, end - start), start)):
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()[:16]


def _changes(first: Any, second: Any, where: str = "") -> Iterator[Change]:
    """The leaves that differ, by their dotted path."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in [*first, *(key for key in second if key not in first)]:
            path = f"{where}.{key}" if where else str(key)
            yield from _changes(first.get(key, _ABSENT), second.get(key, _ABSENT), path)
    elif first != second:
        yield Change(where, first, second)


def print_diff(args: argparse.Namespace) -> int:
    """The command: one table per section that differs, or one JSON value; differences are no error."""
    first, second = args.artifacts
    result = diff(first, second, weights=not args.no_weights)
    if args.json:
        print(json.dumps(result.to_dict()))
        return 0
    if result.equal:
        print(f"the same artifact: sha256:{result.digests[0]}")
        return 0
    for name, changes in result.sections.items():
        if changes:
            rows = [(change.where, _cell(change.first), _cell(change.second)) for change in changes[:_SHOWN]]
            more = f", {len(changes) - _SHOWN} more in --json" if len(changes) > _SHOWN else ""
            print_table(f"{name}: {len(changes)} differ{more}", ("", str(first), str(second)), rows)
    alike = [name for name, changes in result.sections.items() if not changes]
    print(f"alike: {', '.join(alike) or 'nothing'}; {result.same} tensors are the same")
    print(f"speed is not in an artifact; measure it: ingot compare {first} {second}")
    return 0


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
