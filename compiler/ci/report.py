"""What a pipeline writes: JSON for tools, JUnit XML for build servers, a summary in Markdown for people."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

from ...artifacts.files import os_errors
from ..console import size_text
from .jobs import Check, Result

_SIGNS = {True: "✅", False: "❌"}


def write_reports(name: str, results: Sequence[Result], output: Path) -> None:
    """Write `result.json`, `junit.xml` and `summary.md` into `output`."""
    with os_errors(f"cannot write reports to {output}"):
        output.mkdir(parents=True, exist_ok=True)
        data = {"pipeline": name, "ok": all(r.ok for r in results), "jobs": [r.to_dict() for r in results]}
        (output / "result.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        (output / "junit.xml").write_bytes(junit(name, results))
        (output / "summary.md").write_text(summary(name, results), "utf-8")


def junit(name: str, results: Sequence[Result]) -> bytes:
    """One suite per job; its build, and each figure with a budget, is a test case."""
    root = ElementTree.Element("testsuites", name=_text(name))
    for result in results:
        cases = 1 + len(result.checks)
        failures = bool(result.code) + sum(not check.ok for check in result.checks)
        suite = ElementTree.SubElement(
            root, "testsuite", name=_text(result.job), tests=str(cases), failures=str(failures),
            errors="0", skipped="0", time=f"{result.seconds:.3f}",
        )  # fmt: skip
        built = ElementTree.SubElement(
            suite, "testcase", classname=_text(result.job), name="build and gate", time=f"{result.seconds:.3f}"
        )
        if result.code:
            message = _text(result.error.partition("\n")[0])
            ElementTree.SubElement(built, "failure", message=message).text = _text(result.error)
        for check in result.checks:
            case = ElementTree.SubElement(suite, "testcase", classname=_text(result.job), name=check.name, time="0")
            if not check.ok:
                ElementTree.SubElement(case, "failure", message=_said(check)).text = _said(check)
    ElementTree.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, "utf-8") + b"\n"


def summary(name: str, results: Sequence[Result]) -> str:
    """A page that says at a glance what failed, what was rebuilt and why, and what became faster or more exact."""
    failed = sum(not result.ok for result in results)
    lines = [
        f"# {_cell(name)}: " + (f"{failed} of {len(results)} failed" if failed else f"all {len(results)} passed"),
        "",
    ]
    lines += ["| artifact | | decode | prefill | size | memory | mean KL | top-1 | built in |", "| --- " * 9 + "|"]
    for result in results:
        found = {check.name: check for check in result.checks}
        cells = [_change(found.get(key)) for key in ("decode tokens/s", "prefill tokens/s")]
        cells += [_change(found.get(key), size_text) for key in ("size in bytes", "memory in bytes")]
        cells += [_exactness(result, found.get("mean KL"), "mean_kl"), _exactness(result, found.get("top-1"), "top1")]
        built = f"{result.seconds:.0f} s" + (f", {result.from_cache} from the cache" if result.from_cache else "")
        lines.append(f"| {_cell(result.job)} | {_SIGNS[result.ok]} | {' | '.join(cells)} | {built} |")
    for result in results:
        lines += ["", f"## {_cell(result.job)}", ""]
        lines += [f"`sha256:{result.digest}`", ""] if result.digest else []
        if result.error:
            lines += ["```text", result.error.replace("```", "'''"), "```", ""]
        lines += [f"- ❌ {_said(check)}" for check in result.checks if not check.ok]
        if result.rebuilt:
            lines += ["- made anew: " + "; ".join(map(_cell, result.rebuilt[:12]))]
            lines += [f"- and {len(result.rebuilt) - 12} more stages"] if len(result.rebuilt) > 12 else []
        elif result.from_cache and not result.code:
            lines.append("- nothing was made anew: every stage came from the cache")
        lines += [f"- {_cell(note)}" for note in result.notes]
    return "\n".join(lines) + "\n"


def _said(check: Check) -> str:
    """A check that failed, in one line with its numbers."""
    if check.value is None or check.baseline is None or check.limit is None:
        return check.name
    side = "less than" if check.limit <= check.baseline and check.value < check.limit else "more than"
    return f"{check.name} {check.value:.5g} is {side} {check.limit:.5g}, which the budget makes of {check.baseline:.5g}"


def _change(check: Check | None, write: Callable[[float], str] | None = None) -> str:
    if check is None or check.value is None:
        return "-"
    value = f"{check.value:,.0f}" if write is None else write(check.value)
    if not check.baseline:
        return value
    share = check.value / check.baseline - 1
    return f"{value} ({share:+.1%})" + ("" if check.ok else " ❌")


def _exactness(result: Result, check: Check | None, key: str) -> str:
    value = result.accuracy.get(key) if check is None else check.value
    if value is None:
        return "-"
    text = f"{value:.2e}" if key == "mean_kl" else f"{value:.2%}"
    if check is not None and check.baseline is not None:
        text += f" (was {check.baseline:.2e})" if key == "mean_kl" else f" (was {check.baseline:.2%})"
    return text + (" ❌" if check is not None and not check.ok else "")


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("<", "&lt;")


def _text(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
