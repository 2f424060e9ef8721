"""Geometry of the reports' charts: from numbers to coordinates and words. The templates draw and escape.

Charts are SVG of one width; they scale with the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HALF, HEIGHT = 760, 470, 330  # a chart over the whole page, and one beside a table
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 34, 52
_LINE = 16  # height of a label
_LETTER = 7.2  # mean width of a letter of one


@dataclass(frozen=True)
class Chart:
    """The plot's frame with its ticks (place, word), and what is drawn in it."""

    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    front: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from at or below `low` to at or above `high`, both positive."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**i for i in range(first, max(last, first + 1) + 1)]


def scatter(
    points: Sequence[tuple[str, float, float]],
    x_title: str,
    y_title: str,
    x_word: Callable[[float], str],
    y_word: Callable[[float], str],
    front: bool = True,
) -> Chart:
    """Labelled points (label, x, y > 0) over a logarithmic y.

    `front` draws a line through those that no other beats, where more x and less y is better.
    """
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    x_ticks = ticks(min(0.0, *xs), max(xs))
    y_ticks = decades(min(ys), max(ys))
    place_x = _scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    scale = _scale(math.log10(y_ticks[0]), math.log10(y_ticks[-1]), HEIGHT - _BOTTOM, _TOP)

    def place_y(y: float) -> float:
        return scale(math.log10(y))

    drawn = []
    for label, x, y in points:
        at = {"x": round(place_x(x), 1), "y": round(place_y(y), 1), "label": label}
        drawn.append({**at, "title": f"{label}: {x_word(x)} {x_title}, {y_word(y)} {y_title}"})
    _place_labels(drawn)
    best = sorted((p for p in points if not any(_beats(q, p) for q in points)), key=lambda p: p[1])
    path = " ".join(f"{'L' if i else 'M'}{place_x(x):.1f} {place_y(y):.1f}" for i, (_, x, y) in enumerate(best))
    return Chart(
        x_title,
        y_title,
        [(round(place_x(x), 1), x_word(x)) for x in x_ticks],
        [(round(place_y(y), 1), y_word(y)) for y in y_ticks],
        points=drawn,
        front=path if front and len(best) > 1 else "",
    )


def columns(
    values: Sequence[tuple[str, float]],
    x_title: str,
    y_title: str,
    word: Callable[[float], str],
    kinds: Sequence[str] = (),
) -> Chart:
    """One column per (label, value at least 0), half as wide as the page."""
    y_ticks = ticks(0.0, max((v for _, v in values), default=1.0) or 1.0, 4)
    place = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    room = (HALF - _LEFT) / max(len(values), 1)
    bars = []
    for index, (label, value) in enumerate(values):
        top = place(value)
        bars.append({
            "x": round(_LEFT + room * (index + 0.16), 1), "width": round(room * 0.68, 1), "y": round(top, 1),
            "height": round(HEIGHT - _BOTTOM - top, 1), "middle": round(_LEFT + room * (index + 0.5), 1),
            "label": label, "value": word(value), "title": f"{label}: {word(value)}",
            "kind": kinds[index] if kinds else "",
        })  # fmt: skip
    return Chart(
        x_title, y_title, [], [(round(place(y), 1), word(y)) for y in y_ticks], bars=bars, width=HALF, right=HALF,
    )  # fmt: skip


def shares(items: Sequence[tuple[str, float]], word: Callable[[float], str]) -> list[dict[str, Any]]:
    """Parts of a whole for a stacked bar, each (name, size) with its share in percent."""
    total = sum(size for _, size in items) or 1.0
    kinds = ("a", "b", "c")
    return [
        {"name": name, "value": word(size), "share": round(100 * size / total, 3), "kind": kinds[i % 3]}
        for i, (name, size) in enumerate(items)
    ]


def bars(items: Sequence[tuple[str, float]], word: Callable[[float], str], kind: str = "") -> list[dict[str, Any]]:
    """Horizontal bars from zero, each (name, size), the longest over the whole track."""
    longest = max((size for _, size in items), default=0.0) or 1.0
    return [
        {"name": name, "value": word(size), "start": 0, "share": round(100 * size / longest, 3), "kind": kind}
        for name, size in items
    ]


def waterfall(items: Sequence[tuple[str, float]], word: Callable[[float], str]) -> list[dict[str, Any]]:
    """Horizontal bars that follow each other, each (name, duration)."""
    total = sum(size for _, size in items) or 1.0
    found, start = [], 0.0
    for name, size in items:
        found.append({
            "name": name, "value": word(size), "start": round(100 * start / total, 3),
            "share": round(100 * size / total, 3), "kind": "",
        })  # fmt: skip
        start += size
    return found


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    return lambda value: first + (last - first) * (value - low) / ((high - low) or 1.0)


def _beats(one: tuple[str, float, float], other: tuple[str, float, float]) -> bool:
    return one[1] >= other[1] and one[2] <= other[2] and one[1:] != other[1:]


def _place_labels(points: list[dict[str, Any]]) -> None:
    """Beside each point, on the left where the right has no room, moved up or down until no two overlap.

    Labels keep the order of their points from top to bottom, so that those of a cluster can be told apart.
    """
    dots = [(p["x"] - 7, p["x"] + 7, p["y"] + 4) for p in points]
    labels: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: (p["y"], p["x"])):
        wide = len(point["label"]) * _LETTER
        sides = [(point["x"] + 11, "start"), (point["x"] - 11 - wide, "end")]
        fitting = [side for side in sides if _LEFT <= side[0] <= WIDTH - wide] or sides[:1]
        tries = [(start, point["y"] + 4 + shift * _LINE * 0.45, anchor)
                 for shift in (0, 1, -1, 2, -2, 3, 4, 5, 6) for start, anchor in fitting]  # fmt: skip

        def free(place: tuple[float, float, str], wide: float = wide) -> bool:
            start, y, _ = place
            beside = [other for other in labels if start < other[1] and other[0] < start + wide]
            return all(y - other[2] >= _LINE * 0.85 for other in beside) and not any(
                _overlap(start, start + wide, y, dot) for dot in dots
            )

        start, y, anchor = next((place for place in tries if free(place)), tries[0])
        labels.append((start, start + wide, y))
        point |= {
            "label_x": round(start if anchor == "start" else start + wide, 1), "label_y": round(y, 1), "anchor": anchor,
        }  # fmt: skip


def _overlap(start: float, end: float, y: float, other: tuple[float, float, float]) -> bool:
    return start < other[1] and other[0] < end and abs(y - other[2]) < _LINE * 0.6
