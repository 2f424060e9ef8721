"""The reference semantics of norms, activations and products against other formulas; and every op's announced shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.runtime.ops import packed, reference
from ingot.runtime.ops.schema import SEMANTICS, overload
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("narrow_first", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_in_float32_is_torchs(offset: float, narrow_first: bool) -> None:
    x, weight = normal(3, 5, 16), normal(16, seed=1)
    found = reference.rms_norm(x, weight, 1e-5, offset, narrow_first)
    torch.testing.assert_close(found, F.rms_norm(x, (16,), weight + offset, 1e-5))


def test_rms_norm_rounds_where_it_says() -> None:
    x, weight = normal(64, 64, dtype=BF16), normal(64, seed=1, dtype=BF16)
    exact = F.rms_norm(x.double(), (64,), None, 1e-5)
    first = weight * exact.to(BF16)
    last = (weight.double() * exact).to(BF16)
    assert not torch.equal(first, last)
    assert torch.equal(reference.rms_norm(x, weight, 1e-5, 0.0, True), first)
    assert torch.equal(reference.rms_norm(x, weight, 1e-5, 0.0, False), last)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_sums_with_norms_are_sum_and_norm(dtype: torch.dtype) -> None:
    x, y, weight, bias = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 8), (3, 8), (8,), (8,)]))
    total, normed = reference.add_rms_norm(x, y, weight, 1e-5, 0.0, True)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, reference.rms_norm(x + y, weight, 1e-5, 0.0, True))
    total, normed = reference.add_layer_norm(x, y, weight, bias, 1e-5)
    assert torch.equal(total, x + y)
    wanted = F.layer_norm((x + y).double(), (8,), weight.double(), bias.double(), 1e-5)
    assert (normed.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


FORMULAS = {
    "silu": lambda g: g / (1 + torch.exp(-g)),
    "relu": lambda g: g.clamp(min=0),
    "gelu": lambda g: g * 0.5 * (1 + torch.erf(g / 2**0.5)),
    "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
}


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("kind", FORMULAS)
def test_gated_activation(kind: str, gate_first: bool) -> None:
    x = normal(3, 5, 12) * 3
    gate, up = (x[..., :6], x[..., 6:]) if gate_first else (x[..., 6:], x[..., :6])
    found = reference.gated_activation(x, kind, gate_first)
    torch.testing.assert_close(found.double(), FORMULAS[kind](gate.double()) * up.double(), rtol=1e-5, atol=1e-6)


def test_gated_activation_rounds_the_activation() -> None:
    x = normal(64, 64, dtype=BF16)
    gate, up = x.chunk(2, -1)
    found = reference.gated_activation(x, "silu", True)
    assert torch.equal(found, F.silu(gate) * up)
    assert not torch.equal(found, (F.silu(gate.float()) * up.float()).to(BF16))


def test_gated_activation_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="mish"):
        reference.gated_activation(normal(2, 4), "mish", True)


def test_dense_products_are_linear() -> None:
    x, weight, bias = normal(2, 3, 8), normal(5, 8, seed=1), normal(5, seed=2)
    assert torch.equal(reference.linear_dense(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(reference.linear_dense(x, weight), F.linear(x, weight))


def arguments(dtype: torch.dtype, strided: bool = False) -> dict[str, tuple[Any, ...]]:
    """One call of every op of the dialect; `strided`: as they come from transposes and slices."""

    def laid_out(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x

    q, kv = laid_out(normal(2, 4, 3, 8, dtype=dtype)), laid_out(normal(2, 2, 3, 8, dtype=dtype))
    cache, tables = normal(5, 4, 2, 8, dtype=dtype), torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    codes, factors = torch.zeros(5, 4, 2, 8, dtype=torch.int8), torch.ones(5, 4, 2)
    positions, sinks = torch.tensor([[0, 1, 2], [4, 5, -1]]), normal(4, dtype=dtype)
    x, w, v = laid_out(normal(2, 3, 8, dtype=dtype)), normal(6, 8, dtype=dtype), normal(8, dtype=dtype)
    part = normal(2, 3, 12, dtype=dtype)[..., 2:10] if strided else x
    int4, scale, zero = torch.ones(6, 4, dtype=torch.uint8), torch.ones(6, 2), torch.ones(6, 2, dtype=torch.uint8)
    panels = packed.pack_weight(int4, "int4")
    table, row, index = normal(2, 1, 3, 8, dtype=dtype), torch.ones(2), torch.arange(2)
    return {
        "attention": (q, kv, kv, 0, 0.5, 2, 3.0, sinks),
        "paged_attention": (q, codes, codes, tables, positions, 0.5, 0, 0.0, None, factors, factors),
        "cache_slots": (tables, positions, 4),
        "cache_write": (codes, kv, torch.tensor([4, 5, 6, 12, 13, 14]), factors),
        "linear_dense": (part, w, normal(6, dtype=dtype)),
        "linear_quantized": (part, int4, scale, zero, None, "int4", [1, 4], "int8"),
        "embedding_quantized": (index[None], int4, scale, None, torch.empty(0, dtype=dtype), "int4", [1, 4]),
        "linear_packed": (part, panels, packed.pack_groups(scale), None, normal(6, dtype=dtype), 6, "int4", 4, "int8"),
        "embedding_packed": (index[None], panels, None, None, torch.empty(0, dtype=dtype), 8, "int4", 0),
        "rms_norm": (part, v, 1e-5, 1.0, False),
        "add_rms_norm": (x, part, v, 1e-5, 0.0, True),
        "add_layer_norm": (x, part, v, None, 1e-5),
        "gated_activation": (part, "gelu", False),
        "rotate_half": (q, table, table),
        "sample": (normal(2, 9), row, index.int(), row, 0 * row, index, index),
        "fused_linear": (
            *(part, int4, None, v, normal(2, 3, 3, dtype=dtype), 1e-5, 0.0, True, "silu", True, False),
            *(scale, zero, "int4", [1, 4], ""),
        ),
        "attention_step": (
            q[:, :, :1], kv[:, :, :1], kv[:, :, :1], cache, cache.clone(), tables, positions[:, :1],
            table[:, :, :1], table[:, :, :1], v, v, sinks, 1e-5, 0.0, True, 0.5, 2, 3.0, None, None,
        ),
        "sample_with_logit": (normal(2, 9), row, index.int(), row, 0 * row, index, index),
    }  # fmt: skip


def test_every_op_is_covered() -> None:
    assert {overload(name) for name in arguments(torch.float32)} == set(SEMANTICS)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", arguments(torch.float32))
def test_shape_and_schema_are_what_the_op_does(name: str, dtype: torch.dtype, strided: bool) -> None:
    """torch's own check: the schema's mutations and aliases, and shape, dtype and strides on fake tensors."""
    call = arguments(dtype, strided)[name]
    torch.library.opcheck(overload(name), call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", arguments(torch.float32))
def test_the_semantics_expand_into_plain_aten(name: str) -> None:
    """Back ends without a kernel compile these functions: they must trace, and call no op of ours."""
    given_arguments = arguments(BF16)[name]
    tensors = [a for a in given_arguments if isinstance(a, Tensor)]

    def call(*values: Tensor) -> Any:
        rest = iter(values)
        return SEMANTICS[overload(name)](*(next(rest) if isinstance(a, Tensor) else a for a in given_arguments))

    graph = make_fx(call, tracing_mode="fake")(*tensors).graph
    calls = [n.target for n in graph.nodes if n.op == "call_function"]
    assert calls
    assert all("ingot" not in str(target) for target in calls)
