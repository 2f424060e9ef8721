"""Runs a module of the runtime in a process of its own: what a build or a comparison learns of finished engines.

A crash of native code ends the child alone, and is told by its signal.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import errors
from ..artifacts.errors import ResourceError
from ..artifacts.manifest import Manifest

_TIMEOUT_S = 3600


def ask_child(
    module: str, request: Mapping[str, Any], root: Path | None = None, manifest: Manifest | None = None
) -> Any:
    """What a module answers to a request, both as JSON files: see `run_child`.

    Args:
        root, manifest: an artifact that is not published yet, which the request then names by these words.
    """
    with tempfile.TemporaryDirectory(prefix="ingot-child-") as scratch:
        folder = Path(scratch)
        if manifest is not None:
            (folder / "manifest.json").write_text(manifest.to_json())
            request = {**request, "root": str(root), "manifest": str(folder / "manifest.json")}
        (folder / "request.json").write_text(json.dumps(request))
        run_child(module, str(folder / "request.json"), str(folder / "result.json"))
        return json.loads((folder / "result.json").read_text())


def run_child(module: str, *args: str) -> str:
    """Run a module of the runtime in a process of its own; returns what it printed.

    Raises:
        ResourceError: it crashed (names the signal), failed, or took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, *args], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            "the finished engines hang", f"no answer in {_TIMEOUT_S} s", "report this with the recipe"
        ) from error
    if done.returncode:
        told = done.stdout.strip().splitlines()[-1:]
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            said = json.loads(told[0] if told else "")
            raise getattr(errors, said["kind"])(said["what"], said["why"], said["fix"])
        how = f"killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"exit {done.returncode}"
        raise ResourceError(
            "the finished engines do not run in a lean process",
            "\n".join([how, *done.stderr.strip().splitlines()[-30:]]),
            "check the free memory; if there is enough, report this with the recipe",
        )
    return done.stdout
