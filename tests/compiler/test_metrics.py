"""The measures of accuracy against their formulas, written out one position at a time as llama.cpp's tool has them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler import metrics
from ingot.compiler.metrics import Fidelity, FidelityMeter


def measured(reference: np.ndarray, other: np.ndarray, following: list[int]) -> Fidelity:
    meter = FidelityMeter()
    meter.add(reference, other, following)
    return meter.result()


def logits(seed: int, positions: int = 60, vocabulary: int = 23, noise: float = 0.3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(positions, vocabulary)).astype(np.float32) * 3
    other = reference + rng.normal(size=reference.shape).astype(np.float32) * noise
    return reference, other, rng.integers(0, vocabulary, positions)


def softmax(row: np.ndarray) -> list[float]:
    top = max(map(float, row))
    weights = [math.exp(float(v) - top) for v in row]
    return [w / sum(weights) for w in weights]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """llama.cpp's mean_and_uncertainty."""
    count = len(values)
    mean = sum(values) / count
    return mean, math.sqrt((sum(v * v for v in values) / count - mean * mean) / (count - 1))


def percentile(values: list[float], fraction: float) -> float:
    """llama.cpp's percentile."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    rest = place - low
    return (1 - rest) * ordered[low] + rest * ordered[min(low + 1, len(ordered) - 1)]


def test_every_figure_is_its_formula() -> None:
    reference, other, following = logits(1)
    found = measured(reference, other, following.tolist())
    kls, same, nll, nll_base, squares = [], [], [], [], []
    for want, have, token in zip(reference, other, following):
        p, q = softmax(want), softmax(have)
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
        same.append(float(p.index(max(p)) == q.index(max(q))))
        nll.append(-math.log(q[token]))
        nll_base.append(-math.log(p[token]))
        squares.append((q[token] - p[token]) ** 2)
    kl, kl_error = mean_and_error(kls)
    top1 = sum(same) / len(same)
    ln, ln_error = mean_and_error(nll)
    base, base_error = mean_and_error(nll_base)
    covariance = (sum(a * b for a, b in zip(nll, nll_base)) / len(nll) - ln * base) / (len(nll) - 1)
    ratio = math.exp(ln - base)
    square, square_error = mean_and_error(squares)
    wanted = {
        "tokens": 60, "mean_kl": kl, "mean_kl_error": kl_error, "median_kl": percentile(kls, 0.5),
        "p99_kl": percentile(kls, 0.99), "p999_kl": percentile(kls, 0.999), "max_kl": max(kls), "top1": top1,
        "top1_error": math.sqrt(top1 * (1 - top1) / 59), "perplexity": math.exp(ln),
        "reference_perplexity": math.exp(base), "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * math.sqrt(ln_error**2 + base_error**2 - 2 * covariance),
        "rms_delta_p": math.sqrt(square), "rms_delta_p_error": 0.5 / math.sqrt(square) * square_error, "finite": True,
    }  # fmt: skip
    assert dataclasses.asdict(found) == pytest.approx(wanted, rel=1e-6)


def test_a_model_is_exactly_like_itself() -> None:
    reference, _, following = logits(2)
    found = measured(reference, reference.copy(), following.tolist())
    assert (found.mean_kl, found.max_kl, found.top1, found.perplexity_ratio, found.rms_delta_p) == (0, 0, 1, 1, 0)
    assert (found.mean_kl_error, found.top1_error, found.perplexity_ratio_error, found.rms_delta_p_error) == (0,) * 4


@given(st.integers(0, 1000), st.lists(st.integers(1, 59), max_size=3), st.sampled_from([1, 40, 1 << 20]))
def test_pieces_give_what_the_whole_gives(seed: int, cuts: list[int], block: int) -> None:
    reference, other, following = logits(seed)
    meter = FidelityMeter()
    edges = [0, *sorted(set(cuts)), 60]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK", block)
        for low, high in itertools.pairwise(edges):
            meter.add(reference[low:high], other[low:high], following[low:high].tolist())
    assert dataclasses.asdict(meter.result()) == pytest.approx(
        dataclasses.asdict(measured(reference, other, following.tolist())), rel=1e-9
    )


@given(st.integers(0, 1000), st.floats(0.01, 3), st.floats(-50, 50))
def test_a_constant_on_all_logits_changes_nothing(seed: int, noise: float, shift: float) -> None:
    reference, other, following = logits(seed, noise=noise)
    first = measured(reference, other.astype(np.float64), following.tolist())
    second = measured(reference, other.astype(np.float64) + shift, following.tolist())
    assert dataclasses.asdict(first) == pytest.approx(dataclasses.asdict(second), rel=1e-6, abs=1e-9)
    assert first.mean_kl > 0
    assert first.max_kl >= first.p999_kl >= first.p99_kl >= first.median_kl >= 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_number_that_is_none_is_told(value: float, side: int) -> None:
    reference, other, following = logits(3)
    (reference, other)[side][5, 7] = value
    found = measured(reference, other, following.tolist())
    assert not found.finite
    assert found.max_kl == math.inf
    written = found.to_dict()
    assert written["mean_kl"] is None
    assert written["perplexity_ratio"] is None
    json.dumps(written, allow_nan=False)


def test_shapes_that_differ_are_refused() -> None:
    reference, other, following = logits(4)
    for have, tokens in ((other[:, 1:], following), (other, following[1:])):
        with pytest.raises(ValueError, match="logits of shape"):
            FidelityMeter().add(reference, have, tokens.tolist())
