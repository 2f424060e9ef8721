"""The command line: one parser, one table of commands, one place where errors become exit codes.

argparse and not a larger library: `ingot run` competes for process start to first token, and typer with rich costs
0.1 to 0.3 s of it. Commands are imported when they are called.

Exit codes: 0 ok, 1 a bug of Ingot, 2 usage or recipe, 3 unsupported model, 4 gate or verification failed, 5 resources,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..artifacts.errors import IngotError, ResourceError, UsageError
from .ship_options import add_ship_commands

_COMPILE_EXTRA = ("torch", "transformers", "safetensors", "huggingface_hub")


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", "", f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are printed to stderr as what, why and fix."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    debug = "--debug" in argv[: argv.index("--")] if "--" in argv else "--debug" in argv
    try:
        # A terminated build cleans up behind itself, as an interrupted one does.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, _terminate)
        args = _parser().parse_args(argv)
        code = _call(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, as in `ingot inspect … | head`: nobody is left to tell
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except IngotError as error:
        return _report(error, error, debug)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _COMPILE_EXTRA:
            return _internal(error, debug)
        why = f"{error.name} is not installed: this is the lean runtime"
        return _report(
            ResourceError("this command needs the compiler", why, 'pip install "ingot[compile]"'), error, debug
        )
    except MemoryError as error:
        fix = "close other programs, or choose a smaller model or batch"
        return _report(ResourceError("out of memory", str(error), fix), error, debug)
    except OSError as error:
        return _report(ResourceError(f"the system refused: {error.strerror or error}", str(error)), error, debug)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug is told without a traceback
        return _internal(error, debug)


def _terminate(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _report(shown: IngotError, error: BaseException, debug: bool) -> int:
    from .console import printable

    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {printable(str(shown))}", file=sys.stderr)
    return shown.exit_code


def _internal(error: Exception, debug: bool) -> int:
    what = f"internal error: {type(error).__name__}: {str(error)[:500]}"
    _report(IngotError(what, "this is a bug in Ingot", "run again with --debug and report it"), error, debug)
    return 1


def _call(args: argparse.Namespace) -> int:
    if args.command in ("run", "inspect", "compare"):
        from . import artifact_commands

        return {
            "run": artifact_commands.run,
            "inspect": artifact_commands.inspect,
            "compare": artifact_commands.compare,
        }[args.command](args)
    if args.command in ("sign", "verify"):
        from . import trust_commands

        return {"sign": trust_commands.sign, "verify": trust_commands.verify}[args.command](args)
    if args.command in ("push", "pull"):
        from . import ship_commands

        return {"push": ship_commands.push, "pull": ship_commands.pull}[args.command](args)
    if args.command == "doctor":
        from .doctor import doctor

        return doctor(args)
    if args.command == "cache":
        from .cache_commands import cache

        return cache(args)
    if args.command == "diff":
        from .diff import print_diff

        return print_diff(args)
    if args.command == "ci":
        from .ci.command import ci

        return ci(args)
    from . import build_commands

    return {
        "build": build_commands.build,
        "passes": build_commands.passes,
        "bisect": build_commands.bisect,
        "families": build_commands.families,
    }[args.command](args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ingot", description="Compile language models ahead of time; run them lean.")
    parser.add_argument("--version", action="version", version=f"ingot {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name != "run":
            added.add_argument("--json", action="store_true", help="print one JSON value and nothing else on stdout")
        return added

    def takes_recipe(added: argparse.ArgumentParser, nargs: str | None = None) -> None:
        added.add_argument("recipe", type=Path, nargs=nargs, metavar="RECIPE", help="a recipe (*.toml)")
        added.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change a recipe key"
        )

    def takes_cache(added: argparse.ArgumentParser) -> None:
        help_text = "default: $XDG_CACHE_HOME/ingot or ~/.cache/ingot"
        added.add_argument("--cache-dir", type=Path, metavar="DIR", help=help_text)

    build = command("build", "compile a recipe into an artifact")
    takes_recipe(build)
    build.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: artifacts/built/NAME")
    build.add_argument("--model", metavar="DIR_OR_HUB_ID", help="a model folder, or organisation/name@COMMIT")
    build.add_argument("--dry-run", action="store_true", help="print recipe and plan; read no weights")
    build.add_argument("--force", action="store_true", help="replace an existing artifact")
    build.add_argument("--plant", metavar="FAULT", help="put a known fault into the pipeline, to see the gate catch it")
    build.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the graph after each pass that changed it")
    build.add_argument("--explain", action="store_true", help="say of each stage why it was or was not in the cache")
    build.add_argument("--no-cache", action="store_true", help="make everything anew, and keep nothing")
    takes_cache(build)
    build.add_argument(
        "--cache-size", metavar="SIZE", help="remove what was used least recently beyond it (default 50GB)"
    )
    build.add_argument(
        "--tuning-cache", type=Path, metavar="FILE", help="CUDA: replay the measured choices in this file, add new ones"
    )
    build.add_argument(
        "--engine-timeout", type=float, metavar="S", help="seconds the compiler may take for one engine (default 1800)"
    )
    _run_options(command("run", "generate text from an artifact"))
    command("inspect", "say what an artifact is").add_argument("artifact", type=Path, metavar="ARTIFACT")
    verify = command("verify", "check an artifact against its manifest, and who signed it")
    verify.add_argument("artifact", type=Path, metavar="ARTIFACT")
    verify.add_argument(
        "--key",
        type=Path,
        action="append",
        metavar="PUBLIC_KEY",
        help="it must be signed by this key (repeatable: any)",
    )
    sign = command("sign", "sign an artifact's whole folder")
    sign.add_argument("artifact", type=Path, metavar="ARTIFACT")
    sign.add_argument("--key", type=Path, required=True, metavar="PRIVATE_KEY", help="a PEM file, P-256 to P-521")
    _compare_options(command("compare", "put artifacts of one model side by side: size, speed, accuracy"))
    add_ship_commands(command)
    takes_recipe(command("passes", "show the pass pipeline in order"), nargs="?")
    bisect = command("bisect", "find the pass that breaks the numbers")
    takes_recipe(bisect)
    bisect.add_argument("--model", metavar="DIR_OR_HUB_ID", help="as in build")
    bisect.add_argument("--plant", metavar="FAULT", help="put a known fault into the pipeline first, to see it found")
    cache = command("cache", "look at the build cache, verify it, or make it smaller")
    cache.add_argument("action", choices=("ls", "verify", "gc"), help="list entries, digest them all, or remove some")
    takes_cache(cache)
    cache.add_argument("--max-size", metavar="SIZE", help="gc: what may stay, for example 20GB (default 50GB)")
    doctor = command("doctor", "say what this machine can build and run, and what is missing")
    doctor.add_argument(
        "--needs", action="append", choices=("run", "build", "run-cuda", "build-cuda"),
        help="what has to work for exit code 0 (repeatable; default: run and build)",
    )  # fmt: skip
    takes_cache(doctor)
    families = command("families", "compare model families with transformers, token by token")
    families.add_argument("names", nargs="*", metavar="FAMILY", help="default: all")
    families.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what the engines are compiled for")
    families.add_argument("--eager", action="store_true", help="run the graphs without compiling them: faster")
    return parser


def _compare_options(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="two or more, of one model")
    compare.add_argument("--no-speed", action="store_true", help="measure nothing; show what the builds recorded")
    compare.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is measured (default 5)")
    compare.add_argument("--prompt", type=int, metavar="N", help="tokens of the prompt to measure (default: up to 512)")
    compare.add_argument("--tokens", type=int, metavar="N", help="tokens to decode (default: up to 64)")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write the table and plots as one HTML file")
    compare.add_argument(
        "--other-weights", action="store_true", help="compare artifacts of different checkpoints of one architecture"
    )
    _takes_trust(compare)


def _takes_trust(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--trust",
        action="append",
        metavar="POLICY",
        help="whose code may run: local, signed, signed:PUBLIC_KEY or digest:sha256:HEX (repeatable: any of them)",
    )


def _run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("artifact", type=Path, metavar="ARTIFACT")
    run.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads it from stdin")
    run.add_argument("--max-tokens", type=int, default=128, metavar="N", help="at most so many tokens (default 128)")
    run.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; default: the model's own")
    run.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens up to this probability")
    run.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    run.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one's")
    run.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    run.add_argument("--stop", action="append", metavar="STR", help="end before this text (repeatable)")
    run.add_argument("--chat", action="store_true", help="send the prompt through the model's chat template")
    run.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print as tokens come")
    _takes_trust(run)
    run.add_argument("--json", action="store_true", help="print one JSON object: text, tokens, finish reason, times")
    run.add_argument(
        "--gpu-memory-utilization", type=float, metavar="SHARE",
        help="how much of the GPU's memory may be in use once the KV cache has been taken (default 0.9)",
    )  # fmt: skip
    run.add_argument(
        "--timings", action="store_true",
        help="print where the time went from process start to first token, tpot and tokens/s to stderr",
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
