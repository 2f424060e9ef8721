"""Runs AOTInductor engines on the CPU through their C interface, without importing torch.

An engine is a shared object whose tensor functions are resolved by name when it is loaded: from the artifact's own
kernels library (host_library "none"), or from libtorch_cpu.so where a build needed ATen's kernels. All engines of a
group bind the same mapped weights and write the same KV cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from ...artifacts.errors import ResourceError, UsageError, VerificationError
from ...artifacts.manifest import Buffer, EngineEntry
from ...artifacts.store import OpenArtifact
from ..weights import MappedTensor, map_weights
from .aoti_host import Handle, Host, load_path, open_library
from .base import logits_of
from .buffers import check_buffers

_STORED_AS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
_ALIGNMENT = 64
# Below this much weight data a step is over before a second thread has paid for its barriers, and on a busy machine
# every barrier can wait for a time slice: measured 0.15 ms a token on one thread, 0.4 to 30 ms on two.
_SERIAL_BYTES = 16 << 20


class _ConstantEntry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("handle", Handle))


# Of AOTInductor's C interface, what is called here.
_FUNCTIONS = tuple(
    f"AOTInductorModelContainer{name}"
    for name in (
        "CreateWithDevice", "Delete", "GetNumConstants", "GetConstantName", "UpdateUserManagedConstantBufferPairs",
        "RunSingleThreaded",
    )
)  # fmt: skip


def _aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeroed memory for a buffer, aligned for vector loads; bfloat16 is held as its bits."""
    kind = np.dtype(_STORED_AS.get(dtype, dtype))
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(count * kind.itemsize + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count * kind.itemsize].view(kind).reshape(shape)


class AOTIEngine:
    """One engine: fixed buffers in, sampled tokens and logits out."""

    def __init__(
        self,
        host: Host,
        artifact: OpenArtifact,
        entry: EngineEntry,
        caches: Mapping[str, tuple[np.ndarray, int]],
        weights: Mapping[str, int],
        serial: bool,
    ) -> None:
        self.entry, self.asynchronous = entry, False
        self._host = host
        self._serial = serial
        # Every engine exports the same names; loaded globally, the first would answer for all of them.
        self._library = open_library(load_path(artifact, entry.file), entry.file, ctypes.RTLD_LOCAL, _FUNCTIONS)
        self._container = Handle()
        self._check(
            self._library.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None
            ),
            "created",
        )
        self._bind(weights)
        self._buffers = {b.name: _aligned(b.shape, b.dtype) for b in entry.inputs if b.name not in caches}
        self._outputs = {b.name: _aligned(b.shape, b.dtype) for b in entry.outputs}
        self._inputs = {
            **self._buffers,
            **{name: caches[name][0] for name in (b.name for b in entry.inputs) if name in caches},
        }
        handles = [
            caches[b.name][1] if b.name in caches else self._handle(self._buffers[b.name], b) for b in entry.inputs
        ]
        self._input_handles = (Handle * len(handles))(*handles)
        made = [self._handle(self._outputs[b.name], b) for b in entry.outputs]
        self._output_handles = (Handle * len(made))(*made)
        run = ctypes.cast(self._library.AOTInductorModelContainerRunSingleThreaded, Handle)
        # Everything a step needs, prepared once: a step is one call with these arguments.
        self._arguments = (self._container, run, len(handles), self._input_handles, len(made), self._output_handles)

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """See `Engine.inputs`."""
        return self._buffers

    def run(self) -> None:
        """See `Engine.run`.

        Raises:
            ResourceError: the engine reported a failure (memory).
        """
        if not self._container:
            raise UsageError(f"engine {self.entry.name} is closed", "close() was called", "open the artifact again")
        host = self._host
        threads = host.max_threads() if self._serial else 0
        if self._serial:
            host.set_threads(1)
        status = host.run(*self._arguments)
        if self._serial:
            host.set_threads(threads)
        if status:
            reason = (self._host.last_error() or b"").decode(errors="replace")
            raise ResourceError(
                f"engine {self.entry.name} failed",
                reason,
                "check the free memory; if there is enough, build the artifact again",
            )

    def advance(self) -> None:
        """See `Engine.advance`."""
        self._buffers["tokens"][:, 0] = self._outputs["next_tokens"]
        positions = self._buffers["positions"]
        np.add(positions, 1, out=positions, where=positions >= 0)
        self.run()

    def next_tokens(self) -> np.ndarray:
        """See `Engine.next_tokens`."""
        return self._outputs["next_tokens"]

    def sampled_logits(self) -> np.ndarray:
        """See `Engine.sampled_logits`."""
        return logits_of(self._outputs["logits"], self._outputs["next_tokens"])

    def logits(self) -> np.ndarray:
        """See `Engine.logits`."""
        return self._outputs["logits"]

    def close(self) -> None:
        """Free the engine; the group frees what it shares."""
        if self._container:
            self._library.AOTInductorModelContainerDelete(self._container)
            # In place: the prepared arguments hold this very object.
            self._container.value = None

    def _handle(self, array: np.ndarray, buffer: Buffer) -> int:
        return self._host.tensor(array.ctypes.data, buffer.shape, buffer.dtype)

    def _check(self, status: int, done: str) -> None:
        if status:
            raise VerificationError(
                f"engine {self.entry.name} could not be {done}", "the engine refused", "build the artifact again"
            )

    def _bind(self, weights: Mapping[str, int]) -> None:
        """Bind weights by name; sets first, since a name left out is a null pointer at the first run."""
        library = self._library
        count = ctypes.c_size_t()
        self._check(
            library.AOTInductorModelContainerGetNumConstants(self._container, ctypes.byref(count)),
            "asked for its weights",
        )
        wanted = set()
        for index in range(count.value):
            name = ctypes.c_char_p()
            self._check(
                library.AOTInductorModelContainerGetConstantName(
                    self._container, ctypes.c_size_t(index), ctypes.byref(name)
                ),
                "asked for its weights",
            )
            wanted.add((name.value or b"").decode())
        named = {c.symbol: c.weight for c in self.entry.constants}
        if wanted != set(named):
            odd = ", ".join(sorted(wanted ^ set(named))[:5])
            raise VerificationError(
                f"engine {self.entry.name} and the manifest disagree about its weights",
                f"they differ in {odd}",
                "build the artifact again",
            )
        missing = sorted(w for w in named.values() if w not in weights)
        if missing:
            raise VerificationError(
                f"weights of engine {self.entry.name} are missing", ", ".join(missing[:5]), "build the artifact again"
            )
        pairs = [_ConstantEntry(symbol.encode(), weights[weight]) for symbol, weight in named.items()]
        self._check(
            library.AOTInductorModelContainerUpdateUserManagedConstantBufferPairs(
                self._container,
                (_ConstantEntry * len(pairs))(*pairs),
                ctypes.c_size_t(len(pairs)),
                ctypes.c_bool(False),
                ctypes.c_bool(True),
            ),
            "given its weights",
        )


class AOTIGroup:
    """All engines of an artifact, their weights and their cache."""

    def __init__(self, artifact: OpenArtifact) -> None:
        manifest = artifact.manifest
        host = Host(artifact)
        self.num_blocks = manifest.kv_cache.num_blocks
        for entry in manifest.engines:
            check_buffers(entry, manifest)
        self._tensors = map_weights(artifact.path(p) for p in manifest.weights)
        weights = {name: self._weight(host, tensor) for name, tensor in self._tensors.items()}
        shapes = {b.name: b for e in manifest.engines for b in e.inputs if "_cache_" in b.name}
        self.caches: dict[str, np.ndarray] = {name: _aligned(b.shape, b.dtype) for name, b in shapes.items()}
        shared = {n: (a, host.tensor(a.ctypes.data, shapes[n].shape, shapes[n].dtype)) for n, a in self.caches.items()}
        serial = sum(t.data.nbytes for t in self._tensors.values()) < _SERIAL_BYTES
        self._engines = {e.name: AOTIEngine(host, artifact, e, shared, weights, serial) for e in manifest.engines}

    @staticmethod
    def _weight(host: Host, tensor: MappedTensor) -> int:
        return host.tensor(tensor.data.ctypes.data, tensor.shape, tensor.dtype)

    @property
    def engines(self) -> Mapping[str, AOTIEngine]:
        """Engines by name."""
        return self._engines

    def close(self) -> None:
        """See `EngineGroup.close`."""
        for engine in self._engines.values():
            engine.close()
        self._engines = {}


def load(artifact: OpenArtifact) -> AOTIGroup:
    """Load all engines of a verified artifact.

    The number of threads is OpenMP's: OMP_NUM_THREADS, else one per core.

    Raises:
        VerificationError: an engine cannot be loaded, or wants other weights than the artifact holds.
        ResourceError: out of memory.
    """
    return AOTIGroup(artifact)
