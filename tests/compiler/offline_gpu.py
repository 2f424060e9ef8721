"""Lets Inductor and Triton generate code for a GPU (sm_90) on a machine that has none: they only have to believe it.

For tests of the CUDA back end: nothing is launched. `pretend()` is a context manager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

_PROPERTIES = SimpleNamespace(
    name="sm_90", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 << 30,
    L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, gcnArchName="",
)  # fmt: skip


class _Driver:
    """What Triton asks of its driver while it compiles."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def pretend() -> Iterator[None]:
    """Inside, torch compiles for a GPU that is not there."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor
    from triton.runtime.driver import driver

    fixed = {
        "get_device_properties": _PROPERTIES, "is_available": True, "current_device": 0, "device_count": 1,
        "get_device_capability": (9, 0), "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(1), "set_rng_state": None,
    }  # fmt: skip
    interface = {
        "get_device_properties": _PROPERTIES, "get_compute_capability": 90, "current_device": 0, "synchronize": None,
        "raise_if_triton_unavailable": None, "is_available": True,
    }  # fmt: skip

    def answer(value: object) -> Any:
        return lambda *_, **__: value

    with contextlib.ExitStack() as stack:
        for name, value in fixed.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer(value)))
        for name, value in interface.items():
            if hasattr(CudaInterface, name):
                stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer(value))))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", answer(0), create=True))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", answer(None)))
        # A torch that is built for CUDA would look for a driver.
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", answer(None)))
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", answer(None)))
        stack.enter_context(mock.patch.object(CachingAutotuner, "_make_launchers", answer(None)))
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver.reset_active() if driver._default is not None else setattr(driver, "_active", None)
