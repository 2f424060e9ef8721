"""The HTML pages: whole, self-contained, escaped, and with the numbers of the JSON beside them."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.artifacts.manifest import Manifest
from ingot.compiler.accuracy_facts import rows as accuracy_rows
from ingot.compiler.compare import Comparison, Row
from ingot.compiler.console import printable, size_text
from ingot.compiler.html import charts
from ingot.compiler.html.compare_page import render_comparison
from ingot.compiler.html.report import render_report, report_facts, seconds_text
from ingot.compiler.traffic import Traffic

from ..conftest import Demo

GOLDEN = Path(__file__).parents[1] / "golden" / "manifest-v2.json"
HOSTILE = "</style></title><script>alert('x')</script><img src=x onerror=\"alert(1)\">{{ 7 * 7 }}&amp;'\"\x00\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}
ACCURACY: dict[str, Any] = {
    "scheme": "W4A16 g32 gptq", "reference": "transformers eager float32", "text": "held_out.txt", "positions": 2048,
    "windows": 5, "window": 512, "engines": ["prefill-c64", "decode-b4"],
    "engine": {
        "tokens": 2048, "mean_kl": 0.0123, "mean_kl_error": 0.0004, "median_kl": 1e-3, "p99_kl": 0.2, "p999_kl": 0.5,
        "max_kl": 0.75, "top1": 0.9512, "top1_error": 0.0048, "perplexity": 4.4, "reference_perplexity": 4.3,
        "perplexity_ratio": 1.0233, "perplexity_ratio_error": 0.0021, "rms_delta_p": 0.021, "rms_delta_p_error": 0.001,
        "finite": True,
    },
    "eager": {"dtype": "bfloat16", "mean_kl": 0.00031, "top1": 0.991},
    "kl_by_position": [{"from": 64, "to": 120, "count": 900, "mean_kl": 0.01}, {"from": 120, "to": 176, "count": 900,
                                                                            "mean_kl": 0.02}],
}  # fmt: skip
TIMES: dict[str, Any] = {
    "stage_s": {"trace and passes": 5.4, "engines": 133.2, "gate": 0.29},
    "speed": {"prefill": 12288.0, "decode": 5687.3, "prompt": 64, "tokens": 32},
}  # fmt: skip


def provenance(times: dict[str, Any] = TIMES, builder: str = "urn:ingot:host:builder-7") -> dict[str, Any]:
    """A build's statement, as far as a page reads it."""
    metadata = {"startedOn": "2026-01-02T03:04:05+00:00", "ingot_python": "3.11.7"}
    run = {"builder": {"id": builder}, "metadata": metadata, "byproducts": [{"name": "times", "annotations": times}]}
    return {"predicate": {"runDetails": run}}


class Page(HTMLParser):
    """Checks that tags nest, and keeps text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f"{data}\n"


def check_page(html: str) -> Page:
    """Parse a page, and see that it is whole, loads nothing and runs nothing."""
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert {"html", "head", "title", "style", "body", "main", "footer"} <= tags
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "image", "use"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert not {"src", "href", "srcset", "xlink:href", "action", "data"} & attributes.keys(), tag
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "http:" not in html and "https:" not in html
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    return page


def facts(manifest: Manifest | None = None, **changes: Any) -> dict[str, Any]:
    """The facts of the golden manifest with a lossy build's reports."""
    kernels = {"decode-b1": [{"label": "fused_linear 3072x2048 norm", "launches": 16, "read_bytes": 201_300_000}]}
    reports = {"provenance": provenance(), "accuracy": ACCURACY, "traffic": Traffic(3_000_000, 128, 500_000)}
    return report_facts(manifest or golden(), **{**reports, "kernels": kernels, **changes})


def golden() -> Manifest:
    manifest = Manifest.from_json(GOLDEN.read_text())
    task = {"exact_match": 0.975, "items": 200, "reference_exact_match": 0.985}
    record = {
        "engine": manifest.engines[0].name, "name": "fuse-rms-norm", "exact": True, "changed": 11, "ops_before": 237,
        "ops_after": 182, "ops_changed": {"aten.mul": -22, "ingot.rms_norm": 11},
        "missed": [{"site": "x", "reason": "the sum is used nowhere else"}] * 3,
    }  # fmt: skip
    lossy = {**record, "name": "quantize", "exact": False, "changed": 21, "missed": [], "ops_before": 182}
    return replace(manifest, gate={**manifest.gate, "task": task}, passes=[record, lossy])


# --- the build's report ----------------------------------------------------------------------------------------------


def test_the_report_is_whole_and_loads_nothing() -> None:
    page = check_page(render_report(facts()))
    for word in ("Accuracy", "Exactness of each engine", "What a decode step reads", "Memory", "Time of the build",
                 "Passes", "Provenance", "Recipe", "Files", "Kernels of decode-b1"):  # fmt: skip
        assert word in page.text, word


def test_its_numbers_are_those_of_the_json() -> None:
    found = facts()
    text = check_page(render_report(found)).text
    lines = {line.strip() for line in text.splitlines()}
    for cells in accuracy_rows(ACCURACY):
        assert set(filter(None, cells)) <= lines, cells
    for stage, seconds in TIMES["stage_s"].items():
        assert stage in lines and seconds_text(seconds) in lines
    manifest = golden()
    for entry in manifest.files:
        assert {entry.path, entry.sha256, size_text(entry.size)} <= lines
    for engine in found["engines"]:
        assert engine["name"] in lines
        assert all(f"{engine['exactness'][key]:.2e}" in lines for key in ("max_relative_error", "mean_kl")
                   if engine["exactness"])  # fmt: skip
    assert {"237", "182", "−22 aten.mul", "+11 ingot.rms_norm", "3 × the sum is used nowhere else"} <= lines
    assert {"5,687", "12,288", "97.5%", "eager: 98.5%", "1.0233", "± 0.0021", "201.3 MB", manifest.digest()} <= lines
    assert json.loads(json.dumps(found)) == found
    assert found["passes"][0] == {
        "name": "fuse-rms-norm", "exact": True, "changed": 11, "ops": [["aten.mul", -22], ["ingot.rms_norm", 11]],
        "misses": [{"reason": "the sum is used nowhere else", "count": 3}],
    }  # fmt: skip


def test_equal_facts_give_equal_pages() -> None:
    assert render_report(facts()) == render_report(facts())


def test_a_lossless_build_has_no_accuracy_section() -> None:
    html = render_report(facts(accuracy=None, kernels={}, provenance={}))
    page = check_page(html)
    assert "<h2>Accuracy" not in html and "lossless" in page.text
    assert "Time of the build" not in page.text and "tok/s" not in page.text and "Kernels of" not in page.text


def test_hostile_names_stay_text() -> None:
    manifest = golden()
    hostile = replace(
        manifest, name=HOSTILE, ingot_version=HOSTILE, model=replace(manifest.model, architecture=HOSTILE),
        toolchain={HOSTILE: HOSTILE}, recipe={HOSTILE: {"prompts": [HOSTILE], "weights_digest": HOSTILE}},
        passes=[{**record, "name": HOSTILE, "ops_changed": {HOSTILE: 1}, "missed": [{"reason": HOSTILE}]}
                for record in manifest.passes],
    )  # fmt: skip
    accuracy = {**ACCURACY, "scheme": HOSTILE, "text": HOSTILE, "engines": [HOSTILE], "eager": {"dtype": HOSTILE}}
    said = provenance({**TIMES, "stage_s": {HOSTILE: 1.0}}, HOSTILE)
    kernels = {manifest.engines[0].name: [{"label": HOSTILE, "launches": 1, "read_bytes": 5}]}
    html = render_report(facts(hostile, accuracy=accuracy, provenance=said, kernels=kernels))
    assert html.count("alert(") >= 8
    page = check_page(html)
    assert "{{ 7 * 7 }}" in page.text
    assert "<script>alert('x')</script>" in page.text
    assert "\\u202e" in page.text and "\u202e" not in html and "\x00" not in html


@given(st.text(max_size=80))
def test_any_name_stays_text(name: str) -> None:
    manifest = replace(golden(), name=name, toolchain={"t": name})
    page = check_page(render_report(facts(manifest)))
    assert re.sub(r"\s+", " ", printable(name)).strip() in re.sub(r"\s+", " ", page.text)


def test_a_build_leaves_its_report(demo: Demo) -> None:
    html = (demo.artifact / "report" / "report.html").read_text("utf-8")
    page = check_page(html)
    manifest = json.loads((demo.artifact / "manifest.json").read_text())
    run = json.loads((demo.artifact / "report" / "provenance.json").read_text())["predicate"]["runDetails"]
    assert all(entry["path"] != "report/report.html" for entry in manifest["files"])
    assert Manifest.from_json((demo.artifact / "manifest.json").read_bytes()).digest() in page.text
    assert run["builder"]["id"] in page.text
    assert run["byproducts"][0]["annotations"]["speed"]["decode"] > 0
    assert {f"{e['mean_kl']:.2e}" for e in manifest["gate"]["engines"].values()} <= set(page.text.split())
    assert len(html) < 200_000


# --- the comparison --------------------------------------------------------------------------------------------------


def row(name: str, scheme: str, kl: float, speed: float) -> Row:
    return Row(name, f"built/{name}", "ab" * 32, scheme, "cpu", 9_000_000, 7_000_000, 8_000_000, [2 * speed], [speed],
               [0.1], 50_000_000, {"mean_kl": kl, "top1": 0.99})  # fmt: skip


def test_the_comparison_is_whole_and_plots_every_artifact() -> None:
    rows = [row("a", "float32", 2e-12, 4536), row("b", "W8A16", 1.3e-4, 5687), row("c", "W4A16 g32 rtn", 0.02, 6100)]
    html = render_comparison(Comparison("LlamaForCausalLM", 256, 64, 5, rows))
    page = check_page(html)
    assert sum(tag == "circle" for tag, _ in page.tags) == 6
    lines = {line.strip() for line in page.text.splitlines()}
    assert {"5,687", "1.30e-04", "2.00e-12", "W4A16 g32 rtn", "≤ 1e-7"} <= lines
    unmeasured = [dataclasses.replace(r, decode=[], prefill=[]) for r in rows]
    page = check_page(render_comparison(Comparison("m", 256, 64, 0, unmeasured)))
    assert "Accuracy against speed" not in page.text and "Accuracy against size" in page.text


def test_hostile_artifacts_stay_text_in_the_comparison() -> None:
    rows = [row(HOSTILE, HOSTILE, 1e-3, 10), dataclasses.replace(row("b", "x", 1e-2, 20), notes=[HOSTILE])]
    page = check_page(render_comparison(Comparison(HOSTILE, 5, 3, 1, rows)))
    assert "<script>alert('x')</script>" in page.text


# --- geometry --------------------------------------------------------------------------------------------------------


@given(st.floats(1e-9, 1e9), st.floats(1e-3, 1e3), st.booleans(), st.integers(2, 9))
def test_ticks_are_round_and_cover(size: float, factor: float, from_zero: bool, count: int) -> None:
    low, span = (0.0, size) if from_zero else (size, size * factor)
    found = charts.ticks(low, low + span, count)
    step = found[1] - found[0]
    assert found[0] <= low + step * 1e-6 and found[-1] >= low + span - step * 1e-6
    assert len(found) <= count + 3


@given(st.floats(1e-12, 1e3), st.floats(1, 1e9))
def test_decades_cover(low: float, factor: float) -> None:
    found = charts.decades(low, low * factor)
    assert found[0] <= low * (1 + 1e-8) and found[-1] >= low * factor * (1 - 1e-8)
    assert len(found) >= 2


POINT = st.tuples(st.text("abcdefgh", min_size=1, max_size=12), st.floats(1, 1e4), st.floats(1e-7, 1))


@given(st.lists(POINT, min_size=1, max_size=12))
def test_points_lie_inside_and_in_order(points: list[tuple[str, float, float]]) -> None:
    chart = charts.scatter(points, "x", "y", str, str)
    for drawn in chart.points:
        assert chart.left <= drawn["x"] <= chart.right and chart.top <= drawn["y"] <= chart.bottom
    for (_, x1, y1), a in zip(points, chart.points):
        for (_, x2, y2), b in zip(points, chart.points):
            assert not (x1 < x2 and a["x"] > b["x"]) and not (y1 < y2 and a["y"] < b["y"])


def test_the_front_joins_what_nothing_beats() -> None:
    points = [("slow and bad", 1.0, 1e-2), ("fast and bad", 9.0, 1e-1), ("slow and good", 2.0, 1e-5)]
    front = charts.scatter(points, "x", "y", str, str).front
    assert front.count("L") == 1
    assert charts.scatter(points[:1], "x", "y", str, str).front == ""


def test_a_waterfall_fills_its_track() -> None:
    bars = charts.waterfall([("a", 1.0), ("b", 3.0), ("c", 0.0)], seconds_text)
    assert [(b["start"], b["share"]) for b in bars] == [(0, 25), (25, 75), (100, 0)]
    assert charts.waterfall([], seconds_text) == []


@pytest.mark.parametrize(("value", "said"), [(0.02, "0.02 s"), (33.21, "33.2 s"), (250.4, "4 min 10 s")])
def test_seconds_in_words(value: float, said: str) -> None:
    assert seconds_text(value) == said
