"""The kernel plan's parser is strict: whatever is wrong ends in one error that names the field."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.kernel_plan import (
    PLAN_VERSION,
    KernelPlan,
    PlanArgument,
    PlanKernel,
    PlanLaunch,
    ZeroRegion,
)

MISSING = object()


def argument(space: str, name: str = "", offset: int = 0, nbytes: int = 0) -> PlanArgument:
    return PlanArgument(space, name, offset, nbytes, "", 0, 0.0)


PLAN = KernelPlan(
    PLAN_VERSION,
    "sm_90",
    4096,
    (ZeroRegion(0, 256),),
    (
        PlanKernel("gemv-0123456789ab", "engines/kernels/gemv-0123456789ab.cubin", "gemv", 128, 1024, -1),
        PlanKernel("sample-ba9876543210", "engines/kernels/sample-ba9876543210.cubin", "sample_kernel", 512, 0, 0),
    ),
    (
        PlanLaunch(
            0,
            (64, 1, 1),
            (
                argument("arena", offset=256, nbytes=3840),
                argument("weight", "model__w", 128, 64),
                argument("cache", "k_cache_0", 0, 1 << 40),
                PlanArgument("scalar", "", 0, 0, "int64", -(1 << 63), 0.0),
                PlanArgument("scalar", "", 0, 0, "float32", 0, 1e-5),
                argument("null"),
            ),
            False,
            "fused_linear 64x64",
            8192,
        ),
        PlanLaunch(
            1, (1, 4, 1), (argument("input", "seeds", 0, 32), argument("output", "next_tokens", 0, 32)), True, "", 0
        ),
    ),
)
TREE: dict[str, Any] = json.loads(PLAN.to_json())


def put(path: str, value: Any) -> str:
    """The plan as JSON with the value at "a.0.b" replaced, or removed if MISSING."""
    tree = copy.deepcopy(TREE)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    at: Any = tree
    for part in parents:
        at = at[part]
    if value is MISSING:
        del at[last]
    else:
        at[last] = value
    return json.dumps(tree)


def refusal(text: str | bytes) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        KernelPlan.from_json(text, "decode-b4.plan.json")
    assert caught.value.fix
    assert caught.value.what.startswith("decode-b4.plan.json: ")
    return caught.value


def test_a_plan_comes_back_as_it_was() -> None:
    text = PLAN.to_json()
    assert KernelPlan.from_json(text, "plan") == KernelPlan.from_json(text.encode(), "plan") == PLAN
    assert KernelPlan.from_json(text, "plan").to_json() == text
    assert text.isascii() and text.endswith("}\n") and text.count("\n") == 1


def test_order_and_spacing_do_not_matter() -> None:
    assert KernelPlan.from_json(json.dumps(dict(reversed(TREE.items())), indent=3), "plan") == PLAN


def test_files_are_named_once_in_the_order_of_their_use() -> None:
    doubled = dataclasses.replace(PLAN, kernels=(*PLAN.kernels, PLAN.kernels[0]))
    assert doubled.files() == tuple(kernel.file for kernel in PLAN.kernels)


numbers = st.integers(0, 2**50)  # of the schema
argument_strategy = st.one_of(
    st.builds(argument, st.just("arena"), st.just(""), st.integers(0, 2000), st.integers(0, 2000)),
    st.builds(argument, st.sampled_from(["weight", "input", "output", "cache"]), st.just("name"), numbers, numbers),
    st.builds(PlanArgument, st.just("scalar"), st.just(""), st.just(0), st.just(0),
              st.sampled_from(["int32", "int64", "float32", "float64"]), st.integers(-(2**63), 2**63 - 1),
              st.floats(allow_nan=False, allow_infinity=False)),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(argument_strategy, max_size=8), st.tuples(*[st.integers(1, 2**31 - 1)] * 3), st.booleans())
def test_any_launch_comes_back(arguments: list[PlanArgument], grid: tuple[int, int, int], dependent: bool) -> None:
    launch = PlanLaunch(1, grid, tuple(arguments), dependent, "label", 7)
    plan = dataclasses.replace(PLAN, launches=(launch,))
    assert KernelPlan.from_json(plan.to_json(), "plan") == plan


ARGUMENT = "launches.0.arguments.0"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("arch", "sm_9", "arch"),
        ("arch", "gfx90a", "arch"),
        ("arch", MISSING, "arch"),
        ("arena_bytes", -1, "arena_bytes"),
        ("arena_bytes", "4096", "arena_bytes"),
        ("arena_bytes", 4096.0, "arena_bytes"),
        ("host_code", "rm", "host_code"),
        ("kernels.0.entry", "x", "kernels[0].entry"),
        ("kernels.0.file", "../gemv.cubin", "kernels[0].file"),
        ("kernels.0.file", "/tmp/gemv.cubin", "kernels[0].file"),
        ("kernels.0.symbol", "gemv()", "kernels[0].symbol"),
        ("kernels.0.symbol", "9emv", "kernels[0].symbol"),
        ("kernels.0.threads", 0, "kernels[0].threads"),
        ("kernels.0.threads", 1025, "kernels[0].threads"),
        ("kernels.0.shared_bytes", 232_449, "kernels[0].shared_bytes"),
        ("kernels.0.shared_bytes", True, "kernels[0].shared_bytes"),
        ("kernels.0.carveout", -2, "kernels[0].carveout"),
        ("kernels.0.carveout", 101, "kernels[0].carveout"),
        ("launches.1.kernel", 2, "launches[1].kernel"),
        ("launches.1.kernel", -1, "launches[1].kernel"),
        ("launches.0.grid", [1, 1], "launches[0].grid"),
        ("launches.0.grid", [1, 1, 1, 1], "launches[0].grid"),
        ("launches.0.grid.1", 0, "launches[0].grid[1]"),
        ("launches.0.grid.0", 1 << 31, "launches[0].grid[0]"),
        ("launches.0.grid.2", 1.0, "launches[0].grid[2]"),
        ("launches.0.dependent", 1, "launches[0].dependent"),
        ("launches.0.arguments", [TREE["launches"][0]["arguments"][5]] * 65, "launches[0].arguments"),
        ("launches.0.read_bytes", -1, "launches[0].read_bytes"),
        (f"{ARGUMENT}.space", "host", "launches[0].arguments[0].space"),
        (f"{ARGUMENT}.offset", -1, "launches[0].arguments[0].offset"),
        (f"{ARGUMENT}.offset", MISSING, "launches[0].arguments[0].offset"),
        (f"{ARGUMENT}.dtype", "int8", "launches[0].arguments[0].dtype"),
        (f"{ARGUMENT}.real", 0, "launches[0].arguments[0].real"),
        (f"{ARGUMENT}.integer", 0.5, "launches[0].arguments[0].integer"),
        (f"{ARGUMENT}.stride", 1, "launches[0].arguments[0].stride"),
    ],
)
def test_a_bad_field_is_named(path: str, value: Any, named: str) -> None:
    assert named in str(refusal(put(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "named", "why"),
    [
        (f"{ARGUMENT}.nbytes", 3841, "launches[0].arguments[0]", "ends outside of the arena of 4096 bytes"),
        (f"{ARGUMENT}.offset", 1 << 50, "launches[0].arguments[0]", "ends outside of the arena"),
        ("zeroed.0.nbytes", 4097, "zeroed[0]", "ends outside of the arena"),
        ("zeroed.0.offset", 4000, "zeroed[0]", "ends outside of the arena"),
        ("launches.0.arguments.3.dtype", "", "launches[0].arguments[3]", "a scalar has a dtype"),
        (f"{ARGUMENT}.dtype", "int32", "launches[0].arguments[0]", "a pointer has none"),
        (f"{ARGUMENT}.name", "w", "launches[0].arguments[0]", "a name goes with weights"),
        ("launches.0.arguments.1.name", "", "launches[0].arguments[1]", "a name goes with weights"),
        ("launches.0.arguments.5.name", "w", "launches[0].arguments[5]", "a name goes with weights"),
    ],
)
def test_what_does_not_fit_together_is_named(path: str, value: Any, named: str, why: str) -> None:
    error = str(refusal(put(path, value)))
    assert f"{named}: " in error and why in error


@pytest.mark.parametrize("version", [PLAN_VERSION + 1, 0, "1", 1.0, True, None, MISSING])
def test_another_version_is_refused_before_anything_else(version: Any) -> None:
    tree = json.loads(put("plan_version", version)) | {"a_later_field": 1}
    error = refusal(json.dumps(tree))
    assert error.what.endswith("a kernel plan of another version")
    assert f"this Ingot reads {PLAN_VERSION}" in error.why


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"plan_version": NaN}', b"\xff", PLAN.to_json()[:-9]])
def test_what_is_no_plan(text: str | bytes) -> None:
    refusal(text)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KernelPlan)])
def test_a_key_that_stands_there_twice(field: str) -> None:
    text = PLAN.to_json().rstrip()[:-1] + f',"{field}":1}}'
    assert "twice" in str(refusal(text))
