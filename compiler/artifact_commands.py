"""`ingot run`, `inspect` and `compare`: what needs a finished artifact and nothing of the compiler.

None of them may import transformers, and inspect no torch either; a test holds them to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ..artifacts.errors import UsageError, VerificationError
from ..artifacts.kernel_plan import KernelPlan
from ..artifacts.manifest import Manifest
from ..artifacts.store import open_artifact
from . import accuracy_facts
from .accuracy_facts import numbers
from .console import open_progress, print_table, printable, size_text

_MAX_STDIN_BYTES = 16 << 20


def run(args: argparse.Namespace) -> int:
    """Generate from one prompt: as it comes, at once, or as JSON."""
    from ..runtime import LLM
    from ..runtime.phases import Phases, process_start

    prompt = _prompt(args.prompt)
    phases = Phases(process_start())
    phases.mark("python, imports")
    names = ("gpu_memory_utilization", "trust")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with LLM(args.artifact, phases=phases, **options) as llm:
        wanted = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
        given = {name: getattr(args, name) for name in wanted if getattr(args, name) is not None}
        params = dataclasses.replace(llm.get_default_sampling_params(), **given)
        request: Any = [{"role": "user", "content": prompt}] if args.chat else prompt
        if args.stream and not args.json:
            pieces = llm.stream(request, params)
            phases.mark("tokenizer, prompt")
            for output in pieces:
                sys.stdout.write(_shown(output.outputs[0].text))
                sys.stdout.flush()
            print()
        else:
            output = (llm.chat(request, params) if args.chat else llm.generate(prompt, params))[0]
            if not args.json:
                print(_shown(output.outputs[0].text))
    phases.add("prefill, first token", (output.metrics.ttft_ms or 0.0) / 1e3)
    if args.json:
        print(json.dumps(_as_json(output) | ({"phases": phases.as_list()} if args.timings else {})))
    if output.outputs[0].finish_reason == "error":
        raise VerificationError(
            "the generation ended with an error: the logits are not finite",
            "the weights hold NaN or infinity, or overflow in this dtype",
            "build the artifact again from sound weights, or in a wider dtype",
        )
    if args.timings and not args.json:
        print(f"{phases}\n{_timings(output.metrics)}", file=sys.stderr)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Say what an artifact is, without running or digesting anything."""
    artifact = open_artifact(args.artifact, verify="sizes")
    facts = describe(artifact.manifest)
    plans = [engine for engine in artifact.manifest.engines if engine.kind == "plan"]
    kernels = {e.name: KernelPlan.from_json(artifact.path(e.file).read_bytes(), e.file).summary() for e in plans}
    if args.json:
        print(json.dumps({**facts, **({"kernels": kernels} if kernels else {})}, indent=1))
        return 0
    print_artifact(facts)
    for name, rows in kernels.items():
        table = [(row["label"], row["launches"], size_text(int(row["read_bytes"]))) for row in rows]
        print_table(f"kernels of {name}", ("kernel", "launches", "weights read"), table)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Put artifacts of one model side by side; their speed is measured now."""
    from . import compare as comparing

    for name in ("rounds", "prompt", "tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} is refused", "it is less than 1", "pass --no-speed to measure nothing")
    if args.html is not None and (args.html.is_dir() or not args.html.parent.is_dir()):
        why = "it is a folder" if args.html.is_dir() else "there is no such folder to write it into"
        raise UsageError(f"--html {args.html} is refused", why, "name a file in a folder that exists")
    rounds = 0 if args.no_speed else args.rounds
    with open_progress(args.json or not rounds) as progress, progress.stage("speed", rounds * len(args.artifacts)):
        result = comparing.compare(
            args.artifacts, rounds=rounds, prompt=args.prompt, tokens=args.tokens, other_weights=args.other_weights,
            trust=args.trust, say=lambda text: progress.update(text, 1),
        )  # fmt: skip
    if args.html is not None:
        from .html.compare_page import render_comparison

        args.html.write_text(render_comparison(result), "utf-8")
    if args.json:
        print(json.dumps(result.to_dict(), allow_nan=False))
        return 0
    columns, rows = comparing.table(result)
    print_table(result.model, columns, rows)
    for note in comparing.notes(result):
        print(printable(note))
    if args.html is not None:
        print(f"wrote {args.html}")
    return 0


def describe(manifest: Manifest) -> dict[str, Any]:
    """An artifact's facts as plain JSON data, from its manifest alone."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    measured = manifest.gate.get("engines")
    measured = measured if isinstance(measured, dict) else {}
    engines = [
        {
            "name": engine.name,
            "kind": engine.kind,
            "phase": engine.phase,
            "batch": engine.batch,
            "length": engine.length,
            "size_bytes": sizes[engine.file],
            "memory_bytes": engine.memory_bytes,
            "exactness": numbers(measured.get(engine.name)),
        }
        for engine in manifest.engines
    ]
    return {
        "name": manifest.name,
        "digest": manifest.digest(),
        "schema_version": manifest.schema_version,
        "ingot_version": manifest.ingot_version,
        "model": dataclasses.asdict(manifest.model),
        "target": dataclasses.asdict(manifest.target),
        "toolchain": manifest.toolchain,
        "engines": engines,
        "kv_cache": {
            "block_size": manifest.kv_cache.block_size,
            "num_blocks": manifest.kv_cache.num_blocks,
            "tokens": (manifest.kv_cache.num_blocks - 1) * manifest.kv_cache.block_size,
            "dtype": manifest.kv_cache.dtype,
        },
        "weights_bytes": sum(sizes[path] for path in manifest.weights),
        "total_bytes": sum(sizes.values()),
        "passes": _passes(manifest.passes),
        "gate": manifest.gate,
        "recipe": manifest.recipe,
    }


def print_artifact(facts: dict[str, Any]) -> None:
    """The facts of `describe` as tables on stdout."""
    model, target, cache = facts["model"], facts["target"], facts["kv_cache"]
    task = accuracy_facts.task_text(facts["gate"])
    rows = [
        ("digest", facts["digest"]),
        ("model", f"{model['architecture']}, {model['parameters']:,} parameters, {model['dtype']}"),
        ("length", f"{model['max_length']} tokens, vocabulary {model['vocab_size']}"),
        ("target", f"{target['device']} {target['system']}-{target['machine']} {' '.join(target['isa'])}"),
        ("host library", f"{target['host_library']} {target['torch']}"),
        ("KV cache", f"{cache['tokens']} tokens in blocks of {cache['block_size']}, {cache['dtype']}"),
        ("weights", size_text(facts["weights_bytes"])),
        ("total", size_text(facts["total_bytes"])),
        ("gate", "passed" if facts["gate"].get("passed") is True else "no result recorded"),
        ("toolchain", ", ".join(f"{tool} {version}" for tool, version in facts["toolchain"].items())),
        *([("task", task)] if task else []),
    ]
    print_table(f"{facts['name']} (ingot {facts['ingot_version']})", ("", ""), rows)
    engines = [
        (
            e["name"], e["kind"], e["batch"], e["length"], size_text(e["size_bytes"]),
            size_text(e["memory_bytes"]) if e["memory_bytes"] else "-", _exactness(e["exactness"]),
        )
        for e in facts["engines"]
    ]  # fmt: skip
    print_table("engines", ("name", "kind", "batch", "length", "size", "GPU memory", "exactness"), engines)
    if report := accuracy_facts.accuracy_of(facts["gate"]):
        print_table(accuracy_facts.title(report), ("", *accuracy_facts.columns(report)), accuracy_facts.rows(report))
    passes = [
        (p["name"], p["changed"], p["missed"], "exact" if p["exact"] else "changes numerics") for p in facts["passes"]
    ]
    print_table("passes", ("name", "sites changed", "near misses", "exactness"), passes)


def _passes(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per pass over all engines, in order of running; tolerates reports with more or fewer fields."""
    merged: dict[str, dict[str, Any]] = {}
    for record in records:
        name = str(record.get("name", "?"))
        entry = merged.setdefault(name, {"name": name, "changed": 0, "missed": 0, "exact": record.get("exact", True)})
        changed, missed = record.get("changed"), record.get("missed")
        entry["changed"] += changed if type(changed) is int else 0
        entry["missed"] += len(missed) if isinstance(missed, list) else missed if type(missed) is int else 0
    return list(merged.values())


def _exactness(numbers: dict[str, int | float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in numbers.items()) or "not measured"


def _prompt(argument: str) -> str:
    """The prompt itself, or all of stdin for `-`."""
    if argument != "-":
        return argument
    raw = sys.stdin.buffer.read(_MAX_STDIN_BYTES + 1)
    if len(raw) > _MAX_STDIN_BYTES:
        raise UsageError("the prompt on stdin is too long", f"more than {_MAX_STDIN_BYTES} bytes", "shorten it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the prompt on stdin is not UTF-8", f"byte {error.start} is no text", "convert it") from None


def _shown(text: str) -> str:
    return printable(text) if sys.stdout.isatty() else text


def _as_json(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "metrics": dataclasses.asdict(output.metrics),
    }


def _timings(metrics: Any) -> str:
    parts = [f"{metrics.prompt_tokens} prompt tokens", f"{metrics.output_tokens} tokens"]
    if metrics.ttft_ms is not None:
        parts.append(f"ttft {metrics.ttft_ms:.1f} ms")
    if metrics.tpot_ms:
        parts += [f"tpot {metrics.tpot_ms:.3f} ms", f"{1000 / metrics.tpot_ms:.1f} tokens/s"]
    return ", ".join(parts)
