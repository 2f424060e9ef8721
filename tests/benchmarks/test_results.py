"""Statistics, pairing, and the JSON schema's round trip."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.artifacts.errors import UsageError
from ingot.benchmarks.results import Limits, Matmul, Report, Series, pairwise

RATES = st.lists(st.floats(0.01, 1e5), min_size=1, max_size=12)


@given(RATES)
def test_series_keep_their_statistics(samples: list[float]) -> None:
    series = Series("ingot", "tg128", "tok/s")
    for sample in samples:
        series.add(sample)
    assert series.samples == samples
    assert series.mean == pytest.approx(sum(samples) / len(samples))
    assert series.median == statistics.median(samples)
    variance = sum((s - series.mean) ** 2 for s in samples) / max(len(samples) - 1, 1)
    assert series.sd == pytest.approx(variance**0.5, rel=1e-6, abs=1e-6)
    assert min(samples) <= series.median <= series.best == max(samples)


def test_the_best_time_is_the_shortest_and_an_empty_series_has_none() -> None:
    series = Series("ingot", "start", "s")
    assert series.best == 0.0
    for sample in (3.0, 1.0, 2.0):
        series.add(sample)
    assert series.best == 1.0


def filled(unit: str, samples: list[float]) -> Series:
    series = Series("x", "tg8", unit)
    for sample in samples:
        series.add(sample)
    return series


def test_ratios_are_taken_pair_by_pair() -> None:
    # The medians' ratio would be 40 / 10 = 4; pairs see the slow second round on both sides.
    ratio = pairwise(filled("tok/s", [40.0, 10.0, 60.0]), filled("tok/s", [10.0, 2.0, 20.0]))
    assert ratio.samples == [4.0, 5.0, 3.0]
    assert ratio.median == 4.0
    # Less time is better; a round that only one side finished has no partner.
    assert pairwise(filled("s", [1.0, 2.0, 9.0]), filled("s", [3.0, 8.0])).samples == [3.0, 4.0]


@given(RATES, st.floats(0.5, 2.0))
def test_a_drift_of_both_sides_leaves_the_ratio(samples: list[float], drift: float) -> None:
    peer = [2 * s for s in samples]
    drifting = [s * drift**i for i, s in enumerate(samples)], [p * drift**i for i, p in enumerate(peer)]
    assert pairwise(filled("tok/s", drifting[0]), filled("tok/s", drifting[1])).samples == pytest.approx(
        [0.5] * len(peer)
    )


def test_round_trip(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    report.write(file)
    assert Report.from_json(file.read_bytes(), "result.json") == report
    assert [p.name for p in file.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(schema_version=3), "schema_version"),
        (lambda d: d.pop("machine"), "machine"),
        (lambda d: d["models"][0]["series"][0].update(samples=["fast"]), r"models\[0\]\.series\[0\]\.samples\[0\]"),
        (lambda d: d["models"][0]["series"][0].update(unit="furlongs"), r"models\[0\]\.series\[0\]\.unit"),
        (lambda d: d.update(surprise=1), "surprise"),
    ],
)
def test_what_is_no_report_is_refused_by_field(report: Report, change: object, field: str) -> None:
    data = json.loads(report.to_json())
    change(data)  # type: ignore[operator]
    with pytest.raises(UsageError, match=field):
        Report.from_json(json.dumps(data), "x.json")


def test_steps_bytes_and_operations_follow_from_the_rate() -> None:
    decode = Series("ingot", "tg128 @ d1024 b8", "tok/s", 8, read_bytes=2 * 10**9)
    prefill = Series("ingot", "pp512", "tok/s", 512, flops=10**12)
    for rate in (800.0, 700.0, 900.0):
        decode.add(rate)
        prefill.add(64 * rate)
    assert decode.steps_per_second == 100
    assert decode.gb_s == 200
    assert prefill.steps_per_second == 100
    assert prefill.tflop_s == 100
    assert Series("ingot", "start", "s").steps_per_second == 0


def test_the_matmul_rate_is_the_best_one_and_the_cache_that_of_the_device(report: Report) -> None:
    assert report.limits("cpu") == Limits(8.0, 0.0, 32 << 20)
    report.add_matmuls([Matmul("a", 700.0), Matmul("b", 780.0)])
    report.machine.gpu_l2_bytes = 50 << 20
    assert report.limits("cuda") == Limits(8.0, 780.0, 50 << 20)


def test_the_ceiling_is_the_best_of_all_passes(report: Report) -> None:
    assert report.read_gb_s == 8.0
    report.add_reads([])
    assert report.read_gb_s == 8.0
