"""Phases add up, and a process knows when it was started."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ingot.runtime.phases import Phase, Phases, process_start


def test_phases_follow_each_other_without_gaps() -> None:
    phases = Phases(time.perf_counter() - 2)
    phases.mark("before")
    time.sleep(0.01)
    phases.mark("weights", 10**9)
    phases.add("elsewhere", 0.5)
    assert [phase.name for phase in phases.done] == ["before", "weights", "elsewhere"]
    assert phases.done[0].seconds == pytest.approx(2, abs=0.5)
    assert 0.01 <= phases.done[1].seconds < 1
    assert phases.done[2] == Phase("elsewhere", 0.5)
    text = str(phases)
    assert "1.00 GB, " in text and "GB/s" in text
    assert float(text.split()[5]) == pytest.approx(sum(phase.seconds for phase in phases.done), abs=0.001)
    assert phases.as_list()[1]["nbytes"] == 10**9


def test_a_process_knows_its_age() -> None:
    code = (
        "import time; time.sleep(0.3)\nfrom ingot.runtime.phases import *\nprint(time.perf_counter() - process_start())"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.25 <= float(done.stdout) <= time.perf_counter() - start + 0.05


def test_where_the_system_does_not_tell_the_start_is_now(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("1 (odd) name) S 1")
    for stat in (tmp_path / "stat", tmp_path / "none"):
        assert process_start(stat) == pytest.approx(time.perf_counter(), abs=0.1)
