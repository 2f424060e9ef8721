"""The CUDA back end: planned graphs in, kernel plans and cubins out.

All engines of a build are lowered first, since they share one arena whose zeroed front must have one size; then each
gets its arena and its `plan.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....artifacts.errors import IngotError, ResourceError
from ....artifacts.kernel_plan import (
    PLAN_VERSION,
    KernelPlan,
    PlanArgument,
    PlanKernel,
    PlanLaunch,
    ZeroRegion,
)
from ....passes.graph import TracedGraph
from ....runtime.ops.cuda.spec import Lowering
from ....runtime.ops.schema import overload
from . import arena
from .buffers import Argument, Region, Scalar
from .inductor import wrap
from .kernels import Compiled, KernelStore, without_line_info
from .lower import Call, Choose, Lowered, Lowerer
from .program import make_program

OUTPUTS = ("next_tokens", "logits", "sampled_logits")
KERNELS_FOLDER = "engines/kernels"


@dataclass
class EngineFiles:
    """What one engine became: its plan, the weights it reads, and its cubins' paths."""

    plan: KernelPlan
    weights: tuple[str, ...]
    libraries: tuple[str, ...]


def providers() -> dict[Any, Any]:
    """Op overload -> the module that lowers it to Triton kernels."""
    from ....runtime.ops.cuda import attention_step, cache_write, linear, paged_attention, sample

    modules = {
        "fused_linear": linear, "attention_step": attention_step, "paged_attention": paged_attention,
        "cache_write": cache_write, "sample_with_logit": sample,
    }  # fmt: skip
    return {overload(name): module for name, module in modules.items()}


def first_candidate(op: str, provider: Any, operands: Any) -> Any:
    """The configuration that a provider thinks best, for machines that cannot measure."""
    return provider.candidates(operands)[0]


def compile_engines(
    graphs: Mapping[str, TracedGraph],
    root: Path,
    choose: Choose = first_candidate,
    store: KernelStore | None = None,
    progress: Callable[[str], None] = lambda name: None,
    prepare: Callable[[list[list[Call]]], None] | None = None,
) -> dict[str, EngineFiles]:
    """Compile planned graphs into `root`/engines: NAME.plan.json each, and the cubins they share.

    Args:
        choose: the configuration of one call; prepare: told of the calls of each engine before the first is asked for.

    Raises:
        UnsupportedModelError: a graph calls an op without a CUDA kernel. ResourceError: the compiler failed.
    """
    store = store or KernelStore()
    lowered: dict[str, Lowered] = {}
    with without_line_info():
        lowerers = {name: _prepare(name, traced, store, choose) for name, traced in graphs.items()}
        if prepare is not None:
            calls: list[list[Call]] = []
            for name, make in lowerers.items():
                with _named(f"engine {name}"):
                    calls.append(make().survey())
            with _named("a kernel that was to be measured"):
                prepare(calls)
        for name, make in lowerers.items():
            progress(name)
            with _named(f"engine {name}"):
                lowered[name] = make().lower()
    reserved = max(arena.zeroed_bytes(engine.buffers) for engine in lowered.values())
    folder = root / KERNELS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, engine in lowered.items():
        size = arena.place(engine.buffers, reserved)
        files = _emit(engine, size, store.arch)
        (root / "engines" / f"{name}.plan.json").write_text(files.plan.to_json())
        found[name] = files
    used = {path for files in found.values() for path in files.libraries}
    for kernel in store.kernels.values():
        if (path := _path(kernel)) in used:
            (root / path).write_bytes(kernel.cubin)
    return found


def _prepare(name: str, traced: TracedGraph, store: KernelStore, choose: Choose) -> Callable[[], Lowerer]:
    """Let Inductor make its kernels; returns what makes lowerers of the result."""
    served = providers()
    with _named(f"engine {name}"):
        program = make_program(traced, frozenset(served))
        wrapped = wrap(program)
    amend = {overload("sample_with_logit"): _advancing} if name.startswith("decode") else {}
    return lambda: Lowerer(program, wrapped, served, store, choose, OUTPUTS, amend)


def _advancing(lowering: Lowering) -> Lowering:
    """A decode engine's sampler, its last launch, also turns its tokens into the next step's input."""
    from ....runtime.ops.cuda.sample import with_advance

    return with_advance(lowering, "input.tokens", "input.positions")


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever goes wrong inside a library becomes one error that says what was being compiled."""
    try:
        yield
    except IngotError:
        raise
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause.__cause__, BaseException) and not isinstance(cause, IngotError):
            cause = cause.__cause__
        if isinstance(cause, IngotError):
            raise cause from error
        first = (str(error).strip().splitlines() or [""])[0]
        raise ResourceError(
            f"{what} could not be compiled",
            f"{type(error).__name__}: {first[:500]}",
            "check the versions of torch and triton; --debug shows the whole output",
        ) from error


def _path(kernel: Compiled) -> str:
    return f"{KERNELS_FOLDER}/{kernel.name}.cubin"


def _emit(engine: Lowered, arena_bytes: int, arch: str) -> EngineFiles:
    kernels: dict[str, int] = {}
    listed: list[PlanKernel] = []
    launches = []
    weights: dict[str, None] = {}
    for launch in engine.launches:
        kernel = launch.kernel
        if kernel.name not in kernels:
            kernels[kernel.name] = len(listed)
            listed.append(
                PlanKernel(
                    kernel.name, _path(kernel), kernel.symbol, kernel.threads, kernel.shared_bytes, kernel.carveout
                )
            )
        for argument in launch.arguments:
            if isinstance(argument, Region):
                buffer = argument.buffer
                if buffer.space == "weight":
                    weights[buffer.name] = None
        arguments = tuple(_argument(a) for a in launch.arguments) + (_NULL,) * kernel.hidden
        launches.append(
            PlanLaunch(kernels[kernel.name], launch.grid, arguments, launch.dependent, launch.label, launch.read_bytes)
        )
    zeroed = tuple(ZeroRegion(b.offset, b.nbytes) for b in engine.buffers if b.zeroed)
    plan = KernelPlan(PLAN_VERSION, arch, arena_bytes, zeroed, tuple(listed), tuple(launches))
    return EngineFiles(plan, tuple(weights), plan.files())


_NULL = PlanArgument("null", "", 0, 0, "", 0, 0.0)


def _argument(argument: Argument) -> PlanArgument:
    if isinstance(argument, Scalar):
        whole = argument.dtype.startswith("int")
        integer, real = (int(argument.value), 0.0) if whole else (0, float(argument.value))
        return PlanArgument("scalar", "", 0, 0, argument.dtype, integer, real)
    buffer = argument.buffer
    base = buffer.offset if buffer.space == "arena" else 0
    return PlanArgument(buffer.space, buffer.name, base + argument.offset, argument.nbytes, "", 0, 0.0)
