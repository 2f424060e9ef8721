"""From Inductor's wrapper to a list of launches: its own kernels as they are, Ingot's ops through their providers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ....artifacts.errors import ResourceError, UnsupportedModelError
from ....passes.graph import op_name
from ....passes.graph import operands as operands_of
from ....runtime.ops.cuda.spec import Config, Lowering, Operands
from .buffers import Argument, Buffer, Region, Scalar
from .inductor import Wrapped
from .kernels import Compiled, KernelStore
from .program import Program

# Chooses a provider's configuration for one call.
Choose = Callable[[str, Any, Operands], Config]
# Changes what a provider launches; its pointers may then also name inputs of the graph, as "input.NAME".
Amend = Callable[[Lowering], Lowering]
_SCALARS = {"i32": "int32", "i64": "int64", "fp32": "float32", "fp64": "float64", "i1": "int32"}


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel."""

    kernel: Compiled
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    dependent: bool
    label: str
    read_bytes: int


@dataclass
class Lowered:
    """An engine before its arena is planned."""

    launches: list[Launch]
    buffers: list[Buffer]  # of the arena


@dataclass(frozen=True)
class Call:
    """A call of an op that has a provider."""

    op: str
    provider: Any
    operands: Operands


class Lowerer:
    """Walks one wrapper graph.

    Args:
        providers: op overload -> provider module. choose: picks a configuration for a call.
        outputs: names of the graph's results in order; they become buffers of the space "output".
        amend: op overload -> what is to be changed in the launches of its calls.
    """

    def __init__(
        self, program: Program, wrapped: Wrapped, providers: Mapping[Any, Any], store: KernelStore, choose: Choose,
        outputs: Sequence[str], amend: Mapping[Any, Amend],
    ) -> None:  # fmt: skip
        self._program, self._wrapped, self._providers = program, wrapped, providers
        self._store, self._choose, self._outputs, self._amend = store, choose, tuple(outputs), amend
        self._survey = False
        self._written: set[Buffer] = set()
        self.calls: list[Call] = []
        self._values: dict[fx.Node, Any] = {}
        self.launches: list[Launch] = []
        self.buffers: list[Buffer] = []
        self._inputs: dict[str, Region] = {}

    def survey(self) -> list[Call]:
        """The calls of ops with a provider, in order, without compiling anything.

        Raises:
            UnsupportedModelError: as `lower`.
        """
        self._survey = True
        self.lower()
        return self.calls

    def lower(self) -> Lowered:
        """All launches, in order.

        Raises:
            UnsupportedModelError: the graph calls an op without a CUDA kernel; names it.
        """
        names = iter(zip(self._program.inputs, self._program.examples))
        for node in self._wrapped.gm.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._input(*next(names))
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                self._finish(node)
            else:
                raise UnsupportedModelError(
                    f"the graph holds a constant {node.target!r} that is no weight",
                    "Inductor made it while it compiled",
                    "report this with the model's config",
                )
        return Lowered(self.launches, self.buffers)

    def region(self, space: str, name: str, shape: Sequence[int], dtype: torch.dtype) -> Region:
        """A contiguous tensor in a buffer of its own."""
        strides: list[int] = []
        step = 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= max(size, 1)
        buffer = Buffer(space, name, step * dtype.itemsize)
        if space == "arena":
            self.buffers.append(buffer)
        return Region(buffer, 0, tuple(shape), tuple(strides), dtype)

    def _input(self, name: str, example: torch.Tensor) -> Region:
        space = "weight" if name in self._program.weights else "cache" if "_cache_" in name else "input"
        found = self.region(space, name, tuple(example.shape), example.dtype)
        self._inputs[name] = found
        return found

    def _call(self, node: fx.Node) -> Any:
        target, args = node.target, operands_of(node)
        if target is torch.empty_strided:
            dtype: Any = node.kwargs["dtype"]
            return self._empty(tuple(args[0]), tuple(args[1]), dtype)
        if target is torch.as_strided:
            source, shape, strides, start = args
            return self._values[source].viewed(tuple(shape), tuple(strides), int(start))
        if target is operator.getitem:
            return self._values[args[0]][args[1]]
        if "kernel_idx" in node.kwargs:
            return self._triton(node)
        if target in self._providers:
            return self._op(node)
        raise UnsupportedModelError(
            f"the model computes {op_name(node)}, for which the CUDA target has no kernel",
            "its kernel plans hold Triton kernels alone, no library calls",
            "compile it for the CPU (--set target.device=cpu)",
        )

    def _empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Region:
        span = 0 if 0 in shape else sum((s - 1) * t for s, t in zip(shape, strides)) + 1
        buffer = Buffer("arena", "", span * dtype.itemsize)
        self.buffers.append(buffer)
        return Region(buffer, 0, shape, strides, dtype)

    def _triton(self, node: fx.Node) -> None:
        """A kernel of Inductor's own."""
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        call: dict[str, Any] = dict(node.kwargs)
        tuner = self._wrapped.kernels[call["kernel_idx"]]
        given = {**call["kwargs"], **kernel_side_table.get_constant_args(call["constant_args_idx"])}
        x, y, z = (int(size) for size in call["grid"][0])
        arguments: list[Argument] = []
        for name, kind in tuner.triton_meta["signature"].items():
            if kind == "constexpr" or name in tuner.triton_meta["constants"]:
                continue
            value = given[name]
            if kind.startswith("*"):
                arguments.append(self._values[value])
                if not name.startswith("in_ptr"):
                    self._written.add(self._values[value].buffer)
            else:
                arguments.append(Scalar(_SCALARS[kind], value))
        if self._survey:
            return
        kernel = self._store.add_inductor(tuner)
        self._append(Launch(kernel, (x, y, z), tuple(arguments), False, kernel.name, 0))

    def _op(self, node: fx.Node) -> Region | tuple[Region, ...] | None:
        """One of Ingot's ops; its result, several, or none."""
        target: Any = node.target
        schema = target._schema
        given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
        bound = {name: self._values[v] for name, v in given.items() if isinstance(v, fx.Node)}
        tensors = {a.name: given.get(a.name) for a in schema.arguments if "Tensor" in str(a.type)}
        operands_: dict[str, Any] = {n: bound[n].spec() if n in bound else None for n in tensors}
        values = {n: v for n, v in given.items() if n not in tensors}
        stable = frozenset(name for name in operands_ if name in bound and self._is_stable(bound[name].buffer))
        likes = self._results_of(target, given, bound) if schema.returns else ()
        names = ["out"] if len(likes) == 1 else [f"out{i}" for i in range(len(likes))]
        outputs = {name: self.region("arena", "", like.shape, like.dtype) for name, like in zip(names, likes)}
        operands = Operands(operands_, values, {name: region.spec() for name, region in outputs.items()}, stable)
        provider = self._providers[target]
        self.calls.append(Call(op_name(node), provider, operands))
        lowering = self._lowering(self.calls[-1])
        if not self._survey:
            regions = {**bound, **outputs}
            if target in self._amend:
                lowering = self._amend[target](lowering)
                regions |= {f"input.{name}": region for name, region in self._inputs.items()}
            self._append_lowering(lowering, regions)
        self._written |= {bound[a.name].buffer for a in schema.arguments if a.alias_info and a.name in bound}
        results = tuple(outputs.values())
        return results if len(results) > 1 else next(iter(results), None)

    def _lowering(self, call: Call) -> Lowering:
        """The launches of a call; in a survey those of the first guess, to know that there are any.

        Raises:
            UnsupportedModelError: the op's kernels do not take it.
        """
        try:
            if self._survey:
                config: Config = call.provider.candidates(call.operands)[0]
            else:
                config = self._choose(call.op, call.provider, call.operands)
            return call.provider.lower(call.operands, config)
        except ValueError as error:
            raise UnsupportedModelError(
                f"the model calls {call.op} in a way that no CUDA kernel takes",
                str(error)[:500],
                "compile it for the CPU (--set target.device=cpu), or with other shapes",
            ) from error

    def _is_stable(self, buffer: Buffer) -> bool:
        """Whether no launch so far writes it: it was complete before the run began."""
        return buffer.space != "arena" and buffer not in self._written

    @staticmethod
    def _results_of(target: Any, given: Mapping[str, Any], bound: Mapping[str, Region]) -> tuple[torch.Tensor, ...]:
        metas = {
            n: torch.empty_strided(bound[n].shape, bound[n].strides, dtype=bound[n].dtype, device="meta")
            if n in bound else v for n, v in given.items()
        }  # fmt: skip
        results = target(**metas)
        return results if isinstance(results, tuple) else (results,)

    def _append_lowering(self, lowering: Lowering, bound: Mapping[str, Region]) -> None:
        """Append a provider's launches; `bound` gives its operands and outputs by name."""
        regions = dict(bound)
        for name, scratch in lowering.scratch.items():
            made = self.region("arena", "", scratch.shape, getattr(torch, scratch.dtype))
            made.buffer.zeroed = scratch.zeroed
            regions[name] = made
        for call in lowering.calls:
            given = {parameter: regions[operand] for parameter, operand in call.pointers.items()}
            kernel = self._store.add(
                call, [r.dtype for r in given.values()], [r.offset % 16 == 0 for r in given.values()]
            )
            pointers = tuple(given[name] for name in call.function.arg_names if name in given)
            if kernel.scratch_bytes:
                size = kernel.scratch_bytes * math.prod(call.grid)
                own = self.region("arena", "", (size,), torch.uint8)
                own.buffer.exclusive = True
                pointers += (own,)
            self._append(
                Launch(kernel, call.grid, pointers, call.dependent, call.label or kernel.name, call.read_bytes)
            )

    def _append(self, launch: Launch) -> None:
        index = len(self.launches)
        for argument in launch.arguments:
            if isinstance(argument, Region):
                buffer = argument.buffer
                buffer.first = index if buffer.first < 0 else buffer.first
                buffer.last = index
        self.launches.append(launch)

    def _finish(self, node: fx.Node) -> None:
        """Let the graph's results be written where the host reads them."""
        for name, result in zip(self._outputs, node.args[0]):  # type: ignore[arg-type]
            region = self._values[result]
            buffer = region.buffer
            if buffer.space != "arena" or region.offset or buffer.nbytes != region.nbytes:
                raise ResourceError(
                    f"the output {name} lies inside another buffer",
                    "Inductor computes it together with something else",
                    "report this with the model's config",
                )
            buffer.space, buffer.name = "output", name
            self.buffers.remove(buffer)
