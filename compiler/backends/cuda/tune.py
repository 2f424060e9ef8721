"""Chooses kernel configurations by measuring them on the GPU at hand, with a cache of what was measured before.

A call is timed as it will run: many of them in one CUDA graph, dependent launches among them, each on its own copy of
the weights, so that nothing is read from the L2 cache that would not be there in an engine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ....artifacts.errors import ResourceError
from ....runtime.ops.cuda.spec import Config, Lowering, Operands, TensorSpec
from .lower import Call

_COLD_BYTES = 256 << 20  # copies of an operand together: several times the L2 cache
_MOST_COPIES = 12
_REPLAYS = 3


@dataclass
class Tuner:
    """Picks the fastest candidate of each distinct call and remembers it.

    Attributes:
        cache: a JSON file of earlier choices, read at the start and written by `save`; None keeps nothing.
        progress: told what is being measured.
        chosen: what was chosen in this build, for the manifest: call -> {"config", "microseconds", "tried"}.
    """

    cache: Path | None = None
    progress: Callable[[str], None] = lambda name: None
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache.is_file():
            self._known = json.loads(self.cache.read_text())

    def prepare(self, calls: Sequence[Call]) -> None:
        """Measure every distinct call that is not known yet: all candidates are compiled first, at once."""
        fresh: dict[str, Call] = {}
        for call in calls:
            if len(call.provider.candidates(call.operands)) > 1:
                fresh.setdefault(_key(call), call)
        fresh = {key: call for key, call in fresh.items() if key not in self._known}
        compile_ahead([(c.provider, c.operands, x) for c in fresh.values() for x in c.provider.candidates(c.operands)])
        for key, call in fresh.items():
            self.progress(_name(call))
            candidates = call.provider.candidates(call.operands)
            times = measure(call.provider, call.operands, candidates)
            best = min(range(len(times)), key=times.__getitem__)
            if times[best] != float("inf"):
                self._known[key] = {
                    "config": dict(candidates[best]), "microseconds": round(times[best], 3), "tried": len(times),
                }  # fmt: skip

    def __call__(self, op: str, provider: Any, operands: Operands) -> Config:
        """The configuration of one call: the fastest where it was measured, else the provider's first guess."""
        call = Call(op, provider, operands)
        known = self._known.get(_key(call))
        if known is None:
            return provider.candidates(operands)[0]
        self.chosen[_name(call)] = known
        return known["config"]

    def save(self) -> None:
        """Write the cache aside and rename it."""
        if self.cache is None:
            return
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        aside = self.cache.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(self._known, indent=1, sort_keys=True) + "\n")
        os.replace(aside, self.cache)


def default_cache() -> Path:
    """Where choices are kept between builds: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ingot" / "tuning.json"


def _name(call: Call) -> str:
    operands = call.operands
    shapes = " ".join("x".join(map(str, t.shape)) for t in list(operands.tensors.values())[:2] if t)
    kinds = ",".join(str(v) for v in operands.values.values() if isinstance(v, str) and v)
    present = "+".join(n for n, t in operands.tensors.items() if t is not None)
    return f"{call.op} {shapes} {present} {kinds}".strip()


def _key(call: Call) -> str:
    import triton

    operands = call.operands
    facts = {
        "op": call.op,
        "tensors": {n: asdict(t) if t else None for n, t in operands.tensors.items()},
        "values": {n: repr(v) for n, v in operands.values.items()}, "stable": sorted(operands.stable),
        "candidates": [sorted(c.items()) for c in call.provider.candidates(operands)],
        "device": torch.cuda.get_device_name(), "triton": triton.__version__, "source": _sources(call.provider),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _sources(provider: Any) -> str:
    """Digest of the folder the provider's kernels come from: a changed kernel is measured again."""
    digest = hashlib.sha256()
    for path in sorted(Path(provider.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tensor(spec: TensorSpec, name: str) -> torch.Tensor:
    """Random values in the layout of `spec`; positions and tables are filled with what keeps a kernel busy."""
    span = sum((s - 1) * t for s, t in zip(spec.shape, spec.strides)) + 1 if 0 not in spec.shape else 0
    dtype = getattr(torch, spec.dtype)
    flat = torch.empty(max(span, 1), dtype=dtype, device="cuda")
    if dtype.is_floating_point:
        flat.normal_(0.0, 0.05)
    else:
        flat.zero_()
    return torch.as_strided(flat, spec.shape, spec.strides)


def _bindings(operands: Operands, context: int) -> dict[str, torch.Tensor]:
    made = {n: _tensor(s, n) for n, s in {**operands.tensors, **operands.outputs}.items() if s is not None}
    if "block_tables" in made and "positions" in made:
        cache = next(t for n, t in made.items() if n in ("k_cache", "cache"))
        table = made["block_tables"]
        rows, width = table.shape
        table.copy_((torch.arange(rows * width, device="cuda").reshape(rows, width) % cache.shape[0]).to(table.dtype))
        length = made["positions"].shape[-1]
        last = min(context, width * cache.shape[1] - 1)
        made["positions"].copy_(torch.arange(last - length + 1, last + 1, device="cuda").expand_as(made["positions"]))
    return made


def launch(lowering: Lowering, bound: Mapping[str, torch.Tensor]) -> None:
    """Launch a provider's kernels on torch tensors, on the current stream."""
    scratch = {
        n: (torch.zeros if s.zeroed else torch.empty)(s.shape, dtype=getattr(torch, s.dtype), device="cuda")
        for n, s in lowering.scratch.items() if n not in bound
    }  # fmt: skip
    everything = {**bound, **scratch}
    for call in lowering.calls:
        pointers = {parameter: everything[operand] for parameter, operand in call.pointers.items()}
        call.function[call.grid](
            **pointers, **call.constants, num_warps=call.num_warps, num_stages=call.num_stages,
            launch_pdl=call.dependent,
        )  # fmt: skip


def measure(provider: Any, operands: Operands, configs: Sequence[Config], context: int = 1024) -> list[float]:
    """Microseconds of one call by configuration, infinite where one cannot run; the median of several graph replays.

    Args:
        context: tokens in the cache of every row, for attention.
    """
    first = _bindings(operands, context)
    cold = {n: t for n, t in first.items() if n in ("weight", "k_cache", "v_cache")}
    nbytes = sum(t.numel() * t.element_size() for t in cold.values()) or _COLD_BYTES
    copies = max(2, min(_MOST_COPIES, -(-_COLD_BYTES // nbytes) + 1))
    sets = [{**first, **({n: t.clone() for n, t in cold.items()} if i else {})} for i in range(copies)]
    times = []
    for config in configs:
        try:
            times.append(_time(provider.lower(operands, config), sets))
        except (RuntimeError, ValueError, AssertionError, _compile_errors()):
            torch.cuda.synchronize()
            times.append(float("inf"))
    return times


def _compile_errors() -> type[Exception]:
    from triton.runtime.errors import TritonError

    return TritonError


def _time(lowering: Lowering, sets: Sequence[Mapping[str, torch.Tensor]]) -> float:
    scratch = {
        n: (torch.zeros if s.zeroed else torch.empty)(s.shape, dtype=getattr(torch, s.dtype), device="cuda")
        for n, s in lowering.scratch.items()
    }  # fmt: skip
    launch(lowering, {**sets[0], **scratch})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for bound in sets:
            launch(lowering, {**bound, **scratch})
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(sets))
    return statistics.median(times)


def compile_ahead(calls: Sequence[tuple[Any, Operands, Config]], workers: int | None = None) -> None:
    """Compile kernels of many calls at once into Triton's own cache, so that measuring them finds them there.

    What does not compile is left for `measure` to find.
    """
    from .kernels import KernelStore

    major, minor = torch.cuda.get_device_capability()
    store = KernelStore(10 * major + minor)

    def one(item: tuple[Any, Operands, Config]) -> None:
        provider, operands, config = item
        with contextlib.suppress(ResourceError, ValueError):
            lowering = provider.lower(operands, config)
            named = {**operands.tensors, **operands.outputs, **lowering.scratch}
            for call in lowering.calls:
                specs = [named[operand] for operand in call.pointers.values()]
                dtypes = [getattr(torch, s.dtype) for s in specs if s]
                store.add(call, dtypes, [getattr(s, "aligned", True) for s in specs if s])

    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(one, calls))
