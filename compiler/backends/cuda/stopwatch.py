"""Times calls of ops on the GPU, one by itself or several in each other's company, as an engine would run them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from ....runtime.engines.cuda import Driver
from ....runtime.ops.cuda.spec import Lowering, Operands, TensorSpec
from .kernels import Compiled, KernelStore

# Copies of what an engine reads cold: together several times the L2 cache.
_COLD_BYTES = 256 << 20
_MOST_COPIES = 12
_REPLAYS = 4
_COLD = ("weight", "k_cache", "v_cache")


class Stopwatch:
    """Tensors in the layout of the operands of calls that follow each other, used for all of their configurations.

    Args:
        context: tokens in the cache of every row, for attention.
    """

    def __init__(self, calls: Sequence[Operands], context: int) -> None:
        self._driver = Driver()
        self._stream = self._driver.stream()
        made = [_tensors(operands, context) for operands in calls]
        nbytes = sum(t.untyped_storage().nbytes() for one in made for n, t in one.items() if n in _COLD) or _COLD_BYTES
        copies = max(2, min(_MOST_COPIES, -(-_COLD_BYTES // nbytes) + 1))
        self._sets = [made] + [
            [{n: t.clone() if n in _COLD else t for n, t in one.items()} for one in made] for _ in range(copies - 1)
        ]
        self._kept: list[torch.Tensor] = []
        torch.cuda.synchronize()

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sets = []
        torch.cuda.empty_cache()
        self._driver.destroy_stream(self._stream)
        self._driver.close()

    def time(self, store: KernelStore, lowerings: Sequence[Lowering]) -> float:
        """Microseconds of all calls together, each in its lowering.

        Raises:
            ResourceError: a kernel does not compile, or the device refuses it.
        """
        driver, stream = self._driver, self._stream
        scratch = [
            {n: (torch.zeros if s.zeroed else torch.empty)(s.shape, dtype=getattr(torch, s.dtype), device="cuda")
             for n, s in lowering.scratch.items()}
            for lowering in lowerings
        ]  # fmt: skip
        torch.cuda.synchronize()
        functions: dict[str, tuple[Any, Any]] = {}
        self._kept.clear()
        try:
            launches = [
                self._resolved(store, functions, call, {**bound, **own})
                for tensors in self._sets for bound, own, lowering in zip(tensors, scratch, lowerings)
                for call in lowering.calls
            ]  # fmt: skip
            driver.begin_capture(stream)
            try:
                for function, grid, kernel, arguments, dependent in launches:
                    driver.launch(function, grid, kernel.threads, kernel.shared_bytes, arguments, stream, dependent)
            except BaseException:
                driver.abandon_capture(stream)
                raise
            graph = driver.end_capture(stream)
            try:
                return self._replay(graph) * 1000 / len(self._sets)
            finally:
                driver.destroy_graph(graph)
        finally:
            driver.synchronize(stream)
            for module, _ in functions.values():
                driver.unload_module(module)

    def _resolved(
        self, store: KernelStore, functions: dict[str, tuple[Any, Any]], call: Any, bound: dict[str, torch.Tensor]
    ) -> tuple[Any, tuple[int, int, int], Compiled, list[Any], bool]:
        tensors = [bound[operand] for operand in call.pointers.values()]
        kernel = store.add(call, [t.dtype for t in tensors], [t.data_ptr() % 16 == 0 for t in tensors])
        if kernel.name not in functions:
            module = self._driver.load_module(kernel.cubin)
            functions[kernel.name] = (module, self._function(module, kernel))
        order = [n for n in call.function.arg_names if n in call.pointers]
        addresses = [bound[call.pointers[name]].data_ptr() for name in order]
        if kernel.scratch_bytes:
            size = kernel.scratch_bytes * math.prod(call.grid)
            self._kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            addresses.append(self._kept[-1].data_ptr())
        addresses += [0] * kernel.hidden
        arguments = [ctypes.c_void_p(address) for address in addresses]
        return functions[kernel.name][1], call.grid, kernel, arguments, call.dependent

    def _function(self, module: Any, kernel: Compiled) -> Any:
        return self._driver.function(module, kernel.symbol, kernel.shared_bytes, kernel.carveout)

    def _replay(self, graph: Any) -> float:
        """Milliseconds of the graph, the best of a few: what disturbs a run only makes it slower."""
        driver, stream = self._driver, self._stream
        begin, end = driver.event(timing=True), driver.event(timing=True)
        try:
            driver.launch_graph(graph, stream)
            times = []
            for _ in range(_REPLAYS):
                driver.record(begin, stream)
                driver.launch_graph(graph, stream)
                driver.record(end, stream)
                driver.wait(end)
                times.append(driver.elapsed_ms(begin, end))
            return min(times)
        finally:
            driver.destroy_event(begin)
            driver.destroy_event(end)


def _tensors(operands: Operands, context: int) -> dict[str, torch.Tensor]:
    """Random values in the layout of the operands; positions and tables are those of full rows."""
    made = {n: _tensor(s) for n, s in {**operands.tensors, **operands.outputs}.items() if s is not None}
    table, positions = made.get("block_tables"), made.get("positions")
    if table is not None and positions is not None:
        cache = next(t for n, t in made.items() if n in ("k_cache", "cache"))
        rows, width = table.shape
        table.copy_((torch.arange(rows * width, device="cuda").reshape(rows, width) % cache.shape[0]).to(table.dtype))
        length = positions.shape[-1]
        last = min(max(context, length - 1), width * cache.shape[1] - 1)
        positions.copy_(torch.arange(last - length + 1, last + 1, device="cuda").expand_as(positions))
    return made


def _tensor(spec: TensorSpec) -> torch.Tensor:
    span = sum((s - 1) * t for s, t in zip(spec.shape, spec.strides)) + 1 if 0 not in spec.shape else 0
    dtype = getattr(torch, spec.dtype)
    flat = torch.empty(max(span, 1), dtype=dtype, device="cuda")
    if dtype == torch.float8_e4m3fn:
        flat = torch.randn(len(flat), dtype=torch.bfloat16, device="cuda").to(dtype)
    elif dtype.is_floating_point:
        flat.normal_(0.0, 0.05)
    elif dtype in (torch.int8, torch.uint8):
        flat.random_(0, 127)  # quantized values
    else:
        flat.zero_()
    return torch.as_strided(flat, spec.shape, spec.strides)
