"""The block allocator: no block is lost, doubly owned, or the null block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.runtime.kv_cache import BlockAllocator


@given(st.integers(2, 30), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_blocks_are_owned_once_and_never_lost(num_blocks: int, actions: list[tuple[bool, int]]) -> None:
    allocator = BlockAllocator(num_blocks, 4)
    owned: list[list[int]] = []
    for take, number in actions:
        if take:
            free = allocator.free
            blocks = allocator.allocate(number)
            assert (blocks is None) == (number > free)
            if blocks is not None:
                assert len(blocks) == number
                owned.append(blocks)
        elif owned:
            allocator.release(owned.pop(number % len(owned)))
        held = [block for blocks in owned for block in blocks]
        assert len(set(held)) == len(held) and all(1 <= block < num_blocks for block in held)
        assert allocator.free + len(held) == allocator.total == num_blocks - 1


@pytest.mark.parametrize("wrong", [[0], [1, 1], [9], [2]])
def test_releasing_what_is_not_owned_once_is_an_error_and_releases_nothing(wrong: list[int]) -> None:
    allocator = BlockAllocator(5, 4)
    assert allocator.allocate(1) == [1]
    with pytest.raises(ValueError, match="not all owned once"):
        allocator.release(wrong)
    assert allocator.free == 3
    allocator.release([1])
    with pytest.raises(ValueError, match="not all owned once"):
        allocator.release([1])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (64, 16)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockAllocator(5, 4).blocks_for(tokens) == blocks


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (4, 0)])
def test_a_cache_that_holds_nothing_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockAllocator(*shape)
