"""The reference semantics of attention and its cache against formulas of other authors: torch's SDPA, plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.runtime.ops import reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def visible(length: int, window: int) -> Tensor:
    """[query, key]: what a causal query sees, written as a loop."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            mask[query, key] = window == 0 or query - key < window
    return mask


shapes = {
    "batch": st.integers(1, 3), "groups": st.integers(1, 3), "kv_heads": st.integers(1, 3), "length": st.integers(1, 9),
    "dim": st.sampled_from([1, 4, 7]), "v_dim": st.sampled_from([2, 5]), "window": st.integers(0, 10),
    "seed": st.integers(0, 999),
}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_attention_is_torchs(
    batch: int, groups: int, kv_heads: int, length: int, dim: int, v_dim: int, window: int, seed: int
) -> None:
    q = normal(batch, kv_heads * groups, length, dim, seed=seed)
    k, v = normal(batch, kv_heads, length, dim, seed=seed + 1), normal(batch, kv_heads, length, v_dim, seed=seed + 2)
    wanted = scaled_dot_product_attention(
        q, k, v, attn_mask=visible(length, window), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    found = reference.attention(q, k, v, 5, 0.3, window, 0.0)
    assert found.shape == (batch, length, kv_heads * groups, v_dim)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention of one row as sums over visible keys in float64, [length, heads, v_dim]."""
    heads, length, _ = q.shape
    out = torch.zeros(length, heads, v.shape[-1], dtype=torch.float64)
    for head in range(heads):
        kv = head * k.shape[0] // heads
        for query in range(length):
            keys = [i for i in range(k.shape[1]) if mask[query, i]]
            scores = [float(q[head, query].double() @ k[kv, i].double()) * scale for i in keys]
            scores = [softcap * math.tanh(s / softcap) if softcap else s for s in scores]
            weights = [math.exp(s) for s in scores]
            total = sum(weights) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
            for weight, i in zip(weights, keys):
                out[query, head] += weight / total * v[kv, i].double()
    return out


@settings(max_examples=25, deadline=None)
@given(
    softcap=st.sampled_from([0.0, 0.5, 3.0]),
    with_sinks=st.booleans(),
    window=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_softcap_and_sinks(softcap: float, with_sinks: bool, window: int, seed: int) -> None:
    q, k, v = normal(2, 4, 6, 4, seed=seed), normal(2, 2, 6, 4, seed=seed + 1), normal(2, 2, 6, 3, seed=seed + 2)
    sinks = normal(4, seed=seed + 3) * 2 if with_sinks else None
    found = reference.attention(q, k, v, 0, 0.7, window, softcap, sinks)
    for row in range(2):
        wanted = by_hand(q[row], k[row], v[row], visible(6, window), 0.7, softcap, sinks)
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-5, atol=1e-6)


def test_attention_computes_in_float32_and_answers_in_its_inputs_dtype() -> None:
    q, k, v = (normal(1, 2, 5, 8, seed=i).bfloat16() for i in range(3))
    found = reference.attention(q, k, v, 0, 0.5, 0, 0.0)
    assert found.dtype == torch.bfloat16
    wide = reference.attention(q.float(), k.float(), v.float(), 0, 0.5, 0, 0.0)
    assert torch.equal(found, wide.bfloat16())


def test_very_large_scores_do_not_overflow() -> None:
    q = k = torch.full((1, 1, 3, 4), 100.0)
    v = torch.arange(3.0).reshape(1, 1, 3, 1)
    found = reference.attention(q, k, v, 0, 1.0, 0, 0.0, torch.tensor([-1e4]))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 0.5, 1.0]))


class Cache:
    """Sequences in scattered blocks of a cache whose every other slot is NaN."""

    def __init__(self, lengths: list[int], block_size: int, seed: int, kv_heads: int = 2, dim: int = 4, v_dim: int = 3):
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-n // block_size) for n in lengths]
        free = (torch.randperm(sum(blocks) + 2, generator=generator) + 1).tolist()
        self.tables = torch.zeros(len(lengths), max(*blocks, 1) + 1, dtype=torch.int32)
        self.k = torch.full((len(free) + 1, block_size, kv_heads, dim), NAN)
        self.v = torch.full((len(free) + 1, block_size, kv_heads, v_dim), NAN)
        self.rows: list[tuple[Tensor, Tensor]] = []
        for row, (length, count) in enumerate(zip(lengths, blocks)):
            mine, free = free[:count], free[count:]
            self.tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
            k = torch.randn(kv_heads, length, dim, generator=generator)
            v = torch.randn(kv_heads, length, v_dim, generator=generator)
            self.rows.append((k, v))
            positions = torch.arange(length)[None]
            slots = reference.cache_slots(self.tables[row : row + 1], positions, block_size)
            reference.cache_write(self.k, k[None], slots)
            reference.cache_write(self.v, v[None], slots)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3), new=st.integers(1, 4),
    block_size=st.sampled_from([1, 2, 4]),
    window=st.integers(0, 6), softcap=st.sampled_from([0.0, 2.0]), with_sinks=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_paged_attention_reads_its_own_blocks_alone(
    lengths: list[int], new: int, block_size: int, window: int, softcap: float, with_sinks: bool, seed: int
) -> None:
    """The last `new` tokens of each row, over scattered blocks, equal attention over the row's own sequence.

    Every slot that is not a row's is NaN: one that reaches any product would show.
    """
    cache = Cache(lengths, block_size, seed)
    q = normal(len(lengths), 4, new, 4, seed=seed)
    positions = torch.full((len(lengths), new), -1)
    for row, length in enumerate(lengths):
        count = min(new, length)
        positions[row, :count] = torch.arange(length - count, length)
    sinks = normal(4, seed=seed + 1) if with_sinks else None
    found = reference.paged_attention(q, cache.k, cache.v, cache.tables, positions, 0.5, window, softcap, sinks)
    assert found.shape == (len(lengths), new, 4, 3)
    for row, length in enumerate(lengths):
        count = min(new, length)
        k, v = cache.rows[row]
        mask = visible(length, window)[length - count :]
        wanted = by_hand(q[row, :, :count], k, v, mask, 0.5, softcap, sinks)
        torch.testing.assert_close(found[row, :count].double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[row, count:], torch.zeros(new - count, 4, 3)), "padding gives zeros"


def test_a_row_of_padding_alone_is_zero() -> None:
    cache = Cache([5], 4, 0)
    tables, positions = torch.zeros(1, 3, dtype=torch.int32), torch.full((1, 2), -1)
    found = reference.paged_attention(normal(1, 4, 2, 4), cache.k, cache.v, tables, positions, 0.5, 0, 0.0)
    assert torch.equal(found, torch.zeros(1, 2, 4, 3))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 8, 16]), st.integers(1, 3), st.integers(1, 6))
def test_cache_slots(data: Any, block_size: int, batch: int, length: int) -> None:
    tables = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 99), min_size=4, max_size=4), min_size=batch, max_size=batch))
    )
    drawn = st.lists(st.integers(-1, 4 * block_size - 1), min_size=length, max_size=length)
    positions = torch.tensor(data.draw(st.lists(drawn, min_size=batch, max_size=batch)))
    wanted = [
        int(tables[row, p // block_size]) * block_size + p % block_size if p >= 0 else 0
        for row in range(batch)
        for p in positions[row].tolist()
    ]
    found = reference.cache_slots(tables.int(), positions, block_size)
    assert found.dtype == torch.int64
    assert found.tolist() == wanted


def test_cache_write_touches_its_slots_alone() -> None:
    cache = torch.zeros(4, 2, 3, 5)
    x = normal(2, 3, 2, 5)
    slots = torch.tensor([7, 2, 3, 5])
    reference.cache_write(cache, x, slots)
    flat = cache.view(8, 3, 5)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(flat[slot], x[token // 2, :, token % 2])
    rest = [s for s in range(8) if s not in slots.tolist()]
    assert not flat[rest].any()


@pytest.mark.parametrize("length", [1, 3])
def test_rotate_half_is_a_rotation_of_complex_numbers(length: int) -> None:
    x, angle = normal(2, 4, length, 6), normal(2, 1, length, 3, seed=1)
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    wanted = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(reference.rotate_half(x, cos, sin), wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_cache_holds_each_head_of_a_token_by_its_own_scale(dtype: torch.dtype) -> None:
    most = 127 if dtype == torch.int8 else 448
    cache, scale = torch.zeros(3, 2, 2, 4, dtype=dtype), torch.full((3, 2, 2), -1.0)
    x = torch.zeros(1, 2, 2, 4)
    x[0, 0, 0], x[0, 1, 0] = torch.tensor([1.0, -2, 0.5, 0]), torch.tensor([100.0, 50, -25, 7])
    reference.cache_write(cache, x, torch.tensor([5, 2]), scale)
    assert scale[2, 1].tolist() == [torch.tensor(2 / most).item(), torch.tensor(100 / most).item()]
    assert scale[1, 0].tolist() == [1, 1], "a head of zeros"
    assert (scale == -1).sum() == 8, "no other slot is touched"
    held = cache.float() * scale[..., None]
    assert (held[2, 1] - x[0, :, 0]).abs().max() <= 100 / 127 / 2
    assert held[1, 0].abs().max() == 0 and cache.float().abs().amax() == most


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_attention_over_a_quantized_cache_is_that_over_what_it_stands_for(dtype: torch.dtype) -> None:
    k, v, q = normal(1, 2, 6, 4), normal(1, 2, 6, 4, seed=1), normal(1, 4, 2, 4, seed=2)
    tables, slots = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([8, 9, 10, 11, 4, 5])
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    plain: list[Tensor] = []
    for x in (k, v):
        cache, scale = torch.zeros(4, 4, 2, 4, dtype=dtype), torch.full((4, 4, 2), float("nan"))
        reference.cache_write(cache, x, slots, scale)
        codes, scales = [*codes, cache], [*scales, scale]
        plain.append((cache.float() * scale[..., None]).nan_to_num())
    at: Any = (tables, torch.tensor([[4, 5]]), 0.5, 0, 0.0, None)
    found = reference.paged_attention(q, codes[0], codes[1], *at, *scales)
    assert torch.equal(found, reference.paged_attention(q, plain[0], plain[1], *at))
    assert found.isfinite().all()
