"""A Triton kernel that does nothing but read: each program adds up a stretch of a tensor and writes one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK, _STEPS = 4096, 16


@triton.jit
def read_kernel(source, sums, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums[program] = sum of its STEPS * BLOCK elements."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        place = (program * STEPS + step) * BLOCK + lane
        total += tl.load(source + place, mask=place < count, other=0.0)
    tl.store(sums + program, tl.sum(total, 0))


def reader(words: torch.Tensor) -> Callable[[], Any]:
    """Something to call that reads all of `words` (float32, contiguous) once and returns the sums."""
    programs = triton.cdiv(words.numel(), _BLOCK * _STEPS)
    sums = torch.empty(programs, device=words.device)

    def once() -> torch.Tensor:
        read_kernel[(programs,)](words, sums, words.numel(), _BLOCK, _STEPS, num_warps=8)
        return sums

    return once
