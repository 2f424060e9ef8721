"""Chooses kernel configurations by measuring them on the GPU at hand, with a cache of what was measured before.

What is timed is the very cubin that would ship, launched as an engine launches it: many times in one CUDA graph, as
programmatic dependents, each on its own copy of weights and cache, so that nothing comes from the L2 cache that would
not be there in an engine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ....artifacts.errors import ResourceError
from ....runtime.ops.cuda.spec import Config, Operands
from ...cache.location import default_folder
from .kernels import KernelStore
from .lower import Call
from .stopwatch import Stopwatch

# Tokens in the cache of every row: no power of two, which would flatter tiles that just fit it.
CONTEXT = 1200
# A layer must gain such a share to choose otherwise than each call by itself did: less is noise.
_WORTH = 0.003
# Kinds of layers that are measured as a whole.
_MOST_LAYERS = 4


@dataclass
class Tuner:
    """Picks the fastest candidate of each distinct call and remembers it.

    Attributes:
        store: where kernels are compiled; what is chosen is there already when the engine asks for it.
        cache: a JSON file of earlier choices, read at the start and written by `save`; None keeps nothing.
        progress: told what is being measured.
        chosen: the configurations taken in this build by call, for the report. Times stay in the cache: no two
            measurements are equal, and equal builds should be.
    """

    store: KernelStore
    cache: Path | None = None
    progress: Callable[[str], None] = lambda name: None
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache.is_file():
            # A cache that cannot be read is measured anew: it is no more than time saved.
            with contextlib.suppress(ValueError, OSError, RecursionError):
                found = json.loads(self.cache.read_text())
                self._known = found if isinstance(found, dict) else {}

    def prepare(self, engines: Sequence[Sequence[Call]]) -> None:
        """Measure every distinct call of the engines that is not known yet, each by itself and then in company.

        All candidates are compiled first, at once.
        """
        fresh: dict[str, Call] = {}
        for call in itertools.chain.from_iterable(engines):
            if len(call.provider.candidates(call.operands)) > 1:
                fresh.setdefault(_key(call), call)
        fresh = {key: call for key, call in fresh.items() if self._remembered(key, call) is None}
        self.progress(f"kernels of {len(fresh)} calls")
        compile_ahead(self.store, fresh.values())
        for key, call in fresh.items():
            self.progress(_name(call))
            candidates = call.provider.candidates(call.operands)
            times = measure(self.store, call.provider, call.operands, candidates)
            best = min(range(len(times)), key=times.__getitem__)
            if times[best] == float("inf"):
                raise ResourceError(
                    f"no configuration of {call.op} runs on this GPU",
                    f"{len(times)} were tried for {_name(call)}",
                    "report this with the GPU's name and the versions of torch and triton",
                )
            self._known[key] = {
                "config": dict(candidates[best]), "microseconds": round(times[best], 3), "tried": len(times),
            }  # fmt: skip
        for calls in engines:
            for layer in layers(calls):
                if any(_key(call) in fresh for call in layer):
                    self._settle(layer)

    def _settle(self, layer: Sequence[Call]) -> None:
        """Choose again for each call of a decode layer, the others as they are: by the time of the layer as a whole.

        What a launch costs beside others is not what it takes alone: it overlaps with those around it, or keeps them
        out. Attention comes first, since it is what the products differ from.
        """
        self.progress("a decode layer as a whole")
        keys = [_key(call) for call in layer]
        configs = [self(call.op, call.provider, call.operands) for call in layer]
        with Stopwatch([call.operands for call in layer], CONTEXT) as watch:

            def timed(tried: Sequence[Config]) -> float:
                try:
                    return watch.time(
                        self.store, [c.provider.lower(c.operands, config) for c, config in zip(layer, tried)]
                    )
                except (ResourceError, ValueError):
                    return float("inf")

            best = timed(configs)
            for key, call in dict(zip(keys, layer)).items():
                for config in call.provider.candidates(call.operands):
                    tried = [config if other == key else old for other, old in zip(keys, configs)]
                    if (found := timed(tried)) < best * (1 - _WORTH):
                        best, configs = found, tried
        for key, config in zip(keys, configs):
            self._known.setdefault(key, {}).update(config=dict(config), layer_microseconds=round(best, 3))

    def __call__(self, op: str, provider: Any, operands: Operands) -> Config:
        """The configuration of one call: the fastest where it was measured, else the provider's first guess."""
        call = Call(op, provider, operands)
        config = self._remembered(_key(call), call)
        if config is None:
            return provider.candidates(operands)[0]
        self.chosen[_name(call)] = dict(config)
        return config

    def _remembered(self, key: str, call: Call) -> Config | None:
        """The choice of an earlier measurement, if it is one of the candidates: a cache is nothing to believe."""
        entry = self._known.get(key)
        config = entry.get("config") if isinstance(entry, dict) else None
        return next((c for c in call.provider.candidates(call.operands) if dict(c) == config), None)

    def save(self) -> None:
        """Write the cache aside and rename it; where it cannot be written, the next build measures again."""
        if self.cache is None:
            return
        aside = self.cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(self._known, indent=1, sort_keys=True) + "\n")
            os.replace(aside, self.cache)
        except OSError as error:
            self.progress(f"the measured choices are not kept: {error}")


def layers(calls: Sequence[Call]) -> list[list[Call]]:
    """The distinct layers of a decode engine's calls, each from its attention to the next one's."""
    starts = [place for place, call in enumerate(calls) if call.op.endswith("attention_step")]
    found: dict[tuple[str, ...], list[Call]] = {}
    for start, end in itertools.pairwise(starts):
        found.setdefault(tuple(_key(call) for call in calls[start:end]), list(calls[start:end]))
    return list(found.values())[:_MOST_LAYERS]


def default_cache() -> Path:
    """Where choices are kept between builds: in the user's cache folder."""
    return default_folder() / "tuning.json"


def measure(
    store: KernelStore, provider: Any, operands: Operands, configs: Sequence[Config], context: int = CONTEXT
) -> list[float]:
    """Microseconds of one call by configuration, infinite where one cannot run; the best of several graph replays.

    Args:
        context: tokens in the cache of every row, for attention.
    """
    times = []
    with Stopwatch([operands], context) as watch:
        for config in configs:
            try:
                times.append(watch.time(store, [provider.lower(operands, config)]))
            except (ResourceError, ValueError):
                times.append(float("inf"))
    return times


def compile_ahead(store: KernelStore, calls: Any, workers: int | None = None) -> None:
    """Compile the candidates of many calls at once; what does not compile is left for `measure` to find."""

    def one(item: tuple[Call, Config]) -> None:
        call, config = item
        with contextlib.suppress(ResourceError, ValueError):
            lowering = call.provider.lower(call.operands, config)
            named = {**call.operands.tensors, **call.operands.outputs, **lowering.scratch}
            for launch in lowering.calls:
                specs = [named[operand] for operand in launch.pointers.values()]
                dtypes = [getattr(torch, s.dtype) for s in specs]
                store.add(launch, dtypes, [getattr(s, "aligned", True) for s in specs])

    work = [(call, config) for call in calls for config in call.provider.candidates(call.operands)]
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(one, work))


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
