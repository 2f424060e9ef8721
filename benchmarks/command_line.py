"""The harness's command line, checked before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..artifacts.errors import UsageError
from . import llama_cpp_peer
from .budget import Budget
from .builds import stories_folder
from .machine import ROOT
from .run import PARTS, Options
from .subjects import SUBJECTS, Subject, choose

_PEERS = ("transformers", llama_cpp_peer.NAME, "gpt-fast", "none")


@dataclass(frozen=True)
class Asked:
    """What is to be done. `target` is where the JSON goes, None for nowhere; `resume` completes what is there.

    `commit` is the source tree's where the tree does not know it; empty to ask git.
    """

    device: str
    subjects: tuple[Subject, ...]
    options: Options
    quick: bool
    target: Path | None
    resume: bool
    commit: str = ""


def understand(words: Sequence[str]) -> Asked:
    """Parse and check the command line.

    Raises:
        UsageError: something cannot be. SystemExit: as argparse does.
    """
    args = _parser().parse_args(list(words))
    subjects = [
        replace(subject, settings=(*subject.settings, *args.set))
        for subject in choose(args.models, args.quick, args.device)
    ]
    known = list(dict.fromkeys(w.name for s in subjects for w in s.workloads))
    for name in args.tests:
        if name not in known:
            raise UsageError(f"there is no test {name!r}", "", f"known ones: {', '.join(known) or 'none on the CPU'}")
    repetitions = (2 if args.quick else 5) if args.repetitions is None else args.repetitions
    if repetitions < 1:
        raise UsageError(f"--repetitions {repetitions} measures nothing", "", "give 1 or more")
    if args.gpt_fast is not None and not (args.gpt_fast / "generate.py").is_file():
        raise UsageError(f"{args.gpt_fast} is not gpt-fast", "there is no generate.py in it", "give its folder")
    if args.resume and args.json is None:
        raise UsageError("--resume has nothing to take up", "", "say with --json which file it completes")
    options = Options(
        args.artifacts, stories_folder(args.stories), _peers(args), repetitions, args.rebuild,
        tuple(p for p in args.parts if p != "build"), tuple(args.tests), tuple(args.peer_batches), args.gpt_fast,
        not args.warm_builds, Budget(args.budget_seconds), args.llama_cpp,
    )  # fmt: skip
    return Asked(args.device, tuple(subjects), options, args.quick, _target(args.json), args.resume, args.commit)


def _peers(args: argparse.Namespace) -> tuple[str, ...]:
    """The peers to run: those named, or transformers, and gpt-fast or llama.cpp if there is a folder of it.

    Raises:
        UsageError: gpt-fast is named, and there is no folder of it, or no GPU to run it on; or llama.cpp, on a GPU or
            from a folder that does not hold it.
    """
    if args.llama_cpp is not None and not (args.llama_cpp / "llama_cpp").is_dir():
        fix = "pip install --target DIR llama-cpp-python gguf, and give that folder"
        raise UsageError(f"{args.llama_cpp} does not hold llama-cpp-python", "there is no llama_cpp in it", fix)
    if args.device == "cuda" and (args.llama_cpp or llama_cpp_peer.NAME in (args.peers or ())):
        raise UsageError("llama.cpp is measured on the CPU only", "", "leave it out, or --device cpu")
    if args.peers is None and args.llama_cpp:
        return ("transformers", llama_cpp_peer.NAME)
    if args.peers is None:
        return ("transformers", "gpt-fast") if args.gpt_fast and args.device == "cuda" else ("transformers",)
    if "gpt-fast" in args.peers and (args.gpt_fast is None or args.device != "cuda"):
        fix = "git clone https://github.com/meta-pytorch/gpt-fast, and --device cuda --gpt-fast DIR"
        raise UsageError("gpt-fast is not part of this repository and runs on a GPU", "", fix)
    return tuple(p for p in args.peers if p != "none")


def _target(given: str | None) -> Path | None:
    """Where the JSON goes: a path as it is given; a bare name is one in benchmarks/results."""
    if given is None:
        return None
    path = Path(given)
    return ROOT / "benchmarks" / "results" / f"{given}.json" if path.name == given and path.suffix != ".json" else path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ingot.benchmarks", description="Measure Ingot and its peers in one run.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the models run (default: cpu)")
    names = ", ".join(dict.fromkeys(s.name for s in SUBJECTS))
    add("--models", nargs="+", default=[], metavar="NAME", help=f"some of: {names} (default: all of the device)")
    add("--quick", action="store_true", help="few tokens, 2 repetitions, no large model unless named")
    add("--json", metavar="FILE", help="keep the results; a NAME means benchmarks/results/NAME.json")
    add("--resume", action="store_true", help="measure only what the file of --json lacks")
    add("--commit", default="", metavar="HASH", help="of the sources, where they are a copy without .git")
    add("--repetitions", type=int, metavar="N", help="default 5")
    add("--artifacts", type=Path, default=Path("artifacts/built"), metavar="DIR", help="default: artifacts/built")
    add("--rebuild", action="store_true", help="build every artifact, to measure the builds")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipes of all models")
    add("--stories", type=Path, metavar="DIR", help="the folder of stories260K")
    add("--peers", nargs="+", choices=_PEERS, help="default: transformers, and those whose folder is given")
    add("--llama-cpp", type=Path, metavar="DIR", help="where llama-cpp-python and gguf are installed; CPU only")
    gpu = parser.add_argument_group("with --device cuda")
    gpu.add_argument("--gpt-fast", type=Path, metavar="DIR", help="a clone of github.com/meta-pytorch/gpt-fast")
    gpu.add_argument("--tests", nargs="+", default=[], metavar="NAME", help='such as "tg128 @ d1024 b8" or pp2048')
    gpu.add_argument("--peer-batches", nargs="+", type=int, default=[], metavar="N", help="default: all there are")
    gpu.add_argument(
        "--parts", nargs="+", choices=("build", *PARTS), default=list(PARTS),
        help="build: artifacts alone; default: artifacts, then speed, start and peers",
    )  # fmt: skip
    gpu.add_argument("--warm-builds", action="store_true", help="builds use what earlier ones have cached")
    gpu.add_argument(
        "--budget-seconds", type=float, metavar="S", help="begin nothing new past it; what is finished is kept"
    )
    return parser
