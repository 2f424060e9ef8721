"""The CUDA back end on a machine without a GPU: kernel plans and sm_90 cubins of tiny models, looked at as data."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from ingot.artifacts.errors import ResourceError, UnsupportedModelError
from ingot.artifacts.kernel_plan import ALIGNMENT, KernelPlan, PlanArgument

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

LAYERS = 2
EM_CUDA = 190


@dataclass(frozen=True)
class Built:
    """A tiny model's plans as they were written, the sizes of what they name, and where their cubins lie."""

    plans: dict[str, KernelPlan]
    texts: dict[str, str]
    sizes: dict[str, dict[str, int]]
    weights: dict[str, tuple[str, ...]]
    root: Path


def build(family: str, dtype: Literal["float32", "bfloat16"], root: Path) -> Built:
    from .tiny_plans import compiled, nbytes, outside, planned

    tiny = planned(family, dtype, root)
    files = compiled(tiny, root)
    texts = {name: (root / "engines" / f"{name}.plan.json").read_text() for name in files}
    plans = {name: KernelPlan.from_json(text, name) for name, text in texts.items()}
    assert plans == {name: engine.plan for name, engine in files.items()}
    graphs = tiny.plan.graphs
    sizes = {
        name: outside(traced) | {n: nbytes(getattr(traced.gm, n)) for n in traced.weights.entries}
        for name, traced in graphs.items()
    }
    return Built(plans, texts, sizes, {n: e.weights for n, e in files.items()}, root)


@pytest.fixture(scope="session", params=[("llama", "bfloat16"), ("qwen3", "float32")], ids="-".join)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    family, dtype = request.param
    return build(family, dtype, tmp_path_factory.mktemp("plans"))


def pointers(plan: KernelPlan) -> list[PlanArgument]:
    return [a for launch in plan.launches for a in launch.arguments if a.space not in ("scalar", "null")]


def test_a_decoder_layer_is_five_launches_in_decode(built: Built) -> None:
    labels = [launch.label.split()[0] for launch in built.plans["decode-b4"].launches]
    layer = ["fused_linear", "attention_step", "fused_linear", "fused_linear", "fused_linear"]
    own = [name for name in labels if not name.startswith("triton_")]
    assert own == [*layer * LAYERS, "fused_linear", "sample"]
    # Inductor's: the embedding, and the rotary tables of all layers.
    assert len(labels) - len(own) <= 3
    first, last = (f(i for i, name in enumerate(labels) if name == "attention_step") for f in (min, max))
    assert not any(name.startswith("triton_") for name in labels[first:last]), "a launch between layers"


def test_arguments_lie_within_what_they_name(built: Built) -> None:
    for name, plan in built.plans.items():
        for argument in pointers(plan):
            size = plan.arena_bytes if argument.space == "arena" else built.sizes[name][argument.name]
            assert argument.nbytes > 0 and argument.offset + argument.nbytes <= size, argument


def test_weights_are_those_the_launches_read(built: Built) -> None:
    for name, plan in built.plans.items():
        assert set(built.weights[name]) == {a.name for a in pointers(plan) if a.space == "weight"}
        assert len(set(built.weights[name])) == len(built.weights[name])


def test_everything_an_engine_has_is_used(built: Built) -> None:
    for name, plan in built.plans.items():
        used = {a.name for a in pointers(plan) if a.name}
        assert used == set(built.sizes[name])


def test_what_must_be_zero_lies_in_front_of_all_arenas(built: Built) -> None:
    """The engines share one arena, so none may write where another's counters are zero between runs."""
    front = max(region.offset + region.nbytes for plan in built.plans.values() for region in plan.zeroed)
    for plan in built.plans.values():
        regions = {(region.offset, region.nbytes) for region in plan.zeroed}
        for argument in pointers(plan):
            if argument.space == "arena" and argument.offset < front:
                assert (argument.offset, argument.nbytes) in regions
        for region in plan.zeroed:
            assert region.offset % ALIGNMENT == 0


def test_cubins_are_elf_files_for_sm_90(built: Built) -> None:
    for plan in built.plans.values():
        assert plan.arch == "sm_90a"
        for kernel in plan.kernels:
            data = (built.root / kernel.file).read_bytes()
            kind, machine = struct.unpack_from("<HH", data, 16)
            assert (data[:4], kind, machine) == (b"\x7fELF", 2, EM_CUDA)
            assert architecture(data) == 90
            assert f".text.{kernel.symbol}\0".encode() in data
    on_disk = {path.relative_to(built.root).as_posix() for path in (built.root / "engines" / "kernels").iterdir()}
    assert on_disk == {kernel.file for plan in built.plans.values() for kernel in plan.kernels}


def architecture(elf: bytes) -> int:
    """The SM a cubin is for: in its ELF header's flags, further up from ABI version 8 (CUDA 13) on."""
    (flags,) = struct.unpack_from("<I", elf, 48)
    return flags >> 8 & 0xFF if elf[8] >= 8 else flags & 0xFF


def test_grids_and_blocks_are_possible(built: Built) -> None:
    for plan in built.plans.values():
        for launch in plan.launches:
            assert launch.grid[1] <= 65535 and launch.grid[2] <= 65535
        assert all(kernel.threads % 32 == 0 for kernel in plan.kernels)


def test_only_our_kernels_are_dependent(built: Built) -> None:
    """Inductor's kernels do not wait for the launch before them, so they must not start before it has ended."""
    for plan in built.plans.values():
        for launch in plan.launches:
            assert launch.dependent == (not plan.kernels[launch.kernel].name.startswith("triton_")), launch.label


def test_products_say_how_many_bytes_they_read(built: Built) -> None:
    for name, plan in built.plans.items():
        for launch in plan.launches:
            if launch.label.startswith("fused_linear"):
                weight = next(a for a in launch.arguments if a.space == "weight")
                assert launch.read_bytes == built.sizes[name][weight.name]


@pytest.mark.parametrize("built", [("qwen3", "float32")], ids="-".join, indirect=True)
def test_two_compilations_give_the_same(built: Built, tmp_path: Path) -> None:
    again = build("qwen3", "float32", tmp_path)
    assert again.texts == built.texts
    kernels = [path.name for path in sorted((built.root / "engines" / "kernels").iterdir())]
    assert [path.name for path in sorted((tmp_path / "engines" / "kernels").iterdir())] == kernels


def test_an_op_without_a_kernel_is_named(tmp_path: Path) -> None:
    from .tiny_plans import compiled, planned

    with pytest.raises(UnsupportedModelError, match=r"aten\.\w+, for which the CUDA target has no kernel") as caught:
        compiled(planned("mixtral", "float32", tmp_path), tmp_path)
    assert "target.device=cpu" in caught.value.fix


def test_whatever_goes_wrong_names_the_engine(tmp_path: Path) -> None:
    from .tiny_plans import compiled, planned

    def choose(op: str, provider: object, operands: object) -> Any:
        raise RuntimeError("no such luck")

    with pytest.raises(ResourceError, match=r"engine decode-b4 could not be compiled.*\n.*RuntimeError: no such luck"):
        compiled(planned("llama", "float32", tmp_path), tmp_path, choose)


def test_cubins_hold_no_path_of_the_machine_that_built_them(built: Built) -> None:
    here = str(Path(__file__).resolve().parents[2]).encode()
    for path in (built.root / "engines" / "kernels").glob("*.cubin"):
        content = path.read_bytes()
        assert here not in content and b"site-packages" not in content and b"torchinductor" not in content, path.name
