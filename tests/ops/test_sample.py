"""The compiled sampler against one that sorts, written in numpy straight from the rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = np.uint32(0x9E3779B9)


def mix(x):
    x = np.asarray(x, np.uint32)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def uniform(seed, position, count):
    with np.errstate(over="ignore"):
        h = mix(np.uint32(seed & 0xFFFFFFFF) + GOLDEN)
        h = mix(h ^ np.uint32(seed >> 32 & 0xFFFFFFFF))
        h = mix(h ^ np.uint32(position & 0xFFFFFFFF))
        r = mix(h ^ np.arange(count, dtype=np.uint32) * GOLDEN)
    u = ((r >> np.uint32(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)
    return np.minimum(u, np.float32(1 - 2**-24))


def oracle(logits, temperature, top_k, top_p, min_p, seed, position, *, slack=0.0):
    """(kept, scores): which tokens the rule leaves, top_p moved by `slack`, and z + noise in float64."""
    z = (logits / np.float32(temperature)).astype(np.float32)
    kept = np.ones(len(z), bool)
    if min_p > 0:
        kept &= z >= z.max() + np.log(np.float32(min_p))
    if 0 < top_k < len(z):
        kept &= z >= np.sort(np.where(kept, z, -np.inf))[::-1][top_k - 1]
    if top_p < 1:
        order = np.argsort(-np.where(kept, z, -np.inf), kind="stable")
        p = np.where(kept, np.exp(z.astype(np.float64) - z.max()), 0)
        p /= p.sum()
        total = np.cumsum(p[order])
        count = int(np.searchsorted(total, np.float32(top_p).astype(np.float64) + slack)) + 1
        kept &= z >= z[order][min(count, len(z)) - 1]
    noise = -np.log(-np.log(uniform(seed, position, len(z)).astype(np.float64)))
    return kept, np.where(kept, z + noise, -np.inf)


def draw(kernels, logits, rows):
    columns = list(zip(*rows))
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    return kernels.call("sample", logits, *(torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes))).tolist()


def check(kernels, logits, row):
    (token,) = draw(kernels, logits[None], [row])
    # Rounding may move a threshold or a near tie: the token must be right for a top_p a hair to either side.
    for slack in (0.0, -1e-6, 1e-6):
        kept, scores = oracle(logits.numpy(), *row, slack=slack)
        if kept[token] and scores[token] >= scores.max() - 1e-4:
            return
    raise AssertionError(f"token {token} for {row}: kept {kept[token]}, score {scores[token]}, best {scores.max()}")


@settings(max_examples=300, deadline=None)
@given(
    size=st.sampled_from([1, 2, 7, 8, 9, 64, 65, 500, 4099]),
    spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    temperature=st.sampled_from([0.01, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 400, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**31),
)
def test_any_parameters(kernels, size, spread, temperature, top_k, top_p, min_p, seed, position):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed % 1000)) * spread
    check(kernels, logits, (temperature, top_k, top_p, min_p, seed, position))


@pytest.mark.parametrize("row", [(1.0, 0, 1.0, 0.0), (1.0, 40, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (2.0, 9000, 0.99, 0.001)])
def test_a_large_vocabulary(kernels, row):
    logits = torch.randn(128256, generator=torch.Generator().manual_seed(1)) * 3
    for seed in range(20):
        check(kernels, logits, (*row, seed, 17))


def test_ties_at_thresholds_are_all_kept_and_greedy_takes_the_lowest(kernels):
    logits = torch.zeros(300)
    logits[[40, 90, 222]] = 5.0
    tokens = {draw(kernels, logits[None], [(1.0, 1, 1.0, 0.0, seed, 0)])[0] for seed in range(80)}
    assert tokens == {40, 90, 222}
    tokens = {draw(kernels, logits[None], [(1.0, 0, 0.01, 0.0, seed, 0)])[0] for seed in range(80)}
    assert tokens == {40, 90, 222}
    assert draw(kernels, logits[None], [(0.0, 0, 1.0, 0.0, 3, 0)]) == [40]


def test_the_frequencies_are_the_softmax(kernels):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    rows = [(1.0, 0, 1.0, 0.0, seed, 5) for seed in range(20000)]
    counts = np.bincount(draw(kernels, logits.expand(20000, 4), rows), minlength=4) / 20000
    np.testing.assert_allclose(counts, logits.softmax(0).numpy(), atol=0.015)


def test_a_row_is_the_same_in_every_batch_and_differs_by_position(kernels):
    logits = torch.randn(6, 1000)
    rows = [(0.0, 0, 1.0, 0.0, 1, 1), *((1.0, 50, 0.9, 0.0, 99 + i, i) for i in range(5))]
    together = draw(kernels, logits, rows)
    assert together == [draw(kernels, logits[i : i + 1], [rows[i]])[0] for i in range(6)]
    assert len({draw(kernels, logits[:1], [(1.0, 0, 1.0, 0.0, 5, p)])[0] for p in range(20)}) > 5


def test_a_draw_of_exactly_one_is_not_a_certain_win(kernels):
    """float32 rounds the largest uniform up to 1, whose noise would be infinite: find such a token and outvote it."""
    size = 1 << 16
    seed, index = next(
        (s, int(u.argmax())) for s in range(2000) if (u := uniform(s, 0, size)).max() == np.float32(1 - 2**-24)
    )
    logits = torch.zeros(size)
    logits[(index + 1) % size] = 40.0
    assert draw(kernels, logits[None], [(1.0, 0, 1.0, 0.0, seed, 0)]) == [(index + 1) % size]


def test_rows_of_a_strided_batch_and_non_finite_logits(kernels):
    wide = torch.randn(4, 3000)
    rows = [(0.0, 0, 1.0, 0.0, 0, 0)] * 4
    assert draw(kernels, wide[:, :1000], rows) == wide[:, :1000].argmax(-1).tolist()
    wide[1, 77] = float("nan")
    wide[2, 5] = float("inf")
    wide[3] = float("-inf")
    wide[3, 8] = 0.0
    for temperature in (0.0, 1.0):
        assert draw(kernels, wide, [(temperature, 0, 0.9, 0.1, 0, 0)] * 4)[1:] == [77, 5, 8]
