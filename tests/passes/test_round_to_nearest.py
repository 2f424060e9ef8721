"""Rounding to nearest: what is stored, and that no element is off by more than half a step of its scheme."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ingot.passes.quantize.round_to_nearest import RoundToNearest
from ingot.runtime.ops.quantized import dequantize, unpack_nibbles
from torch import Tensor

finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)
# float16 holds the scales of int4: normal ones between 6e-5 and 65504.
moderate = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-2 else 0.0)


def error(weight: Tensor, parts: dict[str, Tensor], format: str, columns: int) -> Tensor:
    found = dequantize(parts["values"], parts["scale"], parts.get("zero"), format, [1, columns])
    return (found.double() - weight.double()).abs()


@settings(max_examples=100, deadline=None)
@given(arrays("float32", st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite))
def test_int8_is_never_off_by_more_than_half_a_step(weight: Any) -> None:
    given_weight = torch.from_numpy(weight)
    parts = RoundToNearest("int8")(given_weight)
    values, scale = parts["values"], parts["scale"]
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(weight), 1))
    assert values.abs().max() <= 127  # symmetric: -128 is not used
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (error(given_weight, parts, "int8", weight.shape[1]) <= scale.double() * (0.5 + 1e-4)).all()
    largest = given_weight.abs().amax(1, keepdim=True)
    assert torch.allclose(scale[largest > 1e-20], largest[largest > 1e-20] / 127)


@settings(max_examples=100, deadline=None)
@given(arrays("float32", st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite))
def test_fp8_is_never_off_by_more_than_half_a_step_of_e4m3(weight: Any) -> None:
    given_weight = torch.from_numpy(weight)
    parts = RoundToNearest("fp8")(given_weight)
    assert (parts["values"].dtype, parts["scale"].shape) == (torch.float8_e4m3fn, (len(weight), 1))
    assert torch.isfinite(parts["values"].float()).all()
    # 4 significant bits: 2 ** -4 of the number; below 2 ** -6 steps of 2 ** -9.
    allowed = torch.maximum(given_weight.double().abs() * 2**-4, parts["scale"].double() * 2**-10) * (1 + 1e-4)
    assert (error(given_weight, parts, "fp8", weight.shape[1]) <= allowed).all()


@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_int4_is_never_off_by_more_than_half_a_step(symmetric: bool, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([2, 4, 6]))
    shape = (data.draw(st.integers(1, 4)), size * data.draw(st.integers(1, 3)))
    weight = torch.from_numpy(data.draw(arrays("float32", shape, elements=moderate)))
    parts = RoundToNearest("int4", size, symmetric)(weight)
    assert parts["values"].dtype == torch.uint8 and parts["values"].shape == (shape[0], shape[1] // 2)
    assert parts["scale"].dtype == torch.float16 and parts["scale"].shape == (shape[0], shape[1] // size)
    assert ("zero" in parts) is not symmetric
    scale = parts["scale"].double().repeat_interleave(size, 1)
    # Rounding the scale to float16 may move the ends of the range by 7.5 or 15 steps times 2 ** -11.
    assert (error(weight, parts, "int4", size) <= scale * (0.5 + 15 * 2**-11)).all()


def test_int4_by_hand() -> None:
    weight = torch.tensor([[-7.5, 0.0, 7.5, 1.0, 0.0, 0.0, 1.5, 0.75]])
    parts = RoundToNearest("int4", 4)(weight)
    assert parts["scale"].tolist() == [[1.0, torch.tensor(0.2).half().item()]]
    assert unpack_nibbles(parts["values"]).tolist() == [[0, 8, 15, 9, 8, 8, 15, 12]]
    parts = RoundToNearest("int4", 4, symmetric=False)(torch.tensor([[-1.0, 0.0, 14.0, 6.6, 3.0, 0.0, 1.5, 0.6]]))
    assert parts["scale"].tolist() == [[1.0, torch.tensor(0.2).half().item()]]
    assert parts["zero"].tolist() == [[1, 0]]
    assert unpack_nibbles(parts["values"]).tolist() == [[0, 1, 15, 8, 15, 0, 8, 3]]


def test_a_zero_of_a_group_without_negatives_stays_zero() -> None:
    weight = torch.tensor([[5.0, 6.0, 0.0, 7.0]])
    parts = RoundToNearest("int4", 4, symmetric=False)(weight)
    assert dequantize(parts["values"], parts["scale"], parts["zero"], "int4", [1, 4])[0, 2] == 0


@pytest.mark.parametrize("make", [RoundToNearest("int8"), RoundToNearest("fp8"), RoundToNearest("int4", 2),
                                  RoundToNearest("int4", 2, False)], ids=str)  # fmt: skip
def test_groups_of_zeros_and_tiny_numbers(make: RoundToNearest) -> None:
    parts = make(torch.tensor([[0.0, 0.0], [1e-38, -1e-40], [0.0, 2.0]]))
    assert torch.isfinite(parts["scale"]).all() and (parts["scale"] != 0).all()
    found = dequantize(parts["values"], parts["scale"], parts.get("zero"), make.format, [1, 2])
    assert found[:2].abs().max() == 0 and found[2, 0] == 0 and abs(found[2, 1] - 2) <= 0.15


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        RoundToNearest("int3")(torch.ones(1, 2))
