"""`report/report.html`: one page that says what a build made, what it did, how exact that is and what a step reads.

`report_facts` gathers plain data, every number from the manifest and the reports beside it; `render_report` puts it
into words and pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...artifacts.manifest import Manifest
from .. import accuracy_facts
from ..accuracy_facts import numbers
from ..compare import cache_bytes_per_block
from ..console import size_text
from ..traffic import Traffic, decode_engine
from . import charts
from .page import render

_MOST_OPS = 8  # changes of op counts that are named per pass
_MOST_MISSES = 6


def report_facts(
    manifest: Manifest,
    *,
    provenance: Mapping[str, Any],
    accuracy: Mapping[str, Any] | None,
    traffic: Traffic,
    kernels: Mapping[str, Sequence[Mapping[str, str | int]]],
) -> dict[str, Any]:
    """All that the page shows, as plain data.

    Args:
        provenance: the statement of report/provenance.json. accuracy: report/accuracy.json, of a lossy build.
        traffic: bytes that a decode step reads. kernels: by engine, `KernelPlan.summary`; none on the CPU.
    """
    sizes = {entry.path: entry.size for entry in manifest.files}
    cache, run = manifest.kv_cache, provenance.get("predicate", {}).get("runDetails", {})
    times: dict[str, Any] = next((b["annotations"] for b in run.get("byproducts", []) if b["name"] == "times"), {})
    gate = manifest.gate.get("engines", {})
    engines = [
        {
            "name": e.name, "kind": e.kind, "batch": e.batch, "length": e.length, "size_bytes": sizes[e.file],
            "memory_bytes": e.memory_bytes, "exactness": numbers(gate.get(e.name)),
        }
        for e in manifest.engines
    ]  # fmt: skip
    return {
        "name": manifest.name,
        "digest": manifest.digest(),
        "ingot_version": manifest.ingot_version,
        "model": {
            "architecture": manifest.model.architecture, "parameters": manifest.model.parameters,
            "dtype": manifest.model.dtype, "max_length": manifest.model.max_length,
            "vocab_size": manifest.model.vocab_size, "num_layers": manifest.model.num_layers,
        },
        "target": f"{manifest.target.device} {manifest.target.system}-{manifest.target.machine}",
        "isa": list(manifest.target.isa),
        "passed": manifest.gate.get("passed") is True,
        "headline": accuracy_facts.headline(manifest.gate),
        "accuracy": dict(accuracy) if accuracy else None,
        "task": accuracy_facts.task_text(manifest.gate),
        "engines": engines,
        "passes": _passes(manifest.passes),
        "ops": _ops(manifest.passes, decode_engine(manifest).name),
        "decode_engine": decode_engine(manifest).name,
        "kernels": {name: [dict(row) for row in rows] for name, rows in kernels.items()},
        "traffic": {"weights": traffic.weights, "rows": traffic.rows, "cache": traffic.cache},
        "memory": {
            "weights": sum(sizes[path] for path in manifest.weights),
            "engines": max((e.memory_bytes for e in manifest.engines), default=0),
            "cache": cache_bytes_per_block(manifest) * cache.max_blocks,
            "cache_token": cache_bytes_per_block(manifest) // cache.block_size,
            "total_files": sum(sizes.values()),
        },
        "stages": [{"name": name, "seconds": value} for name, value in times.get("stage_s", {}).items()],
        "speed": dict(times.get("speed", {})),
        "provenance": {"builder": run["builder"]["id"], **run["metadata"]} if run else {},
        "toolchain": dict(manifest.toolchain),
        "recipe": manifest.recipe,
        "files": [{"path": e.path, "size": e.size, "sha256": e.sha256} for e in manifest.files],
    }  # fmt: skip


def _passes(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per pass, in order: sites over all engines, op counts' changes in the first, near misses by reason."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        name = record["name"]
        first = name not in found
        entry = found.setdefault(name, {"name": name, "exact": record["exact"], "changed": 0, "ops": [], "misses": []})
        entry["changed"] += record["changed"]
        if first:
            changes = sorted(record["ops_changed"].items(), key=lambda item: (-abs(item[1]), item[0]))
            entry["ops"] = [list(change) for change in changes]
        entry["misses"] += [miss["reason"] for miss in record["missed"]]
    for entry in found.values():
        entry["misses"] = [{"reason": r, "count": n} for r, n in Counter(entry["misses"]).most_common()]
    return list(found.values())


def _ops(records: Sequence[Mapping[str, Any]], engine: str) -> list[dict[str, Any]]:
    """How many ops an engine's graph has: as traced, and after each pass that changed the number."""
    mine = [record for record in records if record["engine"] == engine]
    found = [{"name": "as traced", "ops": mine[0]["ops_before"]}] if mine else []
    return found + [{"name": r["name"], "ops": r["ops_after"]} for r in mine if r["ops_after"] != r["ops_before"]]


def render_report(facts: Mapping[str, Any]) -> str:
    """The page. Deterministic: equal facts give equal bytes."""
    model, accuracy = facts["model"], facts["accuracy"]
    lead = f"{model['architecture']}, {model['parameters']:,} parameters in {model['dtype']}"
    scheme = accuracy["scheme"] if accuracy else "lossless"
    return render(
        "report.html.jinja",
        mark="Ingot build report",
        title=facts["name"],
        lead=f"{lead} · {scheme} · {facts['target']} · up to {model['max_length']:,} tokens",
        passed=facts["passed"],
        tiles=list(_tiles(facts)),
        waterfall=charts.waterfall([(s["name"], s["seconds"]) for s in facts["stages"]], seconds_text),
        total=seconds_text(sum(s["seconds"] for s in facts["stages"])),
        passes=[_pass_words(entry) for entry in facts["passes"]],
        ops=charts.bars([(o["name"], o["ops"]) for o in facts["ops"]], lambda n: f"{n:,.0f}", "b"),
        decode_engine=facts["decode_engine"],
        engines=_engine_table(facts["engines"]),
        accuracy=_accuracy_words(accuracy) if accuracy else None,
        task=facts["task"],
        reads=_reads(facts),
        kernels=_kernels(facts),
        memory=_memory(facts["memory"], model["max_length"]),
        provenance=_provenance(facts),
        recipe=list(_flat(facts["recipe"])),
        files=[(f["path"], size_text(f["size"]), f["sha256"]) for f in facts["files"]],
        digest=facts["digest"],
        version=facts["ingot_version"],
    )


def seconds_text(value: float) -> str:
    """Seconds in words: 0.02 s, 33.2 s, 4 min 10 s."""
    if value >= 120:
        return f"{value // 60:.0f} min {value % 60:.0f} s"
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"


def _tiles(facts: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    found, speed, memory = facts["headline"], facts["speed"], facts["memory"]
    accuracy = numbers(facts["accuracy"]["engine"]) if facts["accuracy"] else {}
    if "decode" in speed:
        yield _tile("decode", f"{_rounded(speed['decode'])}", "tok/s", "batch 1, on the building machine")
    if "prefill" in speed:
        yield _tile("prefill", f"{_rounded(speed['prefill'])}", "tok/s", f"prompt of {speed['prompt']:,} tokens")
    size, unit = size_text(memory["weights"]).split(" ")
    yield _tile("weights", size, unit, f"KV cache {size_text(memory['cache_token'])} a token")
    if len(facts["ops"]) > 1:
        first, last = facts["ops"][0]["ops"], facts["ops"][-1]["ops"]
        yield _tile("ops in a decode step", f"{last:,}", "", f"{first:,} as traced")
    if accuracy:
        yield _tile("mean KL", _short(accuracy["mean_kl"]), "nats", _plus_minus(accuracy, "mean_kl_error", "{:.2g}"))
        yield _tile("top-1", f"{accuracy['top1']:.2%}", "", _plus_minus(accuracy, "top1_error", "{:.2%}"))
        note = _plus_minus(accuracy, "perplexity_ratio_error", "{:.4f}")
        yield _tile("perplexity ratio", f"{accuracy['perplexity_ratio']:.4f}", "", note)
    else:
        errors = [e["exactness"].get("max_relative_error") for e in facts["engines"]]
        if any(errors):
            worst = max(error for error in errors if error is not None)
            yield _tile("largest logit error", f"{worst:.1e}", "", "relative to the logits' range")
    if "exact_match" in found:
        note = f"eager: {found['reference_exact_match']:.1%}" if "reference_exact_match" in found else "exact answers"
        yield _tile("task", f"{found['exact_match']:.1%}", "", note)
    if facts["stages"]:
        total = sum(s["seconds"] for s in facts["stages"])
        time, unit = (f"{total / 60:.1f}", "min") if total >= 120 else (f"{total:.0f}", "s")
        yield _tile("built in", time, unit, "")


def _tile(label: str, value: str, unit: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "unit": unit, "note": note}


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _short(value: float) -> str:
    """Two digits: 0.00013, 1.3e-5."""
    return f"{value:.2g}".replace("e-0", "e-")


def _plus_minus(found: Mapping[str, float], key: str, form: str) -> str:
    return f"± {form.format(found[key])}" if key in found else ""


def _pass_words(entry: Mapping[str, Any]) -> dict[str, Any]:
    ops = [
        {"text": f"{'+' if n > 0 else '−'}{abs(n)} {op}", "kind": "up" if n > 0 else "down"} for op, n in entry["ops"]
    ]
    more = len(ops) - _MOST_OPS
    misses = [f"{m['count']} × {m['reason']}" for m in entry["misses"][:_MOST_MISSES]]
    left = len(entry["misses"]) - _MOST_MISSES
    return {
        **entry, "ops": ops[:_MOST_OPS], "more_ops": f"and {more} more" if more > 0 else "",
        "missed": sum(m["count"] for m in entry["misses"]),
        "reasons": misses + ([f"and {left} more reasons"] if left > 0 else []),
    }  # fmt: skip


def _engine_table(engines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; GPU memory only where there is some."""
    cells = (("tokens", "{:.0f}"), ("max_relative_error", "{:.2e}"), ("mean_kl", "{:.2e}"), ("top1", "{:.2%}"))
    columns = [
        "engine",
        "kind",
        "batch",
        "length",
        "size",
        "GPU memory",
        "tokens",
        "max relative error",
        "mean KL",
        "top-1",
    ]
    rows = [
        [
            e["name"], e["kind"], f"{e['batch']:,}", f"{e['length']:,}", size_text(e["size_bytes"]),
            size_text(e["memory_bytes"]),
            *(accuracy_facts.written(e["exactness"], key, form) or "-" for key, form in cells),
        ]
        for e in engines
    ]  # fmt: skip
    if not any(e["memory_bytes"] for e in engines):
        for row in (columns, *rows):
            del row[5]
    return columns, rows


def _accuracy_words(report: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(report)
    places = [(f"{b['from']:,}", b["mean_kl"] or 0.0) for b in found.get("kl_by_position", [])]
    return {
        "says": f"{found['scheme']} against {found['reference']}: {found['positions']:,} tokens of {found['text']} in"
        f" {found['windows']:,} windows of up to {found['window']:,}, through {' and '.join(found['engines'])}."
        " Formulas are those of llama.cpp's perplexity tool; ± is one standard error, KL in nats.",
        "columns": ["", *accuracy_facts.columns(found)],
        "rows": accuracy_facts.rows(found),
        "by_position": charts.columns(
            places, "position in the window, from this token on", "mean KL divergence, nats", _short
        )
        if places
        else None,
    }


def _reads(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a decode step must read, and at which rate it did where its speed was measured."""
    traffic, speed = facts["traffic"], facts["speed"]
    named = [("weights in full", traffic["weights"]), ("rows of tables", traffic["rows"]),
             ("KV cache, half of full length", traffic["cache"])]  # fmt: skip
    says = f"A decode step of one row must read {size_text(sum(size for _, size in named))}, whatever its kernels do."
    if "decode" in speed:
        rate = speed["decode"] * (traffic["weights"] + traffic["rows"])
        says += f" At {_rounded(speed['decode'])} tokens/s, weights alone are {size_text(rate)} a second."
    return {"says": says, "bars": charts.bars(named, size_text, "b")}


def _kernels(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = facts["kernels"].get(facts["decode_engine"])
    if not rows:
        return None
    reading = [(f"{r['label']} × {r['launches']}", r["read_bytes"]) for r in rows if r["read_bytes"]]
    launches = sum(r["launches"] for r in rows)
    return {
        "says": f"{launches:,} launches, {len(rows):,} kinds of kernels.",
        "bars": charts.bars(reading, size_text),
        "rows": [
            (r["label"], f"{r['launches']:,}", size_text(r["read_bytes"]) if r["read_bytes"] else "-") for r in rows
        ],
    }


def _memory(memory: Mapping[str, int], max_length: int) -> dict[str, Any]:
    parts = [("weights", memory["weights"]), ("arena and buffers of the largest engine", memory["engines"]),
             (f"KV cache of one sequence of {max_length:,} tokens", memory["cache"])]  # fmt: skip
    return {
        "parts": charts.shares([(name, size) for name, size in parts if size], size_text),
        "total": size_text(sum(size for _, size in parts)),
        "files": size_text(memory["total_files"]),
        "token": size_text(memory["cache_token"]),
    }


def _provenance(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe = facts["recipe"]
    rows = [("artifact digest", facts["digest"]), ("checkpoint digest", str(recipe.get("weights_digest", "-")))]
    rows += [("target", f"{facts['target']} {' '.join(facts['isa'])}")]
    rows += [("toolchain", ", ".join(f"{tool} {version}" for tool, version in facts["toolchain"].items() if version))]
    return rows + [(key, str(value)) for key, value in facts["provenance"].items()]


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in ("", None, [], {}):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key}", text if len(text) <= 300 else text[:297] + "..."
