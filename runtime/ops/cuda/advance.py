"""The last launch of a decode step: its tokens become the next step's input.

So steps follow each other on the device, and the host reads tokens behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .spec import KernelCall, Lowering


@triton.jit
def advance_kernel(next_tokens, tokens, positions, BATCH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: tokens = next_tokens and positions + 1 in rows that have a position; padding (-1) stays."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, BLOCK)
    position = tl.load(positions + row, mask=row < BATCH, other=-1)
    live = position >= 0
    tl.store(tokens + row, tl.load(next_tokens + row, mask=live, other=0), mask=live)
    tl.store(positions + row, position + 1, mask=live)


def lower_advance(batch: int) -> Lowering:
    """The launch for a decode engine of `batch` rows.

    Its pointers are "next_tokens" [batch], and "tokens" and "positions" [batch, 1], which it writes; all are
    contiguous int64. It is no op of the graph, but comes after all that reads these inputs.
    """
    block = 1 << (batch - 1).bit_length()
    call = KernelCall(
        advance_kernel,
        (1, 1, 1),
        {name: name for name in ("next_tokens", "tokens", "positions")},
        {"BATCH": batch, "BLOCK": block, "PDL": True},
        num_warps=max(1, min(4, block // 32)),
        dependent=True,
        label="advance",
    )
    return Lowering((call,))
