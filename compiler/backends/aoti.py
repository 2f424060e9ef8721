"""The CPU back end: one planned graph in, one shared object out, by AOTInductor.

Ops that Ingot has a kernel for stay calls (C functions in kernels.so); every other Ingot op is replaced by its
reference semantics, which Inductor fuses. Weights stay outside: the engine names them, the runtime binds them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import fx, nn

from ...artifacts.errors import IngotError, ResourceError, UsageError
from ...artifacts.manifest import Buffer, Constant
from ...passes.graph import TracedGraph
from ...runtime.ops.schema import SEMANTICS, overload
from .commands import ENGINE_TIMEOUT_S, inductor_compiler
from .cpu_kernels import C_SHIMS

_NAME = re.compile(r'constants_info_\[(\d+)\]\.name = "([^"]+)";')
_FQN = re.compile(r'constants_info_\[(\d+)\]\.original_fqn = "([^"]+)";')


class _Program(nn.Module):
    """A planned graph as a module on the CPU that torch.export can take."""

    def __init__(self, traced: TracedGraph) -> None:
        super().__init__()
        served = {overload(name) for name in C_SHIMS}
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(traced.graph, mapping)
        output = next(n for n in traced.graph.nodes if n.op == "output")
        graph.output(fx.node.map_arg(output.args[0], mapping.__getitem__))
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
            if node.target in SEMANTICS and node.target not in served:
                node.target = SEMANTICS[node.target]
        root = nn.Module()
        for name in traced.weights.entries:
            like = getattr(traced.gm, name)
            # Never read and never written: the pages of an untouched tensor cost nothing. Inductor clones buffers
            # (which writes to all of them), parameters it leaves alone.
            value = torch.empty(like.shape, dtype=like.dtype)
            root.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.inner = fx.GraphModule(root, graph)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.inner(*inputs)


def input_buffers(traced: TracedGraph) -> tuple[Buffer, ...]:
    """The engine's inputs in the order it takes them."""
    return tuple(
        Buffer(str(n.target), tuple(n.meta["val"].shape), str(n.meta["val"].dtype).removeprefix("torch."))
        for n in traced.graph.nodes
        if n.op == "placeholder"
    )


def output_buffers(traced: TracedGraph) -> tuple[Buffer, ...]:
    """next_tokens [batch] int64, logits [batch, vocabulary] float32, and on the GPU sampled_logits [batch] float32."""
    output = next(n for n in traced.graph.nodes if n.op == "output")
    return tuple(
        Buffer(name, tuple(n.meta["val"].shape), str(n.meta["val"].dtype).removeprefix("torch."))
        for name, n in zip(("next_tokens", "logits", "sampled_logits"), output.args[0])
    )


def compile_engine(
    traced: TracedGraph, name: str, output: Path, isa: str, timeout: float = ENGINE_TIMEOUT_S
) -> tuple[Constant, ...]:
    """Compile one planned graph to the shared object `output`.

    Args:
        timeout: seconds that the compiler may take for it.

    Returns:
        Which of the engine's constants is which weight, in the engine's order.

    Raises:
        ResourceError: the compiler failed; names the engine.
    """
    inputs = tuple(
        torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in traced.graph.nodes if n.op == "placeholder"
    )
    try:
        with torch.no_grad(), inductor_compiler(f"engine {name}", timeout):
            program = torch.export.export(_Program(traced), inputs, strict=False)
            with tempfile.TemporaryDirectory(prefix="ingot-aoti-") as scratch:
                package = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(Path(scratch) / f"{name}.pt2"), inductor_configs=_configs(isa)
                )
                return _unpack(Path(package), output)
    except IngotError:
        raise
    except Exception as error:
        cause: BaseException | None = error  # Inductor wraps what it meets
        while cause is not None and not isinstance(cause, IngotError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise _compiler_error(name, error) from error


def _configs(isa: str) -> dict[str, object]:
    shims = {overload(op): declarations for op, declarations in C_SHIMS.items()}
    configs: dict[str, object] = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.link_libtorch": False,
        "aot_inductor.custom_ops_to_c_shims": shims,
        "always_keep_tensor_constants": True,
        # The number of threads is the machine's that runs the engine, not the one's that built it.
        "cpp.dynamic_threads": True,
        # A parallel region costs microseconds: what a decode step does between products is smaller than that.
        "cpp.min_chunk_size": 16384,
    }
    if isa == "portable":
        configs["cpp.simdlen"] = 256
        # Older torch has no such setting and always compiles for the machine at hand.
        if not hasattr(torch._inductor.config.cpp, "march"):
            raise UsageError(
                'target.isa = "portable" needs torch 2.13',
                f"torch is {torch.__version__}",
                "--set isa=native, or update torch",
            )
        configs["cpp.march"] = "x86-64-v3"
    return configs


def _unpack(package: Path, output: Path) -> tuple[Constant, ...]:
    """Take the shared object out of Inductor's package; read which constants it wants from the generated source."""
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        library = [n for n in names if n.endswith(".wrapper.so")]
        source = [n for n in names if n.endswith(".wrapper.cpp")]
        if len(library) != 1 or len(source) != 1:
            raise ResourceError(
                "AOTInductor made an unexpected package",
                f"it holds {', '.join(names)}",
                "report this with the torch version",
            )
        text = archive.read(source[0]).decode()
        with archive.open(library[0]) as packed, open(output, "wb") as file:
            shutil.copyfileobj(packed, file)
    if strip := shutil.which("strip"):
        subprocess.run([strip, "--strip-unneeded", str(output)], check=False, capture_output=True, timeout=60)
    symbols = dict(_NAME.findall(text))
    weights = dict(_FQN.findall(text))
    if set(symbols) != set(weights):
        raise ResourceError(
            "AOTInductor's constants could not be read",
            "the generated source changed its form",
            "use a torch version the README names",
        )
    order = sorted(symbols, key=int)
    return tuple(Constant(symbols[i], weights[i].removeprefix("inner.")) for i in order)


def missing_symbols(engine: Path, kernels: Path) -> list[str]:
    """Tensor functions that an engine calls and the kernels library does not have: those of ATen.

    An engine without any runs without torch on the machine; one with some needs libtorch.

    Raises:
        ResourceError: binutils' nm, which comes with every compiler, is missing.
    """
    wanted = _symbols(engine, "--undefined-only")
    have = _symbols(kernels, "--defined-only")
    return sorted(name for name in wanted - have if name.startswith(("aoti_torch", "Sleef_")))


def _symbols(library: Path, which: str) -> set[str]:
    try:
        done = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ResourceError(
            f"the symbols of {library.name} cannot be read",
            str(error),
            "install binutils (Debian: apt-get install binutils)",
        ) from error
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.strip()}


def _compiler_error(name: str, error: Exception) -> ResourceError:
    text = str(error)
    why = next(
        (line for line in text.splitlines() if "error:" in line), text.strip().splitlines()[0] if text.strip() else ""
    )
    fix = "check that g++ works and the disk has room; --debug shows the compiler's whole output"
    if (
        isinstance(error, FileNotFoundError)
        or "not find a C++ compiler" in text
        or "InvalidCxxCompiler" in type(error).__name__
    ):
        why, fix = "no C++ compiler was found", "install g++ (Debian: apt-get install g++) or set CXX"
    return ResourceError(f"engine {name} could not be compiled", f"{type(error).__name__}: {why[:500]}", fix)
