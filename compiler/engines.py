"""From planned graphs to engines in the artifact's folder, and to what the manifest says of them.

Back ends are imported when they compile: engines out of the build cache need none.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.errors import ResourceError
from ..artifacts.manifest import Constant, EngineEntry
from ..runtime.engines.plan_layout import engine_memory_bytes
from .console import Progress
from .facts import EngineFacts
from .recipe import EngineShape

if TYPE_CHECKING:
    from ..passes.graph import TracedGraph
    from .plan import Plan


def compile_cpu(traced: TracedGraph, name: str, folder: Path, isa: str, timeout: float) -> dict[str, Any]:
    """Compile one planned graph to `folder`/NAME.so, beside kernels.so.

    Returns:
        constants: [symbol, weight] each; missing: tensor functions that the kernels do not have.

    Raises:
        ResourceError: the compiler failed, or what it needs is missing.
    """
    from .backends import aoti

    constants = aoti.compile_engine(traced, name, folder / f"{name}.so", isa, timeout)
    missing = aoti.missing_symbols(folder / f"{name}.so", folder / "kernels.so")
    return {"constants": [[c.symbol, c.weight] for c in constants], "missing": missing}


def cpu_entry(shape: EngineShape, facts: EngineFacts, compiled: dict[str, Any]) -> EngineEntry:
    """The manifest's entry for what `compile_cpu` made."""
    constants = tuple(Constant(symbol, weight) for symbol, weight in compiled["constants"])
    return EngineEntry(
        shape.name, "aoti", shape.phase, shape.batch, shape.length, f"engines/{shape.name}.so", facts.inputs,
        facts.outputs, constants, ("engines/kernels.so",), memory_bytes=0,
    )  # fmt: skip


def require_gpu() -> None:
    """Raise ResourceError unless this machine can build for CUDA: measure kernels and run the gate."""
    import torch

    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "target.device = 'cuda' needs triton", str(error), "install a torch built for CUDA, which brings it"
        ) from error
    if not torch.cuda.is_available():
        raise ResourceError(
            "target.device = 'cuda' needs a GPU on the machine that builds",
            f"torch {torch.__version__} sees none; kernels are chosen by measuring and the gate runs the engines",
            "build on a machine with the GPU that the artifact is for",
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise ResourceError(
            f"the GPU {torch.cuda.get_device_name()} is too old to build for",
            f"its compute capability is {major}.{minor}; the kernels use what came with 9.0 (Hopper)",
            "build on a Hopper GPU or a later one, or for the CPU (--set target.device=cpu)",
        )
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise ResourceError(
            "target.device = 'cuda' needs cuda-bindings",
            "it is not installed; kernels are measured and the gate is run through it",
            'pip install "ingot[cuda]"',
        )


def compile_cuda(plan: Plan, root: Path, progress: Progress, tuning: Path | None = None) -> dict[str, Any]:
    """Compile all engines of a plan into `root`/engines.

    Args:
        tuning: where measured choices are kept between builds; None for the user's own file.

    Returns:
        engines: by name its weights, libraries and arena_bytes; tuning: kernel configurations chosen by measuring.

    Raises:
        ResourceError: the compiler failed. UnsupportedModelError: an op has no kernel.
    """
    import torch

    from .backends.cuda.engine import compile_engines
    from .backends.cuda.kernels import KernelStore
    from .backends.cuda.tune import Tuner, default_cache

    major, minor = torch.cuda.get_device_capability()
    store = KernelStore(10 * major + minor)
    autotune = plan.recipe.target.autotune
    tuner = Tuner(store, (tuning or default_cache()) if autotune else None, progress.update)
    files = compile_engines(
        plan.graphs, root, tuner, store, lambda name: progress.update(name, advance=1),
        tuner.prepare if autotune else None,
    )  # fmt: skip
    tuner.save()
    engines = {
        name: {"weights": f.weights, "libraries": f.libraries, "arena_bytes": f.plan.arena_bytes}
        for name, f in files.items()
    }
    return {"engines": engines, "tuning": tuner.chosen}


def cuda_entry(shape: EngineShape, facts: EngineFacts, compiled: dict[str, Any]) -> EngineEntry:
    """The manifest's entry for one engine of what `compile_cuda` made."""
    return EngineEntry(
        shape.name, "plan", shape.phase, shape.batch, shape.length, f"engines/{shape.name}.plan.json",
        facts.inputs, facts.outputs, tuple(Constant(w, w) for w in compiled["weights"]), tuple(compiled["libraries"]),
        engine_memory_bytes(facts.inputs, facts.outputs, compiled["arena_bytes"]),
    )  # fmt: skip
