"""`ingot ci`: build the matrix, judge it, write the reports, and ship what passed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...artifacts.errors import IngotError
from ...artifacts.files import replace_file
from ...artifacts.manifest import SIGNATURE
from ...artifacts.oci.reference import Reference
from ...artifacts.oci.transfer import push
from ...artifacts.signature import make_payload, write_bundle
from ...artifacts.store import open_artifact
from ..console import open_progress, print_table
from .jobs import Result, Say, build_all, check_ship, exit_code, judge
from .pipeline import Pipeline, jobs_of, load_pipeline
from .report import write_reports


def ci(args: argparse.Namespace) -> int:
    """Run a pipeline; 0 if every artifact was built, proved and is within its budgets."""
    pipeline = load_pipeline(args.pipeline)
    folder = args.pipeline.resolve().parent
    jobs = jobs_of(pipeline, folder)
    check_ship(pipeline, folder)
    output = args.output if args.output is not None else folder / pipeline.output
    with open_progress(args.json) as progress:
        results = build_all(pipeline, jobs, output, args.cache_dir, progress.log)
        # One after the other: measurements that run beside each other measure each other.
        for result in results:
            if not result.code:
                judge(result, output / result.job, pipeline.baseline, folder, pipeline.budgets, progress.log)
        if (pipeline.ship.key or pipeline.ship.push) and all(result.ok for result in results):
            _ship(pipeline, folder, results, output, progress.log)
    write_reports(pipeline.name, results, output)
    if args.json:
        print(json.dumps({"pipeline": pipeline.name, "output": str(output), "jobs": [r.to_dict() for r in results]}))
    else:
        rows = [(r.job, "ok" if r.ok else "failed", round(r.seconds, 1), r.from_cache, _why(r)) for r in results]
        print_table(pipeline.name, ("artifact", "", "seconds", "from the cache", "why"), rows)
        print(f"wrote {output / 'summary.md'}, junit.xml and result.json")
    return exit_code(results)


def _ship(pipeline: Pipeline, folder: Path, results: list[Result], output: Path, say: Say) -> None:
    """Sign and push every artifact, now that all have passed; one that cannot be shipped fails, and is the last."""
    for result in results:
        try:
            _ship_one(pipeline, folder, result, output / result.job)
        except IngotError as error:
            result.code, result.error = error.exit_code, f"error: it is sound, but was not shipped: {error}"
            return
        say(f"{result.job}: shipped")


def _ship_one(pipeline: Pipeline, folder: Path, result: Result, root: Path) -> None:
    if pipeline.ship.key:
        from ...runtime.keys import sign

        artifact = open_artifact(root)
        payload = make_payload(artifact.root, artifact.manifest.name)
        bundle = sign(payload, folder / pipeline.ship.key, lambda: b"")
        replace_file(artifact.root / SIGNATURE, write_bundle(bundle))
        result.notes.append(f"signed with key {bundle.key_id[:16]}…")
    if pipeline.ship.push:
        image = push(root, Reference.parse(f"{pipeline.ship.push}:{result.job}"), lambda path, count: None)
        result.notes.append(f"pushed to {pipeline.ship.push}:{result.job}@{image.digest}")


def _why(result: Result) -> str:
    if result.error:
        return result.error.partition("\n")[0]
    return "; ".join(f"{check.name} beyond its budget" for check in result.checks if not check.ok)
