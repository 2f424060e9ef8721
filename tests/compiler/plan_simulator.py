"""Runs kernel plans on the CPU: every launch from its Triton source in Triton's interpreter, over one arena of bytes.

What it checks of a plan besides its results: no launch touches a byte outside its arguments, none writes to a weight,
zeroed regions are zero again after each run. All memory that a run should not read is NaN. A program of its own
(TRITON_INTERPRET=1): `plan_simulator.py FOLDER`, where the folder holds what `tiny_plans.record` wrote and `steps.pt`,
a list of (engine, inputs by name); it writes `results.pt`, a list of outputs by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

OUTPUTS = {"next_tokens": torch.int64, "logits": torch.float32, "sampled_logits": torch.float32}


class Simulator:
    """The engines of one folder, with their weights, one arena, one cache, and inputs and outputs of each."""

    def __init__(self, root: Path) -> None:
        from ingot.artifacts.kernel_plan import KernelPlan

        self._origins = json.loads((root / "origins.json").read_text())
        sizes = json.loads((root / "sizes.json").read_text())
        self.plans = {
            name: KernelPlan.from_json((root / "engines" / f"{name}.plan.json").read_text(), name) for name in sizes
        }
        weights = load_file(root / "weights.safetensors")
        self._weights = {name: value.reshape(-1).view(torch.uint8) for name, value in weights.items()}
        self._arena = poisoned(max(plan.arena_bytes for plan in self.plans.values()))
        self._zeroed = [(r.offset, r.offset + r.nbytes) for plan in self.plans.values() for r in plan.zeroed]
        for start, end in self._zeroed:
            self._arena[start:end] = 0
        self._named = {name: {n: poisoned(size) for n, size in own.items()} for name, own in sizes.items()}
        shared = next(iter(self._named.values()))
        for own in self._named.values():
            own.update({n: shared[n] for n in own if "_cache_" in n})
        self._functions: dict[str, Any] = {}
        self.guard = Guard()

    def run(self, engine: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One run after writing `inputs`; those left out are as the run before left them."""
        plan, named = self.plans[engine], self._named[engine]
        for name, value in inputs.items():
            named[name].copy_(value.contiguous().reshape(-1).view(torch.uint8))
        # All engines keep the front of the arena, up to the last byte that any of them wants to be zero.
        self._arena[max((end for _, end in self._zeroed), default=0) :] = 0xFF
        for number, launch in enumerate(plan.launches):
            kernel = plan.kernels[launch.kernel]
            try:
                self._launch(kernel.name, launch, named)
            except Exception as error:
                raise RuntimeError(f"{engine}, launch {number}, {launch.label}: {error}") from error
        for start, end in self._zeroed:
            if self._arena[start:end].any():
                raise RuntimeError(f"{engine} leaves bytes {start} to {end} of the arena behind without zeroing them")
        return {name: named[name].clone().view(dtype) for name, dtype in OUTPUTS.items()}

    def _launch(self, name: str, launch: Any, named: Mapping[str, Tensor]) -> None:
        origin = self._origins[name]
        arguments: list[Any] = []
        self.guard.clear()
        given = [a for a in launch.arguments if a.space != "null"]
        for argument, dtype in zip(given, origin["types"], strict=True):
            if argument.space == "scalar":
                arguments.append(argument.integer if argument.dtype.startswith("int") else argument.real)
                continue
            memory = {"arena": self._arena, "weight": self._weights.get(argument.name)}.get(
                argument.space, named.get(argument.name)
            )
            if memory is None or argument.offset + argument.nbytes > len(memory):
                raise RuntimeError(f"{argument} lies outside")
            view = memory[argument.offset : argument.offset + argument.nbytes].view(getattr(torch, dtype))
            self.guard.allow(view, writable=argument.space != "weight")
            arguments.append(view)
        constants = {k: tuple(v) if isinstance(v, list) else v for k, v in origin["constants"].items()}
        if "PDL" in constants:
            constants["PDL"] = False
        self._function(name, origin)[launch.grid](*_in_order(self._functions[name], arguments, constants))

    def _function(self, name: str, origin: Mapping[str, Any]) -> Any:
        if name not in self._functions:
            if "file" in origin:
                spec = importlib.util.spec_from_file_location(name.replace("-", "_"), origin["file"])
                if spec is None or spec.loader is None:
                    raise RuntimeError(f"no module in {origin['file']}")
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            else:
                module = importlib.import_module(origin["module"])
            self._functions[name] = getattr(module, origin["function"])
        return self._functions[name]


def poisoned(size: int) -> Tensor:
    """Bytes that are NaN as floats and -1 as integers."""
    return torch.full((size,), 0xFF, dtype=torch.uint8)


def _in_order(function: Any, arguments: list[Any], constants: Mapping[str, Any]) -> list[Any]:
    """Arguments as the plan orders them in the places that constants leave free."""
    free = iter(arguments)
    return [constants[name] if name in constants else next(free) for name in function.arg_names]


class Guard:
    """Keeps a launch's loads and stores within its arguments."""

    def __init__(self) -> None:
        from triton.runtime import interpreter

        builder: Any = interpreter.InterpreterBuilder
        self._ranges: list[tuple[int, int, bool]] = []
        load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

        def guarded_load(this: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._check(ptrs, mask, False)
            return load(this, ptrs, mask, *rest)

        def guarded_store(this: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._check(ptrs, mask, True)
            return store(this, ptrs, value, mask, *rest)

        def guarded_atomic(this: Any, op: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._check(ptrs, mask, True)
            return atomic(this, op, ptrs, value, mask, *rest)

        builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
        builder.create_atomic_rmw = guarded_atomic

    def clear(self) -> None:
        """Allow nothing."""
        self._ranges = []

    def allow(self, view: Tensor, writable: bool) -> None:
        """Allow these bytes."""
        start = view.data_ptr()
        self._ranges.append((start, start + view.numel() * view.element_size(), writable))

    def _check(self, ptrs: Any, mask: Any, writes: bool) -> None:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        first = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))
        first = first[np.broadcast_to(mask.data, first.shape).astype(bool)].astype(np.int64)
        inside = np.zeros(first.shape, bool)
        for low, high, writable in self._ranges:
            if writable or not writes:
                inside |= (first >= low) & (first + size <= high)
        if not inside.all():
            deed = "writes" if writes else "reads"
            raise RuntimeError(f"it {deed} {(~inside).sum()} elements outside of its arguments")


def patch_once() -> None:
    """Put the interpreter's functions in the place of Triton's for good: it does so again for every call otherwise."""
    from triton import language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def interpret_inductor() -> None:
    """Let Inductor's files be imported for the interpreter: no tuner, and numpy for libdevice."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton import language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def plain(*_args: Any, **_options: Any) -> Callable[[Any], Any]:
        return lambda function: function

    for name in ("pointwise", "reduction", "persistent_reduction", "template", "foreach", "cooperative_reduction"):
        setattr(triton_heuristics, name, plain)
    triton_helpers.set_driver_to_gpu = lambda: None

    def numpy_function(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
        return lambda x: tl.core.tensor(TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

    erf = np.vectorize(math.erf, otypes=[np.float32])
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt, "exp": np.exp, "tanh": np.tanh, "erf": erf, "log": np.log,
        "sin": np.sin, "cos": np.cos,
    }  # fmt: skip
    for name, function in functions.items():
        setattr(libdevice, name, numpy_function(function))


def main(root: Path) -> None:
    """See the file's docstring."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "ops" / "cuda"))
    repairs: Any = importlib.import_module("interpreter_repairs")
    repairs.repair()
    interpret_inductor()
    patch_once()
    simulator = Simulator(root)
    steps = torch.load(root / "steps.pt", weights_only=True)
    torch.save([simulator.run(engine, inputs) for engine, inputs in steps], root / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
