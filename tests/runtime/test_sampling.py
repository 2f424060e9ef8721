"""The sampler against naive oracles, against softmax in the long run, and against its own random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.runtime.params import SamplingParams
from ingot.runtime.sampling import Penalties, graph_parameters, gumbel, sample_row, top_logprobs, wrap_seed


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z.astype(np.float64) - z.max())
    return p / p.sum()


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be sampled, by sorting and in float64: min-p, then top-k, then top-p."""
    z = logits.astype(np.float64) / temperature
    kept = [i for i in range(len(z)) if min_p == 0 or softmax(z)[i] >= min_p * softmax(z).max()]
    if 0 < top_k < len(z):
        threshold = sorted((z[i] for i in kept), reverse=True)[:top_k][-1]
        kept = [i for i in kept if z[i] >= threshold]
    p = dict(zip(kept, softmax(z[kept]), strict=True))
    mass, threshold = 0.0, math.inf
    for i in sorted(kept, key=lambda i: -p[i]):
        if mass >= top_p:
            break
        mass, threshold = mass + p[i], p[i]
    return {i for i in kept if p[i] >= threshold}


# Logits on a coarse grid: ties are common, and no two that differ are close enough for rounding to matter.
grid = st.lists(st.integers(-12, 12).map(lambda i: i / 2), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(
    grid, st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 13), st.sampled_from([1.0, 0.913, 0.517, 0.1, 1e-9]),
    st.sampled_from([0.0, 0.013, 0.271, 1.0]),
)  # fmt: skip
def test_cuts_keep_what_the_naive_cuts_keep(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(values, np.float32)
    allowed = kept_tokens(logits, temperature, top_k, top_p, min_p)
    seen = {sample_row(logits, temperature, top_k, top_p, min_p, seed, 0) for seed in range(300)}
    assert seen <= allowed
    p = softmax(logits[sorted(allowed)] / temperature)
    likely = {token for token, chance in zip(sorted(allowed), p, strict=True) if chance > 0.1}
    assert likely <= seen


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_samples_follow_the_softmax(temperature: float) -> None:
    logits = np.array([1.2, -0.3, 0.0, 2.0, -1.5, 0.4], np.float32)
    count = 20_000
    found = np.zeros(len(logits))
    for i in range(count):
        found[sample_row(logits, temperature, 0, 1.0, 0.0, i % 200, i // 200)] += 1
    expected = softmax(logits / temperature) * count
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # the 0.1 % point for 5 degrees of freedom


def reference_gumbel(seed: int, position: int, index: int) -> float:
    """The contract's formula on Python integers and float64."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    h = mix((seed + 0x9E3779B9) % 2**32)
    h = mix(h ^ (seed >> 32) % 2**32)
    h = mix(h ^ position % 2**32)
    r = mix(h ^ index * 0x9E3779B9 % 2**32)
    return -math.log(-math.log(((r >> 8) + 0.5) / 2**24))


@given(
    st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.lists(st.integers(0, 300_000), min_size=1, max_size=9)
)
def test_noise_is_the_counter_based_hash(seed: int, position: int, index: list[int]) -> None:
    expected = [reference_gumbel(seed, position, i) for i in index]
    np.testing.assert_allclose(gumbel(seed, position, np.array(index, np.uint32)), expected, rtol=1e-4, atol=1e-6)


def test_noise_is_finite_for_every_hash() -> None:
    # There are 2^24 different values: 48 million draws meet the largest, which float32 rounds to 1, about three times.
    index = np.arange(4_000_000, dtype=np.uint32)
    noise = [gumbel(seed, 0, index) for seed in range(12)]
    assert all(np.isfinite(values).all() for values in noise)
    assert max(values.max() for values in noise) > 16.6, "the largest value did not come up: the test shows nothing"


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.array([0, 3, 1, 3], np.float32)
    assert sample_row(logits, 0.0, 0, 1.0, 0.0, 5, 5) == 1
    assert graph_parameters(SamplingParams(temperature=1e-9, top_k=5), 4) == (0.0, 0, 1.0, 0.0)


def test_parameters_for_the_graph_are_within_float32() -> None:
    temperature, top_k, top_p, min_p = graph_parameters(SamplingParams(top_p=1e-300, top_k=-1, min_p=1e-300), 4)
    assert np.float32(top_p) > 0 and top_k == 0
    assert sample_row(np.array([0, 9, 1], np.float32), temperature, top_k, top_p, min_p, 1, 1) == 1


@given(st.integers())
def test_seeds_wrap_to_signed_64_bits(seed: int) -> None:
    wrapped = wrap_seed(seed)
    assert -(2**63) <= wrapped < 2**63 and (wrapped - seed) % 2**64 == 0


def test_penalties_follow_hf_and_openai() -> None:
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    penalties = Penalties(params, [0, 1], 5)
    for token in (1, 2, 2):
        penalties.add(token)
    logits = np.array([4, -4, 4, 4, -4], np.float32)
    penalties.apply(logits)
    # 0: prompt only; 1: prompt and once in the output; 2: twice in the output; 3 and 4: never.
    assert logits.tolist() == [2, -8 - 0.5 - 0.25, 2 - 1 - 0.25, 4, -4]


@given(grid, st.integers(0, 20), st.data())
def test_logprobs_are_the_log_softmax_of_the_raw_logits(values: list[float], count: int, data: st.DataObject) -> None:
    logits = np.array(values, np.float32)
    token = data.draw(st.integers(0, len(values) - 1))
    expected = np.log(softmax(logits))
    found = top_logprobs(logits, token, count)
    assert next(iter(found)) == token
    assert len(found) in (min(count, len(values)), min(count, len(values)) + 1)
    for index, entry in found.items():
        assert entry.logprob == pytest.approx(expected[index], abs=1e-5)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert set(found) == {token, *order}
    assert found[token].rank == 1 + sum(value > values[token] for value in values)
