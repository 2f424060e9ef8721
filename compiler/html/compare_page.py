"""The page of `ingot compare --html`: the table, and a plot of what an artifact costs in accuracy against its speed."""

from __future__ import annotations

from typing import Any

from .. import compare
from ..compare import Comparison
from ..console import size_text
from . import charts
from .page import render

_FLOOR = 1e-7  # a lossless artifact's KL is rounding; on a logarithmic axis it needs a place


def render_comparison(result: Comparison) -> str:
    """One self-contained HTML file."""
    columns, rows = compare.table(result)
    speed = f"speed measured over {result.rounds} rounds" if result.rounds else "speed not measured"
    return render(
        "compare.html.jinja",
        mark="Ingot comparison",
        title=f"{len(result.rows)} artifacts of {result.model}",
        lead=f"{', '.join(dict.fromkeys(row.scheme for row in result.rows))}; {speed}",
        columns=columns,
        rows=rows,
        numeric=tuple(range(2, len(columns))),
        notes=compare.notes(result),
        plots=_plots(result),
        digests=[(row.name, row.path, row.digest) for row in result.rows],
    )


def _plots(result: Comparison) -> list[dict[str, Any]]:
    """KL against speed where both are known, and against size."""
    found = []
    lossy = [(row, max(row.accuracy["mean_kl"], _FLOOR)) for row in result.rows if "mean_kl" in row.accuracy]
    schemes = [row.scheme for row in result.rows]
    unique = len(set(schemes)) == len(schemes)

    def label(row: compare.Row) -> str:
        return row.scheme if unique else row.name if row.scheme in row.name else f"{row.name} · {row.scheme}"

    fast = [(label(row), compare.median(row.decode) or 0.0, kl) for row, kl in lossy if row.decode]
    if len(fast) > 1:
        chart = charts.scatter(
            fast, "tokens/s, decode, batch 1", "mean KL divergence from float32, nats (lower is closer)",
            lambda x: f"{x:,.0f}", _power,
        )  # fmt: skip
        found.append({"title": "Accuracy against speed", "chart": chart,
                      "says": "Right and low is better; the line joins what nothing else beats."})  # fmt: skip
    small = [(label(row), float(row.weights_bytes), kl) for row, kl in lossy]
    if len(small) > 1:
        chart = charts.scatter(
            small, "weights", "mean KL divergence from float32, nats", size_text, _power, front=False
        )
        found.append({"title": "Accuracy against size", "chart": chart, "says": "Left and low is better."})
    return found


def _power(value: float) -> str:
    return ("≤ " if value <= _FLOOR else "") + f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
