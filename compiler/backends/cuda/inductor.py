"""Inductor as a maker of kernels: its wrapper as a graph of allocations, Triton launches and calls of Ingot's ops.

`fx_wrapper` is Inductor's own way to hand over what it would otherwise write as Python; buffers are not reused there,
since the arena is planned later over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Program, swapped

_CONFIG: dict[str, Any] = {
    "fx_wrapper": True,
    "fx_graph_cache": False,
    # In this process, so that the kernels can be looked at; the few leftovers of a graph compile in seconds.
    "compile_threads": 1,
    # Reuse would hide from the arena's planner when a buffer's life ends.
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
    # Checks that the wrapper would run on the host at each call.
    "size_asserts": False,
    "alignment_asserts": False,
    "nan_asserts": False,
    "scalar_asserts": False,
    "assert_indirect_indexing": False,
    # A launch plan needs the cubin and its metadata, not a launcher.
    "use_static_cuda_launcher": False,
    "use_static_triton_launcher": False,
    # Rounds where the model's own ops round: engines are compared with eager transformers.
    "emulate_precision_casts": True,
}


@dataclass(frozen=True)
class Wrapped:
    """Inductor's wrapper: `gm` with a placeholder per input, and the kernels its launches name by index."""

    gm: fx.GraphModule
    kernels: dict[int, Any]  # kernel_idx -> CachingAutotuner


def wrap(program: Program) -> Wrapped:
    """Let Inductor generate the wrapper and compile its kernels.

    Raises:
        RuntimeError: this torch hands over no wrapper graph. Whatever Inductor raises.
    """
    from torch._inductor import config, ir
    from torch._inductor.codegen import wrapper_fxir
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    seen: list[Wrapped] = []

    class Collect(wrapper_fxir.FxConverter):
        def generate(self) -> fx.GraphModule:
            gm = super().generate()
            found = {k.wrapped.kernel_idx: k.tuner for k in self.kernels.values()}
            seen.append(Wrapped(gm, {index: tuner for index, tuner in found.items() if index is not None}))
            return gm

        def _generate_unbacked_symbol_defs(self, line: Any) -> None:
            # Shapes are fixed; an op that returns nothing has no node that the base class could ask for symbols.
            if line.unbacked_bindings:
                super()._generate_unbacked_symbol_defs(line)

    known = {key: value for key, value in _CONFIG.items() if hasattr(config, key)}
    collecting = swapped(wrapper_fxir, "FxConverter", Collect)
    # Inductor puts the IR into the text of its errors, and prints an op with all that it reads: along a residual stream
    # that text doubles with every layer.
    naming = swapped(ir.ExternKernel, "__str__", lambda op: f"{type(op).__name__} {op.name}")
    with config.patch(known), torch.no_grad(), V.set_fake_mode(program.mode), collecting, naming:
        compile_fx_inner(program.gm, program.examples, fx_wrapper=True, is_inference=True)
    if len(seen) != 1:
        raise RuntimeError(f"torch {torch.__version__} made {len(seen)} wrapper graphs instead of one")
    return seen[0]
