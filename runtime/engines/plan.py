"""Loads kernel plans: memory on the device, weights streamed into it, cubins, graphs. No torch, Triton or compiler.

The order is: read and check every plan while the driver makes its context, take memory, stream and verify the weights,
size the KV cache by what is left, and only then load cubins and record graphs, the largest engine first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...artifacts.errors import ResourceError, UsageError, VerificationError
from ...artifacts.kernel_plan import KernelPlan, PlanKernel
from ...artifacts.manifest import EngineEntry
from ...artifacts.store import OpenArtifact
from ..phases import Phases
from ..weights import WeightsFile, read_headers
from .cuda import OUT_OF_MEMORY, CudaError, Driver
from .cuda_weights import WeightStream
from .plan_check import check_plans, read_plans
from .plan_engine import PlanEngine
from .plan_layout import aligned, buffer_bytes, cache_buffers, lay_out, lay_out_inputs, lay_out_outputs

_ELF = b"\x7fELF"


class PlanGroup:
    """All engines of an artifact on one GPU, their weights and their cache; see `EngineGroup`.

    Args:
        gpu_memory_utilization: the share of the device's memory that may be in use once the cache has been taken.
        graphs: record each engine into a CUDA graph. phases: told where the time went.
        make_driver: gives the device.

    Raises:
        VerificationError: a plan, a cubin or the weights are not what they say.
        ResourceError: not enough memory on the device, or the driver fails.
    """

    def __init__(
        self,
        artifact: OpenArtifact,
        gpu_memory_utilization: float = 0.9,
        graphs: bool = True,
        phases: Phases | None = None,
        make_driver: Callable[[], Driver] = Driver,
    ) -> None:
        phases = phases or Phases()
        self._artifact, self._utilization = artifact, gpu_memory_utilization
        self._engines: dict[str, PlanEngine] = {}
        self._modules: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            self._stack = stack
            files = read_headers(artifact.path(path) for path in artifact.manifest.weights)
            plans, zeroed = self._open(files, make_driver)
            phases.mark("plans, context")
            self._stream = self._driver.stream()
            self._at_exit(self._driver.destroy_stream, self._stream)
            addresses = self._take_memory(files, plans, zeroed)
            phases.mark("weights", sum(file.size for file in files))
            addresses |= self._take_cache()
            # The largest first: what the driver sets aside for it serves the others.
            for name in sorted(plans, key=lambda name: plans[name].arena_bytes, reverse=True):
                self._engines[name] = self._make_engine(name, plans[name], addresses)
                self._at_exit(self._engines[name].close)
                if graphs:
                    self._engines[name].capture()
            self._driver.synchronize(self._stream)
            phases.mark("cache, kernels, graphs")
            self._stack = stack.pop_all()

    @property
    def engines(self) -> Mapping[str, PlanEngine]:
        """Engines by name."""
        return self._engines

    @property
    def num_blocks(self) -> int:
        """See `EngineGroup.num_blocks`."""
        return self._num_blocks

    def close(self) -> None:
        """See `EngineGroup.close`."""
        if self._engines:
            self._engines = {}
            with contextlib.suppress(CudaError):  # a fault has been raised where it was met
                self._driver.activate()
                self._driver.synchronize(self._stream)
        self._stack.close()

    def _at_exit(self, free: Callable[..., object], *arguments: Any) -> None:
        def quietly() -> None:
            # After a fault the driver refuses everything, also to free; the process's end frees it then.
            with contextlib.suppress(CudaError):
                self._driver.activate()
                free(*arguments)

        self._stack.callback(quietly)

    def _open(self, files: list[WeightsFile], make_driver: Callable[[], Driver]) -> tuple[dict[str, KernelPlan], int]:
        """Plans, checked, and how much of the arena must be zero; meanwhile the driver makes its context."""
        with ThreadPoolExecutor(1, "ingot-context") as pool:
            making = pool.submit(make_driver)
            try:
                plans = read_plans(self._artifact)
                tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
                zeroed = check_plans(self._artifact.manifest, plans, tensors)
            finally:
                if making.exception() is None:
                    self._driver = making.result()
                    self._at_exit(self._driver.close)
        self._driver = making.result()
        self._driver.activate()
        return plans, zeroed

    def _take_memory(
        self, files: list[WeightsFile], plans: Mapping[str, KernelPlan], zeroed: int
    ) -> dict[tuple[str, str], int]:
        """Allocate all but the cache and stream the weights; addresses by what a plan's pointers name."""
        manifest, driver = self._artifact.manifest, self._driver
        entries = manifest.engines
        arena_bytes = max((plan.arena_bytes for plan in plans.values()), default=0)
        inputs = {e.name: lay_out_inputs(e.inputs).nbytes for e in entries}
        outputs = {e.name: lay_out_outputs(e.outputs).nbytes for e in entries}
        self._check_free(sum(f.size for f in files), arena_bytes + sum(inputs.values()) + sum(outputs.values()))
        bases = [self._allocate(file.size) for file in files]
        addresses = {("arena", ""): self._allocate(arena_bytes)}
        self._blocks = {e.name: (self._allocate(inputs[e.name]), self._allocate(outputs[e.name])) for e in entries}
        driver.zero(addresses["arena", ""], zeroed, self._stream)
        driver.synchronize(self._stream)
        listed = {entry.path: entry.sha256 for entry in manifest.files}
        digests = {i: listed[path] for i, path in enumerate(manifest.weights) if path in self._artifact.unread}
        WeightStream(driver, files, bases, digests).run()
        addresses |= {
            ("weight", name): base + tensor.start
            for file, base in zip(files, bases, strict=True)
            for name, tensor in file.tensors.items()
        }
        return addresses

    def _take_cache(self) -> dict[tuple[str, str], int]:
        """Allocate as many blocks of the KV cache as may be and can be used; addresses of keys and values."""
        manifest, driver = self._artifact.manifest, self._driver
        cache = manifest.kv_cache
        block_bytes = sum(map(buffer_bytes, cache_buffers(cache, 1)))
        widest = max(entry.batch for entry in manifest.engines)
        free, total = driver.memory_info()
        fits = int(self._utilization * total - (total - free)) // block_bytes
        if fits < cache.max_blocks + 1:
            needed = (cache.max_blocks + 1) * block_bytes
            raise ResourceError(
                f"the GPU has no room for the KV cache of one sequence of {manifest.model.max_length} tokens",
                f"that takes {_size(needed)}; of {_size(total)}, {_size(total - free)} are in use and"
                f" gpu_memory_utilization={self._utilization} lets {_size(self._utilization * total)} be used",
                "raise gpu_memory_utilization, stop what else uses the GPU (see nvidia-smi), or build with a smaller"
                " max_length",
            )
        self._num_blocks = min(fits, widest * cache.max_blocks + 1)
        block = lay_out(cache_buffers(cache, self._num_blocks))
        base = self._allocate(block.nbytes)
        driver.zero(base, block.nbytes, self._stream)
        return {("cache", name): base + place.offset for name, place in block.places.items()}

    def _check_free(self, weights: int, buffers: int) -> None:
        cache = self._artifact.manifest.kv_cache
        smallest = sum(map(buffer_bytes, cache_buffers(cache, cache.max_blocks + 1)))
        free, total = self._driver.memory_info()
        if (needed := weights + buffers + smallest) > free:
            raise ResourceError(
                f"the GPU has too little free memory: {_size(needed)} are needed, {_size(free)} of {_size(total)} free",
                f"weights {_size(weights)}, engines {_size(buffers)}, KV cache of one sequence {_size(smallest)};"
                f" {_size(total - free)} are in use, by this process or others",
                "stop what else uses the GPU (see nvidia-smi), or take a GPU with more memory",
            )

    def _allocate(self, nbytes: int) -> int:
        address = self._driver.allocate(aligned(nbytes))
        self._at_exit(self._driver.free, address)
        return address

    def _make_engine(self, name: str, plan: KernelPlan, addresses: Mapping[tuple[str, str], int]) -> PlanEngine:
        entry = next(entry for entry in self._artifact.manifest.engines if entry.name == name)
        functions = [self._function(entry, kernel) for kernel in plan.kernels]
        inputs, outputs = self._blocks[name]
        return PlanEngine(self._driver, self._stream, entry, plan, functions, inputs, outputs, addresses)

    def _function(self, entry: EngineEntry, kernel: PlanKernel) -> Any:
        try:
            module = self._module(kernel.file)
            return self._driver.function(module, kernel.symbol, kernel.shared_bytes, kernel.carveout)
        except CudaError as error:
            if error.code == OUT_OF_MEMORY:
                raise
            fix = "build the artifact again for this GPU, or update the NVIDIA driver"
            what = f"kernel {kernel.symbol} of engine {entry.name} cannot be loaded from {kernel.file}"
            raise VerificationError(what, f"{error.what}: {error.why}", fix) from error

    def _module(self, file: str) -> Any:
        """A cubin's module: loaded once, from exactly the verified bytes."""
        if file not in self._modules:
            cubin = self._artifact.read(file)
            if not cubin.startswith(_ELF):  # the driver would take text for PTX and compile it
                raise VerificationError(f"{file} is no cubin", "it is no ELF file", "build the artifact again")
            self._modules[file] = self._driver.load_module(cubin)
            self._at_exit(self._driver.unload_module, self._modules[file])
        return self._modules[file]


def load(artifact: OpenArtifact, gpu_memory_utilization: float = 0.9, phases: Phases | None = None) -> PlanGroup:
    """Load all engines of an artifact onto the first visible GPU.

    Raises:
        UsageError: gpu_memory_utilization is no share. Else as `PlanGroup`.
    """
    if not 0 < gpu_memory_utilization <= 1:
        why = f"{gpu_memory_utilization} is not between 0 and 1"
        raise UsageError("gpu_memory_utilization is no share of the memory", why, "0.9 is the usual value")
    return PlanGroup(artifact, gpu_memory_utilization, phases=phases)


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
