"""Tiny models planned for CUDA and compiled without a GPU, and what the simulator needs to run their plans.

A plan names cubins, which only a GPU runs. `RecordingStore` notes where each came from, so that `plan_simulator.py`
can run the same launches from source.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from ingot.compiler.backends.cuda.engine import OUTPUTS, EngineFiles, compile_engines
from ingot.compiler.backends.cuda.kernels import Compiled, KernelStore
from ingot.compiler.backends.cuda.lower import Choose
from ingot.compiler.console import SilentProgress
from ingot.compiler.families import recipe_for, subjects
from ingot.compiler.plan import Plan, make_plan
from ingot.compiler.random_weights import RandomCheckpoint
from ingot.compiler.recipe_sections import Group, Quantization, Target
from ingot.passes.graph import TracedGraph
from ingot.passes.weights import Load
from ingot.runtime.ops.cuda.spec import TRITON_DTYPES, KernelCall
from safetensors.torch import save_file

from .offline_gpu import pretend

Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Tiny:
    """A planned family (decode of 4 rows, prefill of one chunk) and its weights."""

    plan: Plan
    load: Load


def planned(
    family: str, dtype: Dtype, folder: Path, device: Device = "cuda", chunk: int = 16, groups: Sequence[Group] = ()
) -> Tiny:
    """The family's engines after all passes for `device`, with random weights of a size that lets tokens differ."""
    folder.mkdir(parents=True, exist_ok=True)
    (subject,) = subjects([family])
    (folder / "config.json").write_text(json.dumps(subject.config))
    recipe = recipe_for(folder, "tiny", "random")
    model = dataclasses.replace(recipe.model, dtype=dtype)
    shapes = dataclasses.replace(recipe.shapes, prefill_lengths=(chunk,))
    quantization = Quantization(groups=tuple(groups))
    recipe = dataclasses.replace(
        recipe, target=Target(device=device), model=model, shapes=shapes, quantization=quantization
    )
    plan, module = make_plan(recipe, SilentProgress())
    sizes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    checkpoint = RandomCheckpoint(sizes, getattr(torch, dtype), 3)
    tied = {n: m for n, p in module.named_parameters(remove_duplicate=False)
            for m, q in module.named_parameters() if p is q}  # fmt: skip

    def load(name: str) -> torch.Tensor:
        value = checkpoint.load(tied[name])
        # What scales something lies around 1, the rest around 0.
        return (value - 1) * 5 + 1 if value.dim() < 2 and not name.endswith("bias") else value * 6

    return Tiny(plan, load)


def compiled(
    tiny: Tiny, root: Path, choose: Choose | None = None, store: KernelStore | None = None
) -> dict[str, EngineFiles]:
    """Kernel plans and sm_90 cubins of all its engines, in `root`."""
    options: dict[str, Any] = {"choose": choose} if choose else {}
    with pretend():
        return compile_engines(tiny.plan.graphs, root, store=store or KernelStore(), **options)


class RecordingStore(KernelStore):
    """A store that knows of each kernel what it was compiled from."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[str, dict[str, Any]] = {}

    def add(self, call: KernelCall, dtypes: Sequence[torch.dtype], aligned: Sequence[bool]) -> Compiled:
        """See `KernelStore.add`."""
        found = super().add(call, dtypes, aligned)
        types = {name: _type(d) for name, d in zip(call.pointers, dtypes)}
        self.origins[found.name] = {
            "module": call.function.__module__, "function": call.function.__name__,
            "constants": dict(call.constants), "types": [types[n] for n in call.function.arg_names if n in types],
        }  # fmt: skip
        return found

    def add_inductor(self, tuner: Any) -> Compiled:
        """See `KernelStore.add_inductor`."""
        found = super().add_inductor(tuner)
        given = {**tuner.triton_meta["constants"], **tuner.compile_results[0].config.kwargs}
        signature: Mapping[str, str] = tuner.triton_meta["signature"]
        names = {short: torch_name for torch_name, short in TRITON_DTYPES.items()}
        self.origins[found.name] = {
            "file": tuner.fn.fn.__code__.co_filename, "function": tuner.fn.__name__, "constants": given,
            "types": [
                names[kind.removeprefix("*")] for name, kind in signature.items()
                if kind != "constexpr" and name not in given
            ],
        }  # fmt: skip
        return found


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def outside(traced: TracedGraph) -> dict[str, int]:
    """Bytes of an engine's inputs, outputs and caches by name."""
    output = next(n for n in traced.graph.nodes if n.op == "output")
    named = {str(n.target): n for n in traced.graph.nodes if n.op == "placeholder"}
    named |= dict(zip(OUTPUTS, output.args[0]))
    return {name: nbytes(node.meta["val"]) for name, node in named.items()}


def nbytes(value: torch.Tensor) -> int:
    """Bytes of a contiguous tensor, on `meta` too."""
    return value.numel() * value.dtype.itemsize


def record(tiny: Tiny, root: Path, choose: Choose | None = None) -> None:
    """Compile into `root`, with all that `plan_simulator.py` needs: sources of the kernels, weights, sizes."""
    store = RecordingStore()
    compiled(tiny, root, choose, store)
    for number, origin in enumerate(store.origins.values()):
        if "file" in origin:
            origin["file"] = str(shutil.copy(origin["file"], root / f"inductor_{number}.py"))
    weights: dict[str, torch.Tensor] = {}
    for name, traced in tiny.plan.graphs.items():
        for attribute in traced.weights.entries:
            value = traced.weights.evaluate(attribute, tiny.load).contiguous()
            known = weights.setdefault(attribute, value)
            # float8 tensors cannot be compared, their bytes can.
            if not torch.equal(known.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)):
                raise ValueError(f"{attribute} is another weight in {name}")
    sizes = {name: outside(traced) for name, traced in tiny.plan.graphs.items()}
    save_file({n: t.clone() for n, t in weights.items()}, root / "weights.safetensors")
    (root / "sizes.json").write_text(json.dumps(sizes))
    (root / "origins.json").write_text(json.dumps(store.origins))


def fewest_programs(kind: str) -> Choose:
    """A choice of the configuration whose launches have the fewest programs, if possible of a kind ("gemv")."""

    def choose(op: str, provider: Any, operands: Any) -> Any:
        def programs(config: Any) -> tuple[bool, int]:
            calls = provider.lower(operands, config).calls
            return config.get("kind", kind) != kind, sum(math.prod(call.grid) for call in calls)

        return min(provider.candidates(operands), key=programs)

    return choose
