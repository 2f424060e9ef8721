"""The buffers an engine must have, and the bytes of a cache: plain, and quantized with scales beside it."""

from __future__ import annotations

import dataclasses

import pytest
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.manifest import Buffer, CacheLayer, KVCache, Manifest
from ingot.runtime.engines.buffers import check_buffers, expected_buffers
from ingot.runtime.engines.plan_layout import buffer_bytes, cache_buffers, is_cache

from .fake_engine import fake_manifest

LAYERS = (CacheLayer((2, 16), (2, 8), 0), CacheLayer((4, 16), (4, 16), 7))


def cache(dtype: str) -> KVCache:
    return KVCache(4, 9, 8, dtype, LAYERS)


def manifest(dtype: str) -> Manifest:
    made = fake_manifest()
    return dataclasses.replace(made, kv_cache=dataclasses.replace(made.kv_cache, dtype=dtype))


def test_a_plain_cache_is_keys_and_values() -> None:
    assert cache_buffers(cache("bfloat16"), 9) == (
        Buffer("k_cache_0", (9, 4, 2, 16), "bfloat16"), Buffer("v_cache_0", (9, 4, 2, 8), "bfloat16"),
        Buffer("k_cache_1", (9, 4, 4, 16), "bfloat16"), Buffer("v_cache_1", (9, 4, 4, 16), "bfloat16"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_quantized_cache_has_scales_beside_it(dtype: str) -> None:
    found = cache_buffers(cache(dtype), 5)
    assert len(found) == 8 and all(is_cache(b.name) for b in found)
    assert Buffer("k_cache_0", (5, 4, 2, 16), dtype) in found
    assert Buffer("k_scale_cache_0", (5, 4, 2), "float32") in found
    assert Buffer("v_scale_cache_1", (5, 4, 4), "float32") in found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_the_bytes_of_a_token_are_those_of_the_buffers(dtype: str) -> None:
    made = cache(dtype)
    assert sum(map(buffer_bytes, cache_buffers(made, 9))) == 9 * 4 * sum(map(made.token_bytes, LAYERS))


def test_an_engine_without_the_scales_is_refused() -> None:
    made = manifest("int8")
    entry = made.engines[0]
    whole = expected_buffers(entry, made)[0]
    check_buffers(dataclasses.replace(entry, inputs=tuple(whole)), made)
    plain = tuple(b for b in whole if "scale" not in b.name)
    with pytest.raises(VerificationError, match="inputs of engine") as caught:
        check_buffers(dataclasses.replace(entry, inputs=plain), made)
    assert "k_scale_cache_0" in caught.value.why
