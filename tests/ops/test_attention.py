"""paged_attention against a plain softmax in float64, written per token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

NAN = float("nan")


def oracle(q, k_cache, v_cache, tables, positions, scale, window, softcap, sinks):
    """One token and head at a time; reads the visible slots only."""
    batch, heads, length, _ = q.shape
    group, size = heads // k_cache.shape[2], k_cache.shape[1]
    out = torch.zeros(batch, length, heads, v_cache.shape[3], dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            p = int(positions[b, t])
            if p < 0:
                continue
            seen = range(max(0, p - window + 1) if window else 0, p + 1)
            blocks = torch.tensor([int(tables[b, s // size]) for s in seen])
            offsets = torch.tensor([s % size for s in seen])
            keys, values = k_cache[blocks, offsets].double(), v_cache[blocks, offsets].double()
            for h in range(heads):
                scores = keys[:, h // group] @ q[b, h, t].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                logits = scores if sinks is None else torch.cat([scores, sinks[h : h + 1].double()])
                out[b, t, h] = logits.softmax(0)[: len(scores)] @ values[:, h // group]
    return out


def case(batch, heads, kv_heads, length, dim, v_dim, size, positions, dtype=torch.float32, seed=0):
    """Inputs whose caches are NaN wherever no visible position lies, and whose tables name shuffled blocks."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.as_tensor(positions).reshape(batch, length)
    per_row = int(positions.max()) // size + 2
    tables = (torch.randperm(batch * per_row, generator=generator) + 1).reshape(batch, per_row).to(torch.int32)
    q = torch.randn(batch, length, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    caches = []
    for d in (dim, v_dim):
        cache = torch.full((batch * per_row + 1, size, kv_heads, d), NAN, dtype=dtype)
        for b in range(batch):
            for p in range(int(positions[b].max()) + 1):
                cache[tables[b, p // size], p % size] = torch.randn(kv_heads, d, generator=generator).to(dtype)
        caches.append(cache)
    return q, *caches, tables, positions


def check(kernels, inputs, scale=None, window=0, softcap=0.0, sinks=None, scales=(None, None), exact=None):
    scale = scale or 1 / math.sqrt(inputs[0].shape[-1])
    result = kernels.call(
        "paged_attention", *inputs, scale, window, softcap, None if sinks is None else (sinks,), *scales
    )
    q, k_cache, v_cache, tables, positions = exact or inputs
    exact = oracle(q, k_cache, v_cache, tables, positions, scale, window, softcap, sinks)
    tolerance = 1e-5 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    assert result.shape == exact.shape
    assert not result.isnan().any()
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)
    return result


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 256, 257, 600])
@pytest.mark.parametrize("window", [0, 1, 20, 300])
def test_decode_at_the_edges_of_blocks_tiles_and_spans(kernels, length, window):
    check(kernels, case(1, 8, 2, 1, 16, 16, 16, [length - 1], seed=length), window=window)


@pytest.mark.parametrize("dim,v_dim", [(8, 8), (16, 64), (64, 64), (80, 80), (13, 21), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dimensions_and_dtypes(kernels, dim, v_dim, dtype):
    check(kernels, case(2, 4, 2, 1, dim, v_dim, 8, [[70], [9]], dtype))
    check(kernels, case(1, 4, 2, 20, dim, v_dim, 8, list(range(50, 70)), dtype))


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (4, 4), (6, 2), (8, 1), (32, 8), (71, 1)])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_groups_of_query_heads(kernels, heads, kv_heads, length):
    check(kernels, case(1, heads, kv_heads, length, 32, 32, 16, list(range(30, 30 + length))))


@pytest.mark.parametrize("length", [1, 30])
def test_window_softcap_and_sinks(kernels, length):
    inputs = case(2, 8, 2, length, 32, 32, 16, [list(range(90, 90 + length)), list(range(5, 5 + length))])
    sinks = torch.tensor([-100.0, -1, 0, 1, 2, 3, 10, 200])
    check(kernels, inputs, softcap=1.5, scale=2.0)
    check(kernels, inputs, sinks=sinks)
    check(kernels, inputs, sinks=sinks, window=7, softcap=30.0)
    check(kernels, case(1, 8, 2, length, 32, 32, 16, list(range(length))), sinks=sinks.bfloat16())


def test_padding_gives_zeros(kernels):
    prefill = check(kernels, case(1, 4, 2, 40, 16, 16, 16, [*range(30), *[-1] * 10]))
    assert (prefill[:, 30:] == 0).all() and (prefill[:, :30] != 0).any()
    decode = check(kernels, case(3, 4, 2, 1, 16, 16, 16, [[4], [-1], [7]]), sinks=torch.zeros(4))
    assert (decode[1] == 0).all()


def test_a_row_is_the_same_in_every_batch_and_chunk(kernels):
    inputs = q, k, v, tables, positions = case(3, 8, 2, 48, 32, 32, 16, [list(range(s, s + 48)) for s in (0, 100, 400)])
    together = kernels.call("paged_attention", *inputs, 0.2, 50, 0.0, None, None, None)
    for b in range(3):
        for t0, t1 in ((0, 48), (7, 48), (0, 31)):
            part = q[b : b + 1, :, t0:t1], k, v, tables[b : b + 1], positions[b : b + 1, t0:t1]
            assert torch.equal(
                kernels.call("paged_attention", *part, 0.2, 50, 0.0, None, None, None)[0], together[b, t0:t1]
            )
    last = tuple(x[:, :, 47:] if x is q else x[:, 47:] if x is positions else x for x in inputs)
    decode = kernels.call("paged_attention", *last, 0.2, 0, 0.0, None, None, None)
    for b in range(3):
        alone = last[0][b : b + 1], k, v, tables[b : b + 1], last[4][b : b + 1]
        assert torch.equal(kernels.call("paged_attention", *alone, 0.2, 0, 0.0, None, None, None)[0], decode[b])


def test_views_of_the_cache_and_of_q(kernels):
    """A cache that holds keys and values side by side, and queries cut out of a fused projection."""
    q, k, v, tables, positions = case(2, 4, 2, 5, 16, 16, 16, [list(range(5)), list(range(20, 25))])
    both = torch.cat([k, v], dim=-1)
    fused = torch.full((2, 5, 200), NAN)
    fused[..., 3:67] = q.transpose(1, 2).flatten(2)
    view = fused[..., 3:67].unflatten(-1, (4, 16)).transpose(1, 2)
    check(kernels, (view, both[..., :16], both[..., 16:], tables, positions))


def test_visible_nan_stays_visible(kernels):
    q, k, v, tables, positions = case(1, 4, 2, 1, 16, 16, 16, [20])
    k[tables[0, 0], 3, 1] = NAN
    result = kernels.call("paged_attention", q, k, v, tables, positions, 0.25, 0, 0.0, None, None, None)
    assert result[0, 0, 2:].isnan().all() and not result[0, 0, :2].isnan().any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(kernels, data):
    draw = data.draw
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    dim, v_dim, size = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 33))
    starts = [draw(st.integers(0, 150)) for _ in range(batch)]
    real = [draw(st.integers(0, length)) for _ in range(batch)]
    positions = [[s + t if t < n else -1 for t in range(length)] for s, n in zip(starts, real)]
    if max(real) == 0:
        return
    inputs = case(batch, kv_heads * group, kv_heads, length, dim, v_dim, size, positions, seed=draw(st.integers(0, 99)))
    sinks = torch.randn(kv_heads * group) if draw(st.booleans()) else None
    check(kernels, inputs, window=draw(st.integers(0, 100)), softcap=draw(st.sampled_from([0.0, 5.0])), sinks=sinks)


def test_a_block_that_does_not_exist_is_refused(kernels):
    q, k, v, tables, positions = case(1, 4, 2, 1, 16, 16, 16, [20])
    tables[0, 1] = len(k)
    with pytest.raises(RuntimeError, match="not a block"):
        kernels.call("paged_attention", q, k, v, tables, positions, 0.25, 0, 0.0, None, None, None)
    tables[0, 1], tables[0, 2] = 1, 10**6  # beyond the visible part nothing is looked at
    kernels.call("paged_attention", q, k, v, tables, positions, 0.25, 0, 0.0, None, None, None)


def quantized(inputs, dtype):
    """The inputs with caches of a narrow dtype, their scales, and the inputs with what both stand for."""
    q, *caches, tables, positions = inputs
    codes, scales, held = [], [], []
    for cache in caches:
        largest = cache.float().abs().amax(-1)
        scale = torch.where(largest == 0, 1.0, largest / (127 if dtype == torch.int8 else 448))
        values = cache.float() / scale[..., None]
        code = (values.round().nan_to_num() if dtype == torch.int8 else values.clamp(-448, 448)).to(dtype)
        codes.append(code)
        scales.append(scale)  # NaN where the cache holds nothing
        held.append(code.float() * scale[..., None])
    return (q, *codes, tables, positions), tuple((s,) for s in scales), (q, *held, tables, positions)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("dim,v_dim", [(16, 16), (64, 64), (13, 21), (192, 128)])
def test_quantized_caches(kernels, dtype, length, dim, v_dim):
    rows = [list(range(300, 300 + length)), list(range(length))]
    inputs, scales, held = quantized(case(2, 8, 2, length, dim, v_dim, 16, rows), dtype)
    check(kernels, inputs, scales=scales, exact=held)
    check(kernels, inputs, window=20, softcap=2.0, sinks=torch.randn(8), scales=scales, exact=held)
    narrow = (inputs[0].bfloat16(), *inputs[1:])
    check(kernels, narrow, scales=scales, exact=(narrow[0], *held[1:]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_belong_to_quantized_caches_alone(kernels, dtype):
    inputs = case(1, 4, 2, 1, 8, 8, 4, [[5]])
    narrow, scales, _ = quantized(inputs, dtype)
    bad = (torch.ones(2, 2),)
    for operands, more, message in (
        (narrow, (None, None), "needs its scales"),
        (narrow, (scales[0], bad), "the scales must be"),
        (inputs, scales, "only a quantized cache has scales"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.call("paged_attention", *operands, 0.2, 0, 0.0, None, *more)
