"""From planned graphs to engines in the artifact's folder: the back end is chosen by the recipe's target."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts.errors import ResourceError
from ..artifacts.manifest import Constant, EngineEntry
from ..runtime.engines.plan_layout import engine_memory_bytes
from .backends.aoti import compile_engine, input_buffers, missing_symbols, output_buffers
from .backends.cpu_kernels import compile_kernels
from .console import Progress
from .plan import Plan


@dataclass(frozen=True)
class Engines:
    """What was compiled.

    Attributes:
        host_library: who hosts the engines' tensors on the CPU: the artifact's own kernels ("none"), or libtorch.
        tuning: kernel configurations chosen by measuring, for the manifest.
    """

    entries: tuple[EngineEntry, ...]
    host_library: str = "none"
    tuning: dict[str, Any] = field(default_factory=dict)


def compile_all(plan: Plan, root: Path, progress: Progress) -> Engines:
    """Compile every engine of a plan into `root`/engines.

    Raises:
        ResourceError: the compiler failed, or what it needs is missing. UnsupportedModelError: an op has no kernel.
    """
    if plan.recipe.target.device == "cuda":
        return _compile_cuda(plan, root, progress)
    return _compile_cpu(plan, root, progress)


def _compile_cpu(plan: Plan, root: Path, progress: Progress) -> Engines:
    entries = []
    shapes, isa = plan.recipe.engines(), plan.recipe.target.isa
    kernels = root / "engines" / "kernels.so"
    missing: set[str] = set()
    with progress.stage("compile engines", total=len(shapes) + 1):
        progress.update("kernels")
        compile_kernels(kernels, isa=isa)
        for shape in shapes:
            progress.update(shape.name, advance=1)
            graph = plan.graphs[shape.name]
            file = f"engines/{shape.name}.so"
            constants = compile_engine(graph, shape.name, root / file, isa)
            missing.update(missing_symbols(root / file, kernels))
            inputs, outputs = input_buffers(graph), output_buffers(graph)
            entries.append(
                EngineEntry(
                    shape.name, "aoti", shape.phase, shape.batch, shape.length, file, inputs, outputs, constants,
                    ("engines/kernels.so",), memory_bytes=0,
                )
            )  # fmt: skip
        if missing:
            progress.log(f"engines need libtorch at run time for {', '.join(sorted(missing)[:5])}")
            compile_kernels(kernels, isa=isa, with_shim=False)
    return Engines(tuple(entries), "libtorch" if missing else "none")


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


def _compile_cuda(plan: Plan, root: Path, progress: Progress) -> Engines:
    import torch

    from .backends.cuda.engine import compile_engines
    from .backends.cuda.kernels import KernelStore
    from .backends.cuda.tune import Tuner, default_cache

    major, minor = torch.cuda.get_device_capability()
    store = KernelStore(10 * major + minor)
    autotune = plan.recipe.target.autotune
    tuner = Tuner(store, default_cache() if autotune else None, progress.update)
    with progress.stage("compile engines", total=len(plan.graphs)):
        files = compile_engines(
            plan.graphs, root, tuner, store, lambda name: progress.update(name, advance=1),
            tuner.prepare if autotune else None,
        )  # fmt: skip
    tuner.save()
    entries = []
    for shape in plan.recipe.engines():
        graph, built = plan.graphs[shape.name], files[shape.name]
        inputs, outputs = input_buffers(graph), output_buffers(graph)
        entries.append(
            EngineEntry(
                shape.name, "plan", shape.phase, shape.batch, shape.length, f"engines/{shape.name}.plan.json",
                inputs, outputs, tuple(Constant(w, w) for w in built.weights), built.libraries,
                engine_memory_bytes(inputs, outputs, built.plan.arena_bytes),
            )
        )  # fmt: skip
    return Engines(tuple(entries), tuning=tuner.chosen)
