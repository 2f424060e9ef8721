"""Bytes per token on hand-made manifests, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.manifest import CacheLayer, KVCache
from ingot.compiler.traffic import Facts, cache_bytes, decode_engine, looked_up, prefill_flops, step_bytes

from ..benchmarks.hand_made import HIDDEN, VOCABULARY, manifest

TABLE = (VOCABULARY, HIDDEN)
FULL, WINDOWED = CacheLayer((2, 8), (2, 4), 0), CacheLayer((2, 8), (2, 4), 10)


def test_tied_head_is_read_in_full_and_a_position_table_by_row() -> None:
    tensors: dict[str, Facts] = {
        "model__embed_tokens__weight": (TABLE, "bfloat16"),  # the LM head's too
        "model__layers__0__down": ((8, 32), "bfloat16"),
        "model__norm": ((8,), "bfloat16"),
        "positions_0123": ((1, 64, 4), "float32"),
        "only_in_prefill": ((1000, 1000), "float32"),
        "only_in_b4": ((1000, 1000), "float32"),
    }
    names = tuple(n for n in tensors if not n.startswith("only"))
    traffic = step_bytes(manifest(names, (FULL,)), tensors, [3])
    assert traffic.weights == 100 * 8 * 2 + 8 * 32 * 2 + 8 * 2
    assert traffic.rows == 4 * 4
    assert traffic.cache == 3 * (2 * 8 + 2 * 4) * 2
    assert traffic.total == traffic.weights + traffic.rows + traffic.cache


def test_untied_embedding_counts_with_one_row() -> None:
    tensors: dict[str, Facts] = {
        "model__embed_tokens__weight": (TABLE, "bfloat16"),
        "lm_head__weight__int8": (TABLE, "int8"),
        "lm_head__weight__scale": ((VOCABULARY,), "float32"),
    }
    traffic = step_bytes(manifest(tuple(tensors)), tensors, [])
    assert traffic.weights == 100 * 8 + 100 * 4
    assert traffic.rows == 8 * 2
    assert traffic.cache == 0


def test_four_bits_count_as_two_values_a_byte_and_scales_go_with_their_weight() -> None:
    packed: dict[str, Facts] = {
        "model__embed_tokens__weight__int4__halves": ((VOCABULARY, 4), "uint8"),
        "model__embed_tokens__weight__scale": ((VOCABULARY, 2), "float16"),
        "down__int4__halves": ((8, 16), "uint8"),
        "down__scale": ((8, 1), "float16"),
        "down__zero": ((8, 1), "uint8"),
    }
    tied = step_bytes(manifest(tuple(packed)), packed, [])
    assert (tied.weights, tied.rows) == (100 * 4 + 100 * 2 * 2 + 8 * 16 + 8 * 2 + 8, 0)
    assert prefill_flops(manifest(tuple(packed)), packed, 20, 3) == 2 * 8 * 32 * 20 + 2 * 100 * 8
    head: dict[str, Facts] = {**packed, "lm_head__weight": (TABLE, "bfloat16")}
    apart = step_bytes(manifest(tuple(head)), head, [])
    assert (apart.weights, apart.rows) == (100 * 8 * 2 + 8 * 16 + 8 * 2 + 8, 4 + 2 * 2)


def test_rows_share_the_weights_and_nothing_else() -> None:
    tensors: dict[str, Facts] = {
        "model__embed_tokens__weight": (TABLE, "bfloat16"),
        "lm_head__weight": (TABLE, "bfloat16"),
    }
    one = step_bytes(manifest(tuple(tensors), (FULL,)), tensors, [10])
    many = step_bytes(manifest(tuple(tensors), (FULL,)), tensors, [10], batch=8)
    assert (many.weights, many.rows, many.cache) == (one.weights, 8 * one.rows, 8 * one.cache)


def test_a_prefill_computes_the_head_once_and_attends_to_what_it_sees() -> None:
    tensors: dict[str, Facts] = {
        "model__embed_tokens__weight": (TABLE, "bfloat16"),
        "lm_head__weight": (TABLE, "bfloat16"),
        "down": ((8, 32), "bfloat16"),
        "norm": ((8,), "bfloat16"),
    }
    made = manifest(tuple(tensors), (FULL, WINDOWED))
    products = 2 * 8 * 32 * 20 + 2 * 100 * 8
    # Tokens see 1 to 20 tokens; with a window of 10 the first ten see 1 to 10, the others 10. 3 heads, 8 + 4 wide.
    assert prefill_flops(made, tensors, 20, 3) == products + 2 * 3 * 12 * 210 + 2 * 3 * 12 * (55 + 100)
    assert prefill_flops(made, tensors, 1, 3) == 2 * 8 * 32 + 2 * 100 * 8 + 2 * (2 * 3 * 12)


def test_a_weight_bound_twice_is_read_once() -> None:
    tensors: dict[str, Facts] = {"a": ((10, 10), "float32")}
    assert step_bytes(manifest(("a", "a")), tensors, []).weights == 400


@pytest.mark.parametrize(
    ("names", "tables"),
    [
        (("transformer__wte__weight", "lm_head__weight", "transformer__wpe__weight"), {"wte", "wpe"}),
        (("transformer__wte__weight", "transformer__wpe__weight"), {"wpe"}),
        (("gpt_neox__embed_in__weight", "embed_out__weight"), {"embed_in"}),
        (("embed_out__weight",), set()),
    ],
)
def test_names_of_other_families(names: tuple[str, ...], tables: set[str]) -> None:
    tensors: dict[str, Facts] = {n: ((64 if "wpe" in n else VOCABULARY, HIDDEN), "float32") for n in names}
    found = looked_up(names, tensors, VOCABULARY)
    assert {t for t in ("wte", "wpe", "embed_in", "embed_out") for n in found if t in n} == tables


def test_a_packed_embedding_is_read_in_full() -> None:
    """It is packed only where products read it; its shape no longer tells."""
    tensors: dict[str, Facts] = {"model__embed_tokens__weight__int4__packed": ((2, 1, 64, 4), "uint8")}
    traffic = step_bytes(manifest(tuple(tensors), (FULL,)), tensors, [1])
    assert (traffic.weights, traffic.rows) == (2 * 64 * 4, 0)


def test_the_smallest_decode_engine_is_meant() -> None:
    assert decode_engine(manifest(())).name == "decode-b1"


def test_no_decode_engine_and_a_missing_weight_are_refused() -> None:
    made = manifest(("a",))
    with pytest.raises(VerificationError, match="'a'"):
        step_bytes(made, {}, [])
    with pytest.raises(VerificationError, match="no decode engine"):
        step_bytes(replace(made, engines=made.engines[2:]), {}, [])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_window_bounds_what_is_read(contexts: list[int]) -> None:
    full = cache_bytes(KVCache(16, 9, 4, "float32", (FULL,)), contexts)
    windowed = cache_bytes(KVCache(16, 9, 4, "float32", (WINDOWED,)), contexts)
    token = (2 * 8 + 2 * 4) * 4
    assert full == round(token * sum(contexts) / len(contexts))
    assert windowed <= min(full, 10 * token)
    assert (windowed == full) == all(c <= 10 for c in contexts)
    assert cache_bytes(KVCache(16, 9, 4, "float32", (FULL, WINDOWED)), contexts) == pytest.approx(
        full + windowed, abs=1
    )
