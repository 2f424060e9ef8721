"""What an artifact's manifest says of its accuracy, for people: read by `inspect`, `compare` and the HTML report.

The gate's report is free form and may come from anywhere: what is missing or of another type is None here.
"""

from __future__ import annotations

import math
from typing import Any

Numbers = dict[str, float]
# Key of the figure, what it is called, how it is written; the standard error's key where it has one.
_ROWS = (
    ("mean_kl", "mean KL", "{:.2e}", "mean_kl_error"),
    ("median_kl", "median KL", "{:.2e}", ""),
    ("p99_kl", "99 % KL", "{:.2e}", ""),
    ("p999_kl", "99.9 % KL", "{:.2e}", ""),
    ("max_kl", "max KL", "{:.2e}", ""),
    ("top1", "top-1 agreement", "{:.2%}", "top1_error"),
    ("perplexity", "perplexity", "{:.4f}", ""),
    ("perplexity_ratio", "perplexity ratio", "{:.5f}", "perplexity_ratio_error"),
    ("rms_delta_p", "RMS Δp", "{:.3%}", "rms_delta_p_error"),
)


def numbers(measured: Any) -> Numbers:
    """The finite numbers of a report's table; booleans are none."""
    items = measured.items() if isinstance(measured, dict) else ()
    return {k: v for k, v in items if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}


def accuracy_of(gate: dict[str, Any]) -> dict[str, Any] | None:
    """The gate's accuracy report if it is one: a table with an `engine` in it."""
    found = gate.get("accuracy")
    return found if isinstance(found, dict) and isinstance(found.get("engine"), dict) else None


def headline(gate: dict[str, Any]) -> Numbers:
    """mean_kl, top1, perplexity_ratio and its error, exact_match: as far as they were measured.

    KL and top-1 of a lossless artifact are those of the gate's tokens, of the worst pair of engines.
    """
    found = numbers((accuracy_of(gate) or {}).get("engine"))
    kept: Numbers = {
        k: found[k] for k in ("mean_kl", "top1", "perplexity_ratio", "perplexity_ratio_error") if k in found
    }
    if not kept:
        pairs = gate.get("pairs")
        every = [numbers(pair) for pair in pairs] if isinstance(pairs, list) else []
        for key, worst in (("mean_kl", max), ("top1", min)):
            values = [pair[key] for pair in every if key in pair]
            kept |= {key: worst(values)} if values else {}
    task = numbers(gate.get("task"))
    return {**kept, **{k: task[k] for k in ("exact_match", "reference_exact_match", "items") if k in task}}


def title(report: dict[str, Any]) -> str:
    """One line: what was measured, against what, on what."""
    scheme, reference, text = (str(report.get(key, "?")) for key in ("scheme", "reference", "text"))
    return f"accuracy of {scheme} against {reference}, {report.get('positions', '?')} tokens of {text}"


def columns(report: dict[str, Any]) -> list[str]:
    """Who was measured: the artifact, and eager transformers in its dtype where that rounds as well."""
    eager = report.get("eager")
    return ["artifact", *([f"eager {eager.get('dtype', '?')}"] if isinstance(eager, dict) else [])]


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """(name, figure ± standard error) for each figure that is there, one more for each further column."""
    measured = [numbers(report.get(key)) for key in ("engine", "eager") if isinstance(report.get(key), dict)]
    table = []
    for key, name, form, error in _ROWS:
        cells = [written(found, key, form, error) for found in measured]
        if any(cells):
            table.append((name, *cells))
    return table


def written(found: Numbers, key: str, form: str, error: str = "") -> str:
    """A figure in words, with its standard error where it has one; empty where it was not measured."""
    if key not in found:
        return ""
    return form.format(found[key]) + (f" ± {form.format(found[error])}" if error in found else "")


def task_text(gate: dict[str, Any]) -> str:
    """The task's result in words; empty where there is none."""
    found = numbers(gate.get("task"))
    if "exact_match" not in found:
        return ""
    text = f"{found['exact_match']:.1%} exact" + (f" of {found['items']:.0f}" if "items" in found else "")
    return text + (
        f" (eager float32: {found['reference_exact_match']:.1%})" if "reference_exact_match" in found else ""
    )


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What of the report goes into the manifest."""
    return {key: value for key, value in report.items() if key not in ("kl_by_position", "worst")}
