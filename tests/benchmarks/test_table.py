"""What a report looks like, and what follows from it: ratios, goals, shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from ingot.benchmarks import table
from ingot.benchmarks.goals import judge, share, summarize, values
from ingot.benchmarks.results import Goal, Limits, Matmul, Model, Report

LIMITS = Limits(8.0, 0.0, 32 << 20)


@pytest.fixture
def summary(report: Report) -> Report:
    for model in report.models:
        summarize(model, report.limits(model.device))
    return report


def cells(text: str, *begin: str) -> list[str]:
    """The one row of a table whose first cells are these."""
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    found = [row for row in rows if row[: len(begin)] == list(begin)]
    assert len(found) == 1, (begin, found)
    return found[0]


def test_values_follow_from_the_series(model: Model) -> None:
    found = values(model, LIMITS)
    assert model.series[0].gb_s == pytest.approx(100.5e6 * 40 / 1e9)
    assert found == pytest.approx({
        "tokens_per_second": 40.0, "ms_per_token": 25.0, "read_share": 100.5e6 * 40 / 8e9, "start_s": 0.45,
        "build_s": 12.5, "build_peak_over_checkpoint": 1.5,
    })  # fmt: skip


def test_no_share_for_what_stays_in_the_cache_or_without_a_ceiling(model: Model) -> None:
    assert "read_share" not in values(model, Limits(8.0, 0.0, 1 << 30))
    assert "read_share" not in values(model, Limits(0.0, 0.0, 32 << 20))


@pytest.mark.parametrize(
    ("relation", "value", "reached"),
    [("<=", 1.0, True), ("<=", 1.1, False), (">=", 1.0, True), (">=", 0.9, False)],
)
def test_goals(relation: str, value: float, reached: bool) -> None:
    goal = judge(Goal("what", relation, 1.0, ""), {"what": value})
    assert (goal.known, goal.value, goal.reached) == (True, value, reached)


def test_a_second_target_is_judged_by_itself() -> None:
    goal = Goal("what", ">=", 1.0, "", then=2.0)
    assert [judge(goal, {"what": v}).reached_then for v in (0.5, 1.5, 2.5)] == [False, False, True]
    assert not judge(Goal("what", ">=", 1.0, ""), {"what": 3.0}).reached_then
    assert not judge(goal, {}).reached_then


def test_a_goal_is_not_judged_without_its_number(summary: Report) -> None:
    by_name = {g.what: g for g in summary.models[0].goals}
    assert (by_name["unheard_of"].known, by_name["unheard_of"].reached) == (False, False)
    assert by_name["tokens_per_second"].reached
    assert not by_name["start_s"].reached


def test_summarizing_twice_changes_nothing(summary: Report) -> None:
    before = summary.to_json()
    summarize(summary.models[0], summary.limits("cpu"))
    assert summary.to_json() == before


def test_speed_rows(summary: Report) -> None:
    text = table.speed_table(summary, summary.models[:1])
    ours = cells(text, "small", "2.0 MB", "1.50 M", "W8A16", "ingot", "tg128")
    assert ours[6:] == ["34.67 ± 12.86", "40.00", "25.000", "100.5 MB", "4.0 GB", "50%", "4.00"]
    peer = cells(text, "small", "3.0 MB", "1.50 M", "bfloat16", "peer", "tg8")
    assert peer[6:] == ["12.33 ± 8.74", "10.00", "", "", "", "", ""]
    assert "× peer" in text.splitlines()[0]


def test_tests_of_one_kind_are_compared_with_their_like_alone(model: Model) -> None:
    model.series = []
    for engine, rates in (("ingot", (100.0, 800.0)), ("peer", (50.0, 200.0))):
        for (name, batch), rate in zip((("tg128 @ d1024", 1), ("tg128 @ d1024 b8", 8)), rates):
            model.open_series(engine, name, "tok/s", batch, 10**9 * batch).add(rate)
    model.open_series("ingot", "pp512", "tok/s", 512, flops=10**12).add(512 * 50.0)
    model.open_series("ingot", "pp2048", "tok/s", 2048, flops=4 * 10**12).add(2048 * 20.0)
    model.open_series("peer", "pp2048", "tok/s", 2048, flops=4 * 10**12).add(2048 * 10.0)
    model.goals = [
        Goal("read_share", ">=", 0.8, "", "tg128 @ d1024 b8", 0.9),
        Goal("times peer", ">=", 2.0, "", "tg128 @ d1024"),
        Goal("matmul_share", ">=", 0.5, "", "pp2048"),
        Goal("prefill_ms", "<=", 52.0, "", "pp2048"),
    ]
    summarize(model, Limits(1000.0, 100.0, 1 << 20))
    assert {(r.test, r.median) for r in model.ratios} == {
        ("tg128 @ d1024", 2.0), ("tg128 @ d1024 b8", 4.0), ("pp2048", 2.0)
    }  # fmt: skip
    assert [(g.value, g.reached, g.reached_then) for g in model.goals] == [
        (0.8, True, False), (2.0, True, False), (0.8, True, False), (50.0, True, False)
    ]  # fmt: skip


def test_a_share_is_of_the_ceiling_that_binds(model: Model) -> None:
    limits = Limits(1000.0, 100.0, 1 << 20)
    decode = model.open_series("ingot", "tg1", "tok/s", 4, read_bytes=10**9)
    prefill = model.open_series("ingot", "pp8", "tok/s", 8, flops=10**12)
    decode.add(2000.0)
    prefill.add(400.0)
    assert share(decode, limits) == pytest.approx(0.5)
    assert share(prefill, limits) == pytest.approx(0.5)
    assert share(prefill, Limits(1000.0, 0.0, 0)) == 0.0
    assert share(decode, Limits(0.0, 100.0, 0)) == 0.0


def test_every_line_of_a_table_is_equally_long_and_pipes_are_escaped() -> None:
    text = table.markdown(("name", "value"), [["a|b", "1"], ["c", "12345678"]], "lr")
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "a\\|b" in text
    assert text.splitlines()[1].endswith(":|") or text.splitlines()[1].endswith(": |")


def test_the_whole_report(summary: Report) -> None:
    text = table.render(summary)
    assert "Read bandwidth: **8.0 GB/s** (one: 7.0; two: 8.0)" in text
    assert "commit abcdefabcdef (with changes)" in text
    assert "torch 2.13.0" in text and "gone" not in text
    assert cells(text, "small", "ingot", "0.450 ± 0.071")[3:] == ["0.450", "0.400", "", "5.5"]
    assert cells(text, "small", "3.0 MB", "2.0 MB")[3:] == ["2.5 MB", "12.5", "4.5 MB", "1.50", "this run"]
    assert cells(text, "small", "decode")[3:] == ["≥ 30 tok/s", "40.0 tok/s", "yes", "", "", "somebody"]
    assert cells(text, "small", "start to first token")[3:6] == ["≤ 0.1 s", "0.450 s", "no"]
    assert cells(text, "small", "unheard_of")[4:6] == ["", "not measured"]
    assert "- other: skipped: no | checkpoint" in text
    assert "- small: a note" in text
    assert "interrupted" not in text and "busy" not in text


def test_a_gpu_is_named_with_what_it_can_do(report: Report) -> None:
    report.machine.gpu, report.machine.gpu_memory_bytes = "Some GPU", 140 * 10**9
    report.add_matmuls([Matmul("torch", 781.4)])
    report.models[0].goals = [Goal("read_share", ">=", 0.7, "somebody", "tg128", 0.85, 0.72, True, True, False)]
    text = table.render(report)
    assert "Some GPU, 140.00 GB" in text
    assert "Matmul rate: **781 TFLOP/s**" in text
    row = ["tg128", "≥ 70 %", "72 %", "yes", "≥ 85 %", "no", "somebody"]
    assert cells(text, "small", "share of the read bandwidth")[2:] == row


def test_an_interrupted_and_a_disturbed_run_say_so(report: Report) -> None:
    report.interrupted, report.machine.load = True, 3.0
    report.models[0].failed = "boom\n\x1b[31mred"
    text = table.render(report)
    assert "interrupted" in text and "busy" in text
    assert "- small: failed: boom  [31mred" in text


def test_an_empty_report_is_drawn(report: Report) -> None:
    report.models, report.reads, report.read_gb_s = [], [], 0.0
    assert "### Speed" in table.render(report)


def test_the_command_draws_a_file(summary: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    summary.write(file)
    assert table.main([str(file)]) == 0
    assert capsys.readouterr().out == table.render(summary)


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["does-not-exist.json"]])
def test_the_command_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(arguments) == 2
    assert "error:" in capsys.readouterr().err
