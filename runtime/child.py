"""How a child process of a build tells its parent what went wrong: one JSON line on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from ..artifacts.errors import IngotError


def serve(main: Callable[..., None]) -> None:
    """Call `main` with the command line's arguments; an error meant for the user becomes a JSON line and exit 1."""
    try:
        main(*sys.argv[1:])
    except IngotError as error:
        print(json.dumps({"what": error.what, "why": error.why, "fix": error.fix, "kind": type(error).__name__}))
        raise SystemExit(1) from error
