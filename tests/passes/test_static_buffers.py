"""plan-static-buffers: states which inputs an engine has and who writes them; the graph stays as it is."""

from __future__ import annotations

import torch
from ingot.passes.plan.static_buffers import PlanStaticBuffers

from .graphs import BF16, Builder, apply, text


def test_roles() -> None:
    b = Builder(2, 1)
    b.input("block_tables", 2, 8, dtype=torch.int32)
    cache = b.input("k_cache_0", 17, 4, 2, 8, dtype=BF16)
    b.input("temperature", 2)
    before = b.done(cache)
    after, outcome = apply(PlanStaticBuffers(), before)
    assert (outcome.changed, text(after)) == (0, text(before))
    assert outcome.facts["inputs"] == [
        {"name": "tokens", "shape": [2, 1], "dtype": "int64", "role": "step"},
        {"name": "positions", "shape": [2, 1], "dtype": "int64", "role": "step"},
        {"name": "block_tables", "shape": [2, 8], "dtype": "int32", "role": "sequence"},
        {"name": "k_cache_0", "shape": [17, 4, 2, 8], "dtype": "bfloat16", "role": "cache"},
        {"name": "temperature", "shape": [2], "dtype": "float32", "role": "sequence"},
    ]
