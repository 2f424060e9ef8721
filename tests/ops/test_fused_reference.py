"""The GPU's fused ops mean what several plain ones mean, here spelled out with torch alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.runtime.ops import fused_reference, reference
from ingot.runtime.ops.schema import overload
from torch import Tensor
from torch.nn import functional as F

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
ACTIVATIONS = {
    "silu": F.silu, "relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fused_linear(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    defaults: dict[str, Any] = {
        "bias": None, "norm_weight": None, "residual": None, "eps": 1e-5, "offset": 0.0, "narrow_first": True,
        "activation": "", "gate_first": True, "wide": False, "scale": None, "zero": None, "format": "", "group": [],
        "activations": "",
    }  # fmt: skip
    return fused_reference.fused_linear(x, weight, **defaults | options)


@DTYPES
def test_a_product_alone(dtype: torch.dtype) -> None:
    x, weight, bias = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(2, 3, 8), (6, 8), (6,)]))
    assert torch.equal(fused_linear(x, weight), F.linear(x, weight))
    assert torch.equal(fused_linear(x, weight, bias=bias), F.linear(x, weight, bias))


@DTYPES
@pytest.mark.parametrize(("offset", "narrow_first"), [(0.0, True), (1.0, False)])
def test_a_norm_before(dtype: torch.dtype, offset: float, narrow_first: bool) -> None:
    x, weight, gain = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(2, 1, 8), (6, 8), (8,)]))
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    normed = gain * normed.to(dtype) if narrow_first else (normed * (gain.float() + offset)).to(dtype)
    found = fused_linear(x, weight, norm_weight=gain, eps=1e-6, offset=offset, narrow_first=narrow_first)
    assert torch.equal(found, F.linear(normed, weight))


@DTYPES
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_an_activation_behind(dtype: torch.dtype, kind: str, gate_first: bool) -> None:
    x, gate, up = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 8), (5, 8), (5, 8)]))
    weight = torch.cat((gate, up) if gate_first else (up, gate))
    found = fused_linear(x, weight, activation=kind, gate_first=gate_first)
    wanted = ACTIVATIONS[kind](F.linear(x, gate)) * F.linear(x, up)
    assert found.shape == (3, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype == BF16 else 1e-6, atol=1e-6)


@DTYPES
def test_a_residual_behind_is_added_to_the_rounded_product(dtype: torch.dtype) -> None:
    x, weight, residual = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(4, 8), (6, 8), (4, 6)]))
    assert torch.equal(fused_linear(x, weight, residual=residual), F.linear(x, weight) + residual)


def test_everything_at_once() -> None:
    x, weight, bias, gain, residual = (
        normal(*s, seed=i) for i, s in enumerate([(2, 1, 8), (12, 8), (12,), (8,), (2, 1, 6)])
    )
    gate, up = F.linear(F.rms_norm(x, (8,), gain, 1e-5), weight, bias).chunk(2, -1)
    found = fused_linear(x, weight, bias=bias, norm_weight=gain, residual=residual, activation="silu")
    torch.testing.assert_close(found, F.silu(gate) * up + residual)


def test_a_wide_result_is_not_rounded() -> None:
    x, weight, bias = (normal(*s, seed=i, dtype=BF16) for i, s in enumerate([(4, 64), (16, 64), (16,)]))
    found = fused_linear(x, weight, bias=bias, wide=True)
    assert found.dtype == F32
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, F.linear(x, weight, bias).float())


def attention_inputs(dtype: torch.dtype = F32) -> dict[str, Any]:
    """Two rows of 4 heads over 2: one at position 9 of its blocks, one of padding."""
    caches = {f"{n}_cache": normal(9, 4, 2, 6, seed=i, dtype=dtype) for i, n in enumerate("kv")}
    heads = {n: normal(2, count, 1, 6, seed=ord(n), dtype=dtype) for n, count in (("q", 4), ("k", 2), ("v", 2))}
    tables = torch.tensor([[5, 2, 7, 0], [0, 0, 0, 0]], dtype=torch.int32)
    return {**heads, **caches, "block_tables": tables, "positions": torch.tensor([[9], [-1]])}


def attention_step(inputs: dict[str, Any], **options: Any) -> Tensor:
    defaults: dict[str, Any] = {
        "cos": None, "sin": None, "q_norm": None, "k_norm": None, "sinks": None, "eps": 1e-5, "offset": 0.0,
        "narrow_first": True, "scale": 0.4, "window": 0, "softcap": 0.0, "k_scale": None,
        "v_scale": None,
    }  # fmt: skip
    return fused_reference.attention_step(**inputs, **defaults | options)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As a multiplication of complex numbers, pairs being half a head apart."""
    angle = torch.complex(cos[..., :3].double(), sin[..., :3].double())
    turned = torch.complex(x[..., :3].double(), x[..., 3:].double()) * angle
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


@pytest.mark.parametrize("turned", [False, True], ids=["no rope", "rope"])
@pytest.mark.parametrize("norms", [False, True], ids=["no norms", "norms"])
@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(0, 0.0, False), (4, 0.0, True), (0, 3.0, False)])
def test_a_step_is_torchs_attention_over_what_the_cache_holds(
    turned: bool, norms: bool, window: int, softcap: float, with_sinks: bool
) -> None:
    given = attention_inputs()
    angle = normal(2, 1, 1, 3, seed=8)
    cos, sin = (torch.cat((t, t), -1) if turned else None for t in (angle.cos(), angle.sin()))
    q_norm, k_norm = ((normal(6, seed=i) if norms else None) for i in (20, 21))
    sinks = normal(4, seed=9) if with_sinks else None
    q, k, v = given["q"], given["k"], given["v"]
    if q_norm is not None and k_norm is not None:
        q, k = F.rms_norm(q, (6,), q_norm, 1e-5), F.rms_norm(k, (6,), k_norm, 1e-5)
    if cos is not None and sin is not None:
        q, k = rope(q, cos, sin), rope(k, cos, sin)
    # Row 0: tokens 0 to 8 from blocks 5, 2 and 7, and the new one; the window leaves its last tokens.
    keys, values = (
        torch.cat((given[name][[5, 2, 7]].reshape(12, 2, 6)[:9], new[0, :, 0][None])).transpose(0, 1)
        for name, new in (("k_cache", k), ("v_cache", v))
    )
    first = 10 - window if window else 0
    scores = q[0, :, 0].view(2, 2, 6) @ keys[:, first:].transpose(1, 2) * 0.4
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(2, 2, 1)), -1)
    wanted = (scores.softmax(-1)[..., : 10 - first] @ values[:, first:]).reshape(4, 6)

    out = attention_step(
        given, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, sinks=sinks, window=window, softcap=softcap
    )
    assert out.shape == (2, 1, 4, 6) and out.is_contiguous()
    torch.testing.assert_close(out[0, 0], wanted)
    assert not out[1].any(), "padding"


@DTYPES
def test_a_step_writes_the_new_token_alone(dtype: torch.dtype) -> None:
    given, before = attention_inputs(dtype), attention_inputs(dtype)
    k_norm = normal(6, seed=21, dtype=dtype)
    attention_step(given, q_norm=normal(6, seed=20, dtype=dtype), k_norm=k_norm)
    written = {"k": reference.rms_norm(given["k"], k_norm, 1e-5, 0.0, True), "v": given["v"]}
    for name, new in written.items():
        cache, kept = given[f"{name}_cache"], before[f"{name}_cache"]
        assert torch.equal(cache[7, 1], new[0, :, 0])
        kept[7, 1] = new[0, :, 0]
        # The padding row writes to the null block, which nobody reads.
        assert torch.equal(cache[1:], kept[1:])


@DTYPES
def test_a_step_is_the_plain_ops_bit_for_bit(dtype: torch.dtype) -> None:
    given, plain = attention_inputs(dtype), attention_inputs(dtype)
    cos, sin = (normal(2, 1, 1, 6, seed=i, dtype=dtype) for i in (30, 31))
    found = attention_step(given, cos=cos, sin=sin)
    q, k = (torch.ops.ingot.rotate_half(plain[n], cos, sin) for n in "qk")
    slots = torch.ops.ingot.cache_slots(plain["block_tables"], plain["positions"], 4)
    torch.ops.ingot.cache_write(plain["k_cache"], k, slots, None)
    torch.ops.ingot.cache_write(plain["v_cache"], plain["v"], slots, None)
    wanted = torch.ops.ingot.paged_attention(
        q, plain["k_cache"], plain["v_cache"], plain["block_tables"], plain["positions"], 0.4, 0, 0.0, None, None, None
    )
    assert torch.equal(found, wanted)
    assert all(torch.equal(given[n], plain[n]) for n in ("k_cache", "v_cache"))


@DTYPES
def test_whole_tables_give_the_row_of_each_position(dtype: torch.dtype) -> None:
    given, again = attention_inputs(dtype), attention_inputs(dtype)
    cos, sin = (normal(16, 6, seed=i, dtype=dtype) for i in (30, 31))
    rows = torch.tensor([9, 0])
    found = attention_step(given, cos=cos, sin=sin)
    wanted = attention_step(again, cos=cos[rows].view(2, 1, 1, 6), sin=sin[rows].view(2, 1, 1, 6))
    assert torch.equal(found, wanted)
    assert all(torch.equal(given[n], again[n]) for n in ("k_cache", "v_cache"))


@pytest.mark.parametrize(("activation", "wide"), [("", False), ("silu", False), ("", True)])
def test_announced_shapes_are_the_real_ones(activation: str, wide: bool) -> None:
    x, weight = normal(2, 3, 8, dtype=BF16), normal(6, 8, seed=1, dtype=BF16)
    rest: Any = (None, None, None, 0.0, 0.0, False, activation, True, wide, None, None, "", [], "")
    real = overload("fused_linear")(x, weight, *rest)
    announced = overload("fused_linear")(x.to("meta"), weight.to("meta"), *rest)
    assert (announced.shape, announced.dtype, announced.stride()) == (real.shape, real.dtype, real.stride())


def test_a_steps_announced_shape_is_the_real_one() -> None:
    given = attention_inputs()
    rest: Any = (None, None, None, None, None, 0.0, 0.0, False, 0.4, 0, 0.0, None, None)
    real = overload("attention_step")(*given.values(), *rest)
    announced = overload("attention_step")(*(t.to("meta") for t in given.values()), *rest)
    assert (announced.shape, announced.dtype, announced.stride()) == (real.shape, real.dtype, real.stride())


def sampling_inputs(batch: int) -> tuple[Tensor, ...]:
    """Logits, a row greedy, a row drawn from few, the rest drawn from all."""
    temperature, top_k = torch.ones(batch), torch.zeros(batch, dtype=torch.int32)
    temperature[0], top_k[1] = 0.0, 3
    seeds, positions = torch.arange(batch), torch.arange(batch) + 7
    return (
        normal(batch, 50, seed=3),
        temperature,
        top_k,
        torch.full((batch,), 0.9),
        torch.zeros(batch),
        seeds,
        positions,
    )


def test_sampled_tokens_come_with_their_logits() -> None:
    inputs = sampling_inputs(5)
    tokens, logit = fused_reference.sample_with_logit(*inputs)
    assert torch.equal(tokens, reference.sample(*inputs))
    assert logit.tolist() == [inputs[0][row, token].item() for row, token in enumerate(tokens)]


def test_the_logit_of_a_row_with_nan_is_nan() -> None:
    logits, *rest = sampling_inputs(3)
    logits[0, 11] = float("nan")
    assert fused_reference.sample_with_logit(logits, *rest)[1].isnan().tolist() == [True, False, False]


def test_sampling_announces_the_real_shapes() -> None:
    inputs = sampling_inputs(3)
    real = overload("sample_with_logit")(*inputs)
    announced = overload("sample_with_logit")(*(t.to("meta") for t in inputs))
    assert [(t.shape, t.dtype) for t in announced] == [(t.shape, t.dtype) for t in real]
