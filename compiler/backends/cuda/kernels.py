"""Triton kernels to cubins: each distinct one is compiled once for all engines of a build."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ....artifacts.cuda_probe import architecture
from ....artifacts.errors import ResourceError
from ....runtime.ops.cuda.spec import TRITON_DTYPES, KernelCall
from .program import swapped

_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)", re.S)


@dataclass(frozen=True)
class Compiled:
    """A kernel as it ships.

    Attributes:
        name: of its function, with a digest of the cubin; symbol: its entry in the cubin.
        carveout: see `KernelCall`.
        scratch_bytes: device memory for each of its programs, for which a pointer comes behind its own parameters.
        hidden: pointers behind that, which Triton adds and which are null.
    """

    name: str
    symbol: str
    cubin: bytes
    threads: int
    shared_bytes: int
    carveout: int
    scratch_bytes: int
    hidden: int


@contextmanager
def without_line_info() -> Iterator[None]:
    """Kernels without the paths of their sources: what ships must not depend on where it was built."""
    from triton import knobs

    with swapped(knobs.compilation, "disable_line_info", True):
        yield


class KernelStore:
    """Compiles kernels for one target ("sm_90") and keeps each once."""

    def __init__(self, capability: int = 90) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = architecture(capability)
        self._target = GPUTarget("cuda", capability, 32)
        self._known: dict[Any, Compiled] = {}
        self.kernels: dict[str, Compiled] = {}

    def add(self, call: KernelCall, dtypes: Sequence[torch.dtype], aligned: Sequence[bool]) -> Compiled:
        """The kernel of a provider's call, given the dtypes and 16-byte alignment of its pointers in order.

        Raises:
            ResourceError: it does not compile; names it.
        """
        function = call.function
        types = {name: "*" + TRITON_DTYPES[str(d).removeprefix("torch.")] for name, d in zip(call.pointers, dtypes)}
        fine = dict(zip(call.pointers, aligned))
        key = (
            id(function), tuple(sorted(types.items())), tuple(sorted(fine.items())),
            tuple(sorted((k, str(v)) for k, v in call.constants.items())), call.num_warps, call.num_stages,
            call.carveout,
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = self._compile(call, types, fine)
        return self._known[key]

    def _compile(self, call: KernelCall, types: dict[str, str], fine: dict[str, bool]) -> Compiled:
        import triton
        from triton.compiler import ASTSource

        names = call.function.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if fine.get(name)}
        constants = {(i,): call.constants[name] for i, name in enumerate(names) if name not in types}
        try:
            source = ASTSource(fn=call.function, signature=signature, constexprs=constants, attrs=attrs)
            options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
            compiled = triton.compile(source, target=self._target, options=options)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = next((line for line in lines if "error" in line.lower()), lines[-1])
            raise ResourceError(
                f"kernel {call.function.__name__} ({call.label}) does not compile for {self.arch}",
                f"{type(error).__name__}: {reason[:500]}",
                "check the versions of triton and torch; --debug shows the compiler's output",
            ) from error
        return self._keep(call.function.__name__, compiled, len(call.pointers), call.carveout)

    def add_inductor(self, tuner: Any) -> Compiled:
        """A kernel that Inductor has compiled already."""
        key = ("inductor", id(tuner))
        if key not in self._known:
            result = tuner.compile_results[0]
            signature = tuner.triton_meta["signature"]
            constants = tuner.triton_meta["constants"]
            count = sum(kind != "constexpr" and name not in constants for name, kind in signature.items())
            self._known[key] = self._keep(tuner.fn.__name__, result.kernel, count)
        return self._known[key]

    def _keep(self, name: str, compiled: Any, parameters: int, carveout: int = -1) -> Compiled:
        cubin: bytes = compiled.asm["cubin"]
        metadata = compiled.metadata
        entry = _ENTRY.search(compiled.asm["ptx"])
        declared = entry.group(1).count(".param") if entry else parameters
        scratch = int(getattr(metadata, "global_scratch_size", 0) or 0)
        found = Compiled(
            f"{name}-{hashlib.sha256(cubin).hexdigest()[:12]}", metadata.name, cubin, metadata.num_warps * 32,
            metadata.shared, carveout, scratch, declared - parameters - (scratch > 0),
        )  # fmt: skip
        self.kernels.setdefault(found.name, found)
        return self.kernels[found.name]
