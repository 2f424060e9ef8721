"""The options of the commands around artifacts: `push`, `pull`, `diff` and `ci`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_ship_commands(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add them; `command` makes a subcommand's parser out of its name and summary."""
    where = "HOST/NAME:TAG, HOST/NAME@sha256:HEX, oci:FOLDER:TAG or dir:FOLDER"
    push = command("push", "send an artifact to a registry, an OCI layout folder or a folder")
    push.add_argument("artifact", type=Path, metavar="ARTIFACT")
    push.add_argument("reference", metavar="REFERENCE", help=where)
    pull = command("pull", "fetch an artifact; what breaks off is resumed by the next pull")
    pull.add_argument("reference", metavar="REFERENCE", help=where)
    pull.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: artifacts/built/NAME")
    pull.add_argument("--force", action="store_true", help="replace an artifact there that is damaged")
    pull.add_argument(
        "--key",
        type=Path,
        action="append",
        metavar="PUBLIC_KEY",
        help="keep it only if this key signed it (repeatable)",
    )
    diff = command("diff", "say what two artifacts differ in")
    diff.add_argument("artifacts", type=Path, nargs=2, metavar="ARTIFACT")
    diff.add_argument("--no-weights", action="store_true", help="do not read the weights tensor by tensor")
    ci = command("ci", "build a matrix, compare it with what is in production, and ship it")
    ci.add_argument("pipeline", type=Path, metavar="PIPELINE", help="a pipeline (*.toml)")
    ci.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: as the pipeline says")
    ci.add_argument("--cache-dir", type=Path, metavar="DIR", help="the build cache that all builds share")
    for added in (push, pull):
        added.add_argument("--plain-http", action="store_true", help="no TLS, also for another machine's registry")
