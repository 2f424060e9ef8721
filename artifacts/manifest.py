"""The manifest: what an artifact is, as frozen dataclasses and as canonical JSON (schema version 2).

The compiler fills it, the store adds the list of files, the runtime reads it before anything else. Parsing is total
and strict: whatever the bytes are, the result is a `Manifest` that is consistent in itself or one VerificationError
that names the field. docs/artifact-format.md describes the fields in words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from . import strict
from .errors import VerificationError
from .files import read_small
from .strict import AtMost, Matches, OneOf, Range

SCHEMA_VERSION = 2
FILE_NAME = "manifest.json"
# Beside the manifest, not in it: times and host names would make equal builds differ, the bill of materials says what
# was installed there, the page shows all of that, and a signature covers the manifest itself.
SIGNATURE = "model.sig"
PROVENANCE = "report/provenance.json"
SBOM = "report/sbom.cdx.json"
PAGE = "report/report.html"
UNLISTED = (PROVENANCE, SBOM, PAGE, "report/build.log", SIGNATURE)

ENGINE_KINDS = ("aoti", "plan")
# In the words of numpy and safetensors.
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int32", "int8", "uint8", "bool")

Name = Annotated[str, Matches(r"[A-Za-z0-9_][A-Za-z0-9._-]*", "a name of letters, digits, '.', '_' and '-'", 128)]
Text = Annotated[str, Matches(r"[^\x00-\x1f\x7f]*", "one line of text", 1024)]
# All paths are written by Ingot, so the alphabet can be small: no absolute path, '..', backslash, NUL, drive letter,
# hidden file or Unicode look-alike passes.
_PATH = Matches(
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,7}",
    "a relative path of letters, digits, '.', '_', '-' and '/' inside the artifact",
)
RelativePath = Annotated[str, _PATH]
Sha256 = Annotated[str, Matches(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
DType = Annotated[str, OneOf(DTYPES)]
Size = Annotated[int, Range(0, 1 << 50)]
Count = Annotated[int, Range(1, 1 << 31)]
SmallCount = Annotated[int, Range(1, 1 << 20)]
Shape = Annotated[tuple[Annotated[int, Range(0, 1 << 40)], ...], AtMost(8)]


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: its path inside, its size in bytes, its chunked digest (see fingerprint.py)."""

    path: RelativePath
    size: Size
    sha256: Sha256


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An input or output of an engine."""

    name: Name
    shape: Shape
    dtype: DType


@dataclasses.dataclass(frozen=True)
class Constant:
    """Binds an engine's internal constant `symbol` to the tensor `weight` of the weights files."""

    symbol: Text
    weight: Text


@dataclasses.dataclass(frozen=True)
class EngineEntry:
    """One compiled graph for one fixed shape: `batch` rows of `length` tokens.

    `kind` "aoti": `file` is a shared object, `libraries` are those to load before it. `kind` "plan": `file` is a kernel
    plan (kernel_plan.py), `libraries` its cubins, and a constant's symbol is its weight's name. Outputs hold at least
    next_tokens [batch] int64 and logits [batch, vocabulary] float32. `memory_bytes` is what the engine takes on a
    device besides weights and cache: arena, inputs and outputs (0 where all of it is the host's).
    """

    name: Name
    kind: Annotated[str, OneOf(ENGINE_KINDS)]
    phase: Annotated[str, OneOf(("decode", "prefill"))]
    batch: SmallCount
    length: SmallCount
    file: RelativePath
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    constants: tuple[Constant, ...]
    libraries: tuple[RelativePath, ...]
    memory_bytes: Size


@dataclasses.dataclass(frozen=True)
class CacheLayer:
    """One layer's cache: (heads, head_dim) of keys and of values, and its sliding window in tokens (0: full)."""

    key: tuple[SmallCount, SmallCount]
    value: tuple[SmallCount, SmallCount]
    window: Annotated[int, Range(0, 1 << 31)]


@dataclasses.dataclass(frozen=True)
class KVCache:
    """The paged KV cache: `num_blocks` blocks of `block_size` tokens, 0 the null one; tables are `max_blocks` wide."""

    block_size: SmallCount
    num_blocks: Count
    max_blocks: Count
    dtype: DType
    layers: tuple[CacheLayer, ...]

    @property
    def scaled(self) -> bool:
        """Whether each token and head has a float32 scale, for keys and for values: a cache of 8 bits does."""
        return self.dtype in ("int8", "float8_e4m3fn")

    def token_bytes(self, layer: CacheLayer) -> int:
        """What a token's keys and values take in one layer, scales included."""
        width, scale = {"float32": 4, "bfloat16": 2, "float16": 2}.get(self.dtype, 1), 4 if self.scaled else 0
        return sum(heads * (width * dim + scale) for heads, dim in (layer.key, layer.value))


@dataclasses.dataclass(frozen=True)
class Model:
    """What was compiled. `max_length` in tokens; `parameters` counts the elements of all weights."""

    architecture: Text
    model_type: Text
    vocab_size: Count
    max_length: Count
    dtype: DType
    hidden_size: SmallCount
    num_layers: SmallCount
    parameters: Size


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the engines run: device, system and machine in `platform`'s words (lower case), and what they need there.

    `isa` holds CPU flags for the device "cpu"; for "cuda" the compute capabilities that there is code for ("sm_90").

    `host_library` is "libtorch" for engines linked against torch's libraries, whose version is then `torch`.
    """

    device: Name
    system: Name
    machine: Name
    isa: Annotated[tuple[Name, ...], AtMost(64)]
    host_library: Annotated[str, OneOf(("none", "libtorch"))]
    torch: Text


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything an artifact says of itself.

    `toolchain` maps a tool to its version, `recipe` is the recipe as built, `weights` the paths of the safetensors
    files, `passes` and `gate` are the reports. `files` lists every file but the manifest and `UNLISTED`.
    """

    schema_version: int
    name: Text
    ingot_version: Text
    model: Model
    target: Target
    toolchain: dict[str, Text]
    recipe: dict[str, Any]
    kv_cache: KVCache
    engines: Annotated[tuple[EngineEntry, ...], AtMost(4096)]
    weights: tuple[RelativePath, ...]
    passes: list[dict[str, Any]]
    gate: dict[str, Any]
    files: tuple[FileEntry, ...]

    @classmethod
    def from_json(cls, text: str | bytes, source: str = FILE_NAME) -> Manifest:
        """Parse and check a manifest; `source` is its name in messages.

        Raises:
            VerificationError: anything at all is wrong; a newer schema is refused before any other field is read.
        """
        value = strict.read_json(text, source)
        if type(value) is not dict:
            strict.refuse(source, "", "expected a JSON object")
        _check_schema_version(value, source)
        manifest: Manifest = strict.build(cls, value, source)
        _check_consistency(manifest, source)
        return manifest

    def to_json(self) -> str:
        """The canonical form: keys sorted, indented by one, ASCII, one newline at the end.

        Raises:
            VerificationError: a report or the recipe holds NaN or something that is no JSON.
        """
        try:
            return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1, allow_nan=False) + "\n"
        except (ValueError, TypeError, RecursionError) as error:
            raise VerificationError(
                f"the manifest of {self.name!r} cannot be written as JSON",
                str(error),
                "the recipe, pass and gate reports may hold only finite numbers, strings, lists and string keys",
            ) from error

    def digest(self) -> str:
        """sha256 of the canonical JSON, hexadecimal: it covers every listed file through its digest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def native_code(self) -> frozenset[str]:
        """The paths whose content is executed: engines and their libraries, be it by the CPU or a GPU."""
        return frozenset(path for engine in self.engines for path in (engine.file, *engine.libraries))


def path_complaint(path: str) -> str:
    """Why no file of an artifact can be called this; empty if one can."""
    return _PATH.complaint(path)


def load_manifest(path: str | Path) -> Manifest:
    """Read the manifest at `path`: the file itself, or the artifact folder that holds it.

    Raises:
        VerificationError: there is none, it is no plain file, or its content is not valid.
        ResourceError: the system does not let us read it.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    return Manifest.from_json(read_small(file, strict.MAX_BYTES), source=str(file))


def _check_schema_version(value: dict[str, Any], source: str) -> None:
    version = value.get("schema_version")
    if type(version) is not int or version < 1:
        why = "missing" if "schema_version" not in value else f"{strict.quote(version)} is not a positive integer"
        strict.refuse(source, "schema_version", why)
    if version > SCHEMA_VERSION:
        raise VerificationError(
            f"{source}: built by a newer Ingot",
            f"schema_version is {version}; this Ingot reads up to {SCHEMA_VERSION}",
            "upgrade Ingot (`pip install --upgrade ingot`), or build the artifact again with this version",
        )
    if version < SCHEMA_VERSION:
        raise VerificationError(
            f"{source}: built by an older Ingot",
            f"schema_version is {version}; this Ingot reads {SCHEMA_VERSION}",
            "build the artifact again with this version (`ingot build … --force`)",
        )


def _check_consistency(manifest: Manifest, source: str) -> None:
    """What no type can say: names are unique, paths are listed, shapes and cache numbers agree."""
    _check_files(manifest, source)
    _unique(source, "engines", "name", (engine.name for engine in manifest.engines))
    listed = {entry.path for entry in manifest.files}
    for index, path in enumerate(manifest.weights):
        _listed(source, f"weights[{index}]", path, listed)
    _unique(source, "weights", "", manifest.weights)
    for index, engine in enumerate(manifest.engines):
        where = f"engines[{index}]"
        if engine.phase == "decode" and engine.length != 1:
            strict.refuse(source, f"{where}.length", f"a decode engine has length 1, found {engine.length}")
        if engine.phase == "prefill" and engine.batch != 1:
            strict.refuse(source, f"{where}.batch", f"a prefill engine has batch 1, found {engine.batch}")
        _listed(source, f"{where}.file", engine.file, listed)
        for position, path in enumerate(engine.libraries):
            _listed(source, f"{where}.libraries[{position}]", path, listed)
        _unique(source, f"{where}.inputs", "name", (buffer.name for buffer in engine.inputs))
        _unique(source, f"{where}.outputs", "name", (buffer.name for buffer in engine.outputs))
        _unique(source, f"{where}.constants", "symbol", (constant.symbol for constant in engine.constants))
    cache, max_length = manifest.kv_cache, manifest.model.max_length
    expected = -(-max_length // cache.block_size)
    if cache.max_blocks != expected:
        why = f"{max_length} tokens in blocks of {cache.block_size} need {expected}, found {cache.max_blocks}"
        strict.refuse(source, "kv_cache.max_blocks", why)
    if cache.num_blocks <= cache.max_blocks:
        why = f"{cache.num_blocks} blocks, the null block among them, cannot hold one sequence of {max_length} tokens"
        strict.refuse(source, "kv_cache.num_blocks", why)


def _check_files(manifest: Manifest, source: str) -> None:
    # Paths that differ only in case are one file on some systems; a file cannot be another's folder either.
    folded: dict[str, int] = {}
    for index, entry in enumerate(manifest.files):
        where = f"files[{index}].path"
        path = entry.path.lower()
        if path == FILE_NAME or path in UNLISTED:
            strict.refuse(source, where, f"{entry.path} is not to be listed")
        if path in folded:
            strict.refuse(source, where, f"{entry.path} is the same path as files[{folded[path]}].path")
        folded[path] = index
    for index, entry in enumerate(manifest.files):
        for parent in Path(entry.path.lower()).parents:
            if (name := parent.as_posix()) in folded or name in (FILE_NAME, *UNLISTED):
                strict.refuse(source, f"files[{index}].path", f"{entry.path} lies in {name}, which is a file")


def _unique(source: str, where: str, field: str, names: Iterable[str]) -> None:
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in seen:
            place = f"{where}[{index}].{field}" if field else f"{where}[{index}]"
            strict.refuse(source, place, f"{strict.quote(name)} stands at index {seen[name]} already")
        seen[name] = index


def _listed(source: str, where: str, path: str, listed: set[str]) -> None:
    if path not in listed:
        strict.refuse(source, where, f"{path} is not among the files")
