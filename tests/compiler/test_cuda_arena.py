"""The arena's planner: whatever lives at the same time lies apart, and what must stay zero lies in front, alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.artifacts.kernel_plan import ALIGNMENT
from ingot.compiler.backends.cuda.arena import place, zeroed_bytes
from ingot.compiler.backends.cuda.buffers import Buffer, Region


@dataclass(frozen=True)
class Life:
    """A buffer in words: its size, its first launch, and how many more it lives; -1 first is never used."""

    nbytes: int
    first: int
    more: int
    kind: str = ""


lives = st.lists(
    st.builds(
        Life, st.sampled_from([0, 1, 255, 256, 257, 1000, 5000]), st.integers(-1, 12), st.integers(0, 6),
        st.sampled_from(["", "", "", "zeroed", "exclusive"]),
    ),
    max_size=24,
)  # fmt: skip


def made(life: Life) -> Buffer:
    last = -1 if life.first < 0 else life.first + life.more
    zeroed, exclusive = life.kind == "zeroed", life.kind == "exclusive"
    return Buffer("arena", "", life.nbytes, zeroed, exclusive, first=life.first, last=last)


def bytes_of(buffer: Buffer) -> range:
    return range(buffer.offset, buffer.offset + buffer.nbytes)


def share(a: Buffer, b: Buffer) -> bool:
    return max(a.offset, b.offset) < min(a.offset + a.nbytes, b.offset + b.nbytes)


def alive_together(a: Buffer, b: Buffer) -> bool:
    return bool(set(range(a.first, a.last + 1)) & set(range(b.first, b.last + 1)))


@settings(max_examples=300, deadline=None)
@given(lives, st.integers(0, 3))
def test_buffers(described: list[Life], spare: int) -> None:
    buffers = [made(life) for life in described]
    reserved = zeroed_bytes(buffers) + spare * ALIGNMENT
    size = place(buffers, reserved)
    used = [b for b in buffers if b.zeroed or b.first >= 0]
    for buffer in used:
        assert buffer.offset % ALIGNMENT == 0
        assert buffer.offset + buffer.nbytes <= size
        assert (bytes_of(buffer).stop <= reserved) if buffer.zeroed else (buffer.offset >= reserved)
    for index, a in enumerate(used):
        for b in used[:index]:
            if a.zeroed or b.zeroed or a.exclusive or b.exclusive or alive_together(a, b):
                assert not share(a, b)
    assert size % ALIGNMENT == 0
    assert reserved <= size <= reserved + sum(b.padded for b in used if not b.zeroed)


@settings(max_examples=50, deadline=None)
@given(lives)
def test_the_same_lives_give_the_same_arena(described: list[Life]) -> None:
    first, second = ([made(life) for life in described] for _ in range(2))
    assert place(first, zeroed_bytes(first)) == place(second, zeroed_bytes(second))
    assert [b.offset for b in first] == [b.offset for b in second]


def test_a_chain_takes_two_buffers_in_turn() -> None:
    """As a decoder's activations do: each launch reads what the one before wrote."""
    buffers = [Buffer("arena", "", 1000, first=i, last=i + 1) for i in range(9)]
    assert place(buffers, 0) == 2 * 1024
    assert {b.offset for b in buffers} == {0, 1024}


def test_a_gap_is_filled() -> None:
    sizes = {(0, 1): 4096, (0, 0): 1, (1, 1): 1}
    long, early, late = (Buffer("arena", "", size, first=f, last=last) for (f, last), size in sizes.items())
    assert place([early, late, long], 0) == 4096 + ALIGNMENT
    assert early.offset == late.offset


def test_too_little_reserved_is_refused() -> None:
    with pytest.raises(ValueError, match="512 bytes must be zero, 256 are reserved"):
        place([made(Life(1, 0, 0, "zeroed")), made(Life(1, 0, 0, "zeroed"))], 256)


def region(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Region:
    return Region(Buffer("arena", "", 4096), offset, shape, strides, torch.float32)


@pytest.mark.parametrize(
    ("shape", "strides", "nbytes"),
    [
        ((3, 4), (4, 1), 48),
        ((3, 4), (16, 1), 144),
        ((4,), (0,), 4),
        ((2, 0), (1, 1), 0),
        ((), (), 4),
        ((1, 1), (9, 9), 4),
    ],
)
def test_a_regions_bytes_end_behind_its_last_element(
    shape: tuple[int, ...], strides: tuple[int, ...], nbytes: int
) -> None:
    assert region(shape, strides).nbytes == nbytes


def test_a_view_counts_from_the_buffers_beginning() -> None:
    """As `torch.as_strided` does: a view of a view does not add up offsets."""
    inner = region((8, 8), (8, 1)).viewed((4,), (1,), 5)
    assert (inner.offset, inner.viewed((2,), (2,), 3).offset) == (20, 12)


def test_what_a_provider_is_told() -> None:
    spec = region((2, 3), (8, 1), 4).spec()
    assert (spec.shape, spec.strides, spec.dtype, spec.aligned, spec.contiguous) == (
        (2, 3),
        (8, 1),
        "float32",
        False,
        False,
    )
    assert region((2, 3), (3, 1), 32).spec().aligned
