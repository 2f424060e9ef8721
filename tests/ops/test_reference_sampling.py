"""The reference sampler: random numbers that hang on seed and position alone, and filters as in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.runtime.ops.reference import gumbel_noise, sample
from torch import Tensor

MASK, GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def unmix(x: int) -> int:
    """The inverse of `mix`."""
    x ^= x >> 16
    x = x * pow(0x846CA68B, -1, 1 << 32) & MASK
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0x7FEB352D, -1, 1 << 32) & MASK
    return x ^ x >> 16


def seed_hash(seed: int) -> int:
    return mix(mix((seed & MASK) + GOLDEN & MASK) ^ (seed >> 32 & MASK))


def plain_gumbel(seed: int, position: int, index: int) -> float:
    """The definition in plain integers; the uniform number is a float32 below 1, the logarithms are exact."""
    r = mix(mix(seed_hash(seed) ^ (position & MASK)) ^ (index * GOLDEN & MASK))
    uniform = min(torch.tensor(((r >> 8) + 0.5) * 2.0**-24, dtype=torch.float32).item(), 1 - 2.0**-24)
    return -math.log(-math.log(uniform))


seeds = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(0, 2**40))
def test_noise_is_its_definition(seed: int, position: int) -> None:
    found = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 40)
    wanted = torch.tensor([[plain_gumbel(seed, position, i) for i in range(40)]])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("bits", "noise"), [(0, -math.log(25 * math.log(2))), (MASK, 24 * math.log(2))])
def test_the_extreme_draws_are_finite(bits: int, noise: float) -> None:
    """float32 rounds the highest draw up to 1, whose noise would be infinite: that token would win whatever its logit.

    The position at which token 3 draws these bits is found by running the hash backwards.
    """
    assert unmix(mix(12345)) == 12345
    seed, index = 7, 3
    position = unmix(unmix(bits) ^ (index * GOLDEN & MASK)) ^ seed_hash(seed)
    found = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 8)
    assert torch.isfinite(found).all()
    assert found[0, index].item() == pytest.approx(noise, rel=1e-5)
    assert found[0].argmax() == index if bits else found[0].argmin() == index
    if bits:
        logits = torch.zeros(1, 8)
        logits[0, 5], logits[0, index] = 60.0, -60.0
        one = torch.ones(1)
        token = sample(logits, one, one.int() * 0, one, one * 0, torch.tensor([seed]), torch.tensor([position]))
        assert token.item() == 5


def test_noise_has_a_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov distance, mean and variance of 2^18 numbers."""
    noise = gumbel_noise(torch.arange(64), torch.arange(64) * 7, 4096).flatten().double()
    count = len(noise)
    cdf = torch.exp(-torch.exp(-noise.sort().values))
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (cdf - steps).abs().max() < 1.63 / math.sqrt(count)  # the 1 % level
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / count)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    assert torch.isfinite(noise).all()


@pytest.mark.parametrize("what", ["seed", "high bits of the seed", "position", "index"])
def test_neighbours_are_uncorrelated(what: str) -> None:
    seed, position, shift = torch.arange(256), torch.full((256,), 5), 0
    one = gumbel_noise(seed, position, 512)
    if what == "seed":
        other = gumbel_noise(seed + 1, position, 512)
    elif what == "high bits of the seed":
        other = gumbel_noise(seed + (1 << 32), position, 512)
    elif what == "position":
        other = gumbel_noise(seed, position + 1, 512)
    else:
        other, shift = one, 1
    a, b = one[:, shift:].flatten().double(), other[:, : 512 - shift].flatten().double()
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(a))
    assert not torch.equal(a, b)


def draw(logits: list[float], count: int, **knobs: Any) -> list[int]:
    """Tokens of `count` rows that differ in their seed alone."""
    return run(torch.tensor([logits] * count), torch.arange(count), torch.zeros(count, dtype=torch.int64), **knobs)


def run(
    logits: Tensor, seed: Tensor, position: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0,
) -> list[int]:  # fmt: skip
    rows = len(logits)
    knob = lambda value: torch.full((rows,), value, dtype=torch.float32)  # noqa: E731
    k = torch.full((rows,), top_k, dtype=torch.int32)
    found = sample(logits, knob(temperature), k, knob(top_p), knob(min_p), seed, position)
    assert found.dtype == torch.int64
    return found.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """Chi-squared over 20 000 draws, seven tokens: 22.46 is the 0.1 % level of six degrees of freedom."""
    logits = [2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5]
    tokens = draw(logits, 20_000, temperature=temperature)
    wanted = (torch.tensor(logits) / temperature).softmax(0) * 20_000
    found = torch.bincount(torch.tensor(tokens), minlength=7)
    assert ((found - wanted) ** 2 / wanted).sum() < 22.46


def naive(
    logits: list[float], seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """The sampler in plain Python over float32 values."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    z = (torch.tensor(logits) / torch.tensor(temperature)).tolist()
    kept = list(range(len(z)))
    if min_p > 0:
        kept = [i for i in kept if z[i] >= max(z) + math.log(min_p) - 1e-6]
    if 0 < top_k < len(z):
        threshold = sorted((z[i] for i in kept), reverse=True)[:top_k][-1]
        kept = [i for i in kept if z[i] >= threshold]
    if top_p < 1:
        total = sum(math.exp(z[i] - max(z)) for i in kept)
        mass, threshold = 0.0, math.inf
        for value in sorted((z[i] for i in kept), reverse=True):
            if mass >= top_p and threshold < math.inf:
                break
            threshold = value
            mass += math.exp(value - max(z)) / total
        kept = [i for i in kept if z[i] >= threshold]
    return max(kept, key=lambda i: (z[i] + plain_gumbel(seed, position, i), -i))


# Quarters, so that ties happen and thresholds are met exactly; knobs whose sums no rounding decides.
logit = st.integers(-12, 12).map(lambda i: i / 4)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(logit, min_size=2, max_size=12), seed=st.integers(0, 2**40), position=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]), top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.017, 0.311, 0.613, 0.917, 1.0]), min_p=st.sampled_from([0.0, 0.011, 0.173, 0.731, 1.0]),
)  # fmt: skip
def test_filters_are_those_of_plain_code(
    logits: list[float], seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    found = run(
        torch.tensor([logits]), torch.tensor([seed]), torch.tensor([position]), temperature, top_k, top_p, min_p
    )
    assert found == [naive(logits, seed, position, temperature, top_k, top_p, min_p)]


LOGITS = [math.log(p) for p in (0.5, 0.25, 0.15, 0.06, 0.04)]


@pytest.mark.parametrize(
    ("knobs", "support"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"top_p": 1e-30}, {0}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.1}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # over the kept ones: 0.5 / 0.75
        ({"top_k": 4, "min_p": 0.4}, {0, 1}),
        ({"temperature": 0.0}, {0}),
    ],
)
def test_the_support_of_each_filter(knobs: dict[str, float], support: set[int]) -> None:
    assert set(draw(LOGITS, 2000, **knobs)) == support


def test_ties_at_a_threshold_all_stay() -> None:
    assert set(draw([1.0, 0.0, 0.0, -9.0], 500, top_k=2)) == {0, 1, 2}
    assert set(draw([0.0, 0.0, 0.0, -9.0], 500, top_p=0.1)) == {0, 1, 2}


def test_greedy_takes_the_first_of_equals() -> None:
    assert draw([1.0, 3.0, 3.0], 3, temperature=0.0) == [1, 1, 1]


def test_a_rows_token_hangs_on_nothing_but_the_row() -> None:
    """Whatever else is in the batch, and however the others sample."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator)
    knobs = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.3, 1.0, 0.0]),
        "top_k": torch.tensor([0, 5, 0, 50, 0, 3], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0, 0.1]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.05, 0.0]),
        "seeds": torch.tensor([1, 2, 3, -4, 2**50, 6]),
        "positions": torch.tensor([0, 10, 20, 3, 4, 5]),
    }
    together = sample(logits, *knobs.values())
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.equal(sample(logits[order], *(k[order] for k in knobs.values())), together[order])
    for row in range(6):
        alone = sample(logits[row : row + 1], *(k[row : row + 1] for k in knobs.values()))
        assert alone.item() == together[row].item()
