"""What a report looks like, and what follows from it: ratios, goals, shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from ingot.benchmarks import table
from ingot.benchmarks.goals import bandwidth, judge, summarize, values
from ingot.benchmarks.results import Goal, Model, Report

L3 = 32 << 20


@pytest.fixture
def summary(report: Report) -> Report:
    for model in report.models:
        summarize(model, report.read_gb_s, report.machine.l3_bytes)
    return report


def cells(text: str, *begin: str) -> list[str]:
    """The one row of a table whose first cells are these."""
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    found = [row for row in rows if row[: len(begin)] == list(begin)]
    assert len(found) == 1, (begin, found)
    return found[0]


def test_values_follow_from_the_series(model: Model) -> None:
    found = values(model, 8.0, L3)
    assert bandwidth(model) == pytest.approx(100.5e6 * 40 / 1e9)
    assert found == pytest.approx({
        "tokens_per_second": 40.0, "ms_per_token": 25.0, "read_share": 100.5e6 * 40 / 8e9, "start_s": 0.45,
        "build_s": 12.5, "build_peak_over_checkpoint": 1.5,
    })  # fmt: skip


def test_no_share_for_what_stays_in_the_cache_or_without_a_ceiling(model: Model) -> None:
    assert "read_share" not in values(model, 8.0, 1 << 30)
    assert "read_share" not in values(model, 0.0, L3)


@pytest.mark.parametrize(
    ("relation", "value", "reached"),
    [("<=", 1.0, True), ("<=", 1.1, False), (">=", 1.0, True), (">=", 0.9, False)],
)
def test_goals(relation: str, value: float, reached: bool) -> None:
    goal = judge(Goal("what", relation, 1.0, ""), {"what": value})
    assert (goal.known, goal.value, goal.reached) == (True, value, reached)


def test_a_goal_is_not_judged_without_its_number(summary: Report) -> None:
    by_name = {g.what: g for g in summary.models[0].goals}
    assert (by_name["unheard_of"].known, by_name["unheard_of"].reached) == (False, False)
    assert by_name["tokens_per_second"].reached
    assert not by_name["start_s"].reached


def test_summarizing_twice_changes_nothing(summary: Report) -> None:
    before = summary.to_json()
    summarize(summary.models[0], summary.read_gb_s, summary.machine.l3_bytes)
    assert summary.to_json() == before


def test_speed_rows(summary: Report) -> None:
    text = table.speed_table(summary, summary.models[:1])
    ours = cells(text, "small", "2.0 MB", "1.50 M", "W8A16", "ingot", "tg128")
    assert ours[6:] == ["34.67 ± 12.86", "40.00", "25.000", "100.5", "4.0", "50%", "4.0"]
    peer = cells(text, "small", "3.0 MB", "1.50 M", "bfloat16", "peer", "tg8")
    assert peer[6:] == ["12.33 ± 8.74", "10.00", "100.000", "", "", "", ""]
    assert "× peer" in text.splitlines()[0]


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
    assert cells(text, "small", "decode")[2:] == ["≥ 30 tok/s", "40.0 tok/s", "yes", "somebody"]
    assert cells(text, "small", "start to first token")[2:5] == ["≤ 0.1 s", "0.450 s", "no"]
    assert cells(text, "small", "unheard_of")[3:5] == ["", "not measured"]
    assert "- other: skipped: no | checkpoint" in text
    assert "- small: a note" in text
    assert "interrupted" not in text and "busy" not in text


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
