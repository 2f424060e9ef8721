"""Which configurations of the kernels of `fused_linear` are worth measuring for a call, from its shape alone.

Numbers are for an H100 or H200. The lists hold what won somewhere when it was measured, and what should where nothing
was; the order is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .linear_problem import Problem
from .spec import Config

MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
MOST_CANDIDATES = 5
# Up to so many rows of x the plain cores may keep up with memory.
GEMV_ROWS = 4
# What may lie in the L2 cache for launches to come: about half of it.
_AHEAD_BYTES = 24 << 20
_MOST_SPLITS = 8

# By the bytes of a row: warps, bytes of the weight that each thread holds before it waits, whether to ask for the rows
# of programs to come. (So the row's length says how many a program takes.) 0 bytes: two rows, 4 KiB of each at a time.
_GEMV_SHORT = ((4, 128, True), (2, 256, True), (4, 64, True), (4, 128, False), (4, 64, False))
_GEMV_MIDDLE = ((4, 128, True), (2, 256, True), (8, 64, True), (8, 64, False), (8, 128, True))
_GEMV_LONG = ((8, 128, True), (4, 0, True), (4, 256, True), (4, 0, False), (4, 128, True), (8, 256, True))
# For quantized weights: warps, rows of the weight, tiles (0: the whole row), bytes that a thread loads at once. Many
# rows share what is done for x, as it takes instructions to make a number of a byte; 8 bytes of int8, or of the halves
# of int4, lie with a thread that loads 16 bytes of x.
_GEMV_QUANTIZED_SHORT = ((4, 8, 0, 16), (4, 8, 0, 8), (2, 8, 0, 16), (4, 4, 0, 16))
_GEMV_QUANTIZED_MIDDLE = ((4, 8, 0, 8), (4, 8, 0, 16), (4, 4, 0, 8), (2, 8, 1, 16))
_GEMV_QUANTIZED_LONG = ((4, 4, 0, 8), (4, 8, 1, 16), (8, 4, 0, 8), (4, 8, 1, 8))
_GEMV_QUANTIZED_LONGEST = ((8, 4, 0, 8), (4, 8, 1, 16), (4, 8, 2, 8), (4, 4, 2, 16))
# Rows of the weight, bytes of each row a step, warps, stages, programs a multiprocessor to reach by splitting k (0:
# one part), whether a norm is done apart. For weights of few rows, and of many; then for more than 32 rows of x.
_SKINNY_FEW = (
    (64, 256, 4, 3, 3, False),
    (64, 256, 4, 3, 3, True),
    (64, 512, 4, 4, 1, False),
    (64, 256, 4, 6, 1, False),
    (64, 256, 4, 4, 2, False),
)
_SKINNY_MANY = (
    (128, 256, 4, 3, 0, False),
    (128, 256, 4, 3, 0, True),
    (64, 256, 4, 4, 0, False),
    (64, 256, 4, 3, 0, True),
    (128, 256, 8, 4, 0, False),
)
_SKINNY_FEW_WIDE = (
    (64, 256, 4, 3, 2, True),
    (64, 256, 4, 6, 1, True),
    (128, 256, 8, 4, 1, True),
    (64, 512, 4, 3, 1, False),
    (64, 256, 4, 3, 2, False),
)
_SKINNY_MANY_WIDE = (
    (128, 128, 4, 4, 0, True),
    (128, 128, 4, 4, 0, False),
    (256, 128, 8, 4, 0, True),
    (128, 256, 8, 4, 0, True),
    (128, 256, 4, 2, 0, True),
)
# The same for quantized weights, bytes as they are stored: for up to 16 rows of x, and for more. Two warps take the
# matrix instructions of a warp, whose operands come in wide loads; four those of a warp group, for many rows of x.
_SKINNY_QUANTIZED_FEW = (
    (64, 128, 2, 4, 4, False),
    (64, 128, 2, 4, 4, True),
    (64, 128, 4, 4, 3, True),
    (32, 128, 2, 5, 6, True),
    (64, 256, 2, 3, 3, False),
)
_SKINNY_QUANTIZED_MANY = (
    (64, 128, 2, 4, 0, False),
    (64, 128, 2, 4, 0, True),
    (128, 128, 4, 4, 0, True),
    (64, 128, 4, 4, 0, True),
    (64, 256, 2, 3, 0, False),
)
_SKINNY_QUANTIZED_FEW_WIDE = (
    (64, 128, 4, 4, 3, True),
    (128, 128, 8, 4, 1, True),
    (128, 128, 8, 3, 2, True),
    (64, 256, 4, 3, 1, True),
    (64, 128, 4, 3, 2, False),
)
_SKINNY_QUANTIZED_MANY_WIDE = (
    (128, 128, 4, 3, 0, True),
    (128, 128, 8, 4, 0, True),
    (64, 128, 4, 4, 0, True),
    (256, 128, 8, 3, 0, True),
    (128, 128, 4, 3, 0, False),
)
# float32 has no tensor cores here: exact products on the plain cores, small tiles.
_SKINNY_EXACT = ((32, 128, 4, 3, 2, False), (16, 128, 4, 3, 1, True), (64, 64, 4, 3, 0, False))


def gemv_configs(problem: Problem) -> list[Config]:
    """`block_n`, `block_k`, `tiles`, `ahead`, `wave`: see `gemv`; at least one."""
    # Stored elements, of so many bytes, and columns of the weight behind each.
    item = 1 if problem.format else problem.item_bytes
    length = problem.row_bytes // item
    each = problem.k // length
    found: dict[tuple[int, ...], Config] = {}
    for warps, rows, block, tiles, vector, asks in _gemv_tiles(problem, item, length):
        block_n = rows // problem.gated
        if not block_n:
            continue
        held = min(length, tiles * block)
        programs = math.ceil(problem.columns / block_n)
        # Registers a thread takes, roughly, and so how many programs run at once.
        fit = 2048 // (warps * (32 + (rows * held * item) // (128 * warps)))
        wave = ahead = 0
        if asks and problem.askable and held == length:
            wave = min(MULTIPROCESSORS * fit, programs // 2, _AHEAD_BYTES // (rows * problem.row_bytes))
        elif asks and problem.askable:
            ahead = _AHEAD_BYTES // (min(programs, MULTIPROCESSORS * fit) * rows * item)
            ahead = min(ahead // 64 * 64, length - held)
        found[block_n, block, tiles, warps, ahead, wave, vector] = {
            "kind": "gemv", "block_n": block_n, "block_k": block * each, "tiles": tiles, "ahead": ahead, "wave": wave,
            "num_warps": warps, "num_stages": 2, **({"vector": vector} if problem.format else {}),
        }  # fmt: skip
    return list(found.values())[:MOST_CANDIDATES]


def _gemv_tiles(problem: Problem, item: int, length: int) -> Iterator[tuple[int, int, int, int, int, bool]]:
    """Of the tables above for rows of `length` stored elements of `item` bytes: warps, rows, elements of a tile's row,
    tiles, elements a thread loads at once, asks."""
    row_bytes = problem.row_bytes

    def shape(most_warps: int, vector: int) -> tuple[int, int, int]:
        # All warps side by side along k, so that a program meets once, at its end.
        warps = min(most_warps, max(1, power_of_two(length) // (32 * vector)))
        block = min(32 * vector * warps, power_of_two(length))
        return warps, block, math.ceil(length / block)

    if problem.format:
        sizes = {2048: _GEMV_QUANTIZED_SHORT, 4096: _GEMV_QUANTIZED_MIDDLE, 8192: _GEMV_QUANTIZED_LONG}
        longest = _GEMV_QUANTIZED_LONGEST
        for most_warps, rows, wanted, vector in next((t for b, t in sizes.items() if row_bytes <= b), longest):
            if problem.grouped:
                vector = math.gcd(vector, problem.group[1], length)
            warps, block, tiles = shape(most_warps, vector)
            # Zero points take registers as well.
            rows = rows // 2 if problem.zeroed else rows
            yield warps, rows, block, min(tiles, wanted or tiles), vector, True
        return
    vector = 16 // item
    dense = _GEMV_SHORT if row_bytes <= 4096 else _GEMV_MIDDLE if row_bytes <= 8192 else _GEMV_LONG
    for most_warps, thread_bytes, asks in (*dense, (4, 0, False)):
        warps, block, tiles = shape(most_warps, vector)
        if thread_bytes:
            rows = min(16, _power_below(warps * 32 * thread_bytes // (tiles * block * item)))
        else:
            rows, tiles = 2, min(tiles, max(1, 4096 // (block * item)))
        yield warps, rows, block, tiles, vector, asks


def skinny_configs(problem: Problem) -> list[Config]:
    """`block_m`, `block_n`, `block_k`, `splits`, `ahead`: see `skinny`; `apart`: the norm is a launch of its own."""
    # Bytes of a stored element of the weight; columns behind each.
    item = 1 if problem.format else problem.item_bytes
    length = problem.row_bytes // item
    each = problem.k // length
    block_m = max(16, power_of_two(problem.m))
    found: dict[tuple[int, ...], Config] = {}
    for rows, step_bytes, warps, stages, crowd, apart in _skinny_choices(problem, block_m):
        block = max(16, min(step_bytes // item, power_of_two(length)))
        if problem.grouped:
            # Steps of one group each.
            block = math.gcd(block, problem.group[1], length)
            rows = math.gcd(rows, problem.group[0]) if problem.group[0] > 1 else rows
        block_n = rows // problem.gated
        # x times the norm's weight may be too large for float16, as it is before it is normed.
        apart = (apart or problem.dtype == "float16") and problem.normed
        shared = stages * block * (rows * item + block_m * each * problem.item_bytes)
        # Below 64 rows, warps scale x in registers, each the whole of it: more than this spills.
        spills = problem.normed and not apart and rows < 64 and block_m * block > 256 * rows
        # Sums of a group beside those of all: so many registers a thread for either.
        most_sums = 32 if apart or not problem.normed else 16
        spills = spills or (problem.grouped and rows * block_m > 32 * warps * most_sums)
        if shared > SHARED_BYTES or spills or block < 16:
            continue
        tiles, steps = math.ceil(problem.columns / block_n), math.ceil(length / block)
        splits = split_count(crowd * MULTIPROCESSORS // tiles, steps)
        at_once = min(SHARED_BYTES // shared, math.ceil(tiles * splits / MULTIPROCESSORS)) * MULTIPROCESSORS
        ahead = _AHEAD_BYTES // (at_once * rows * item) // 64 * 64
        # The last part of k may be shorter than its steps.
        ahead = min(ahead, steps // splits * block - (steps * block - length)) if problem.askable else 0
        found[block_n, block, warps, stages, splits, apart] = {
            "kind": "skinny", "block_m": block_m, "block_n": block_n, "block_k": block * each, "splits": splits,
            "ahead": ahead, "apart": apart, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
    return list(found.values())


def _skinny_choices(problem: Problem, block_m: int) -> tuple[tuple[int, int, int, int, int, bool], ...]:
    """Rows of the weight, bytes a step, warps, stages, crowd, apart: of the tables above."""
    few = problem.n < 2 * 64 * MULTIPROCESSORS
    if problem.item_bytes == 4:
        return _SKINNY_EXACT
    if problem.format and block_m == 16:
        return _SKINNY_QUANTIZED_FEW if few else _SKINNY_QUANTIZED_MANY
    if problem.format:
        return _SKINNY_QUANTIZED_FEW_WIDE if few else _SKINNY_QUANTIZED_MANY_WIDE
    if block_m <= 32:
        return _SKINNY_FEW if few else _SKINNY_MANY
    return _SKINNY_FEW_WIDE if few else _SKINNY_MANY_WIDE


def split_count(most: int, steps: int) -> int:
    """Into how many parts of at least two steps `steps` fall: a power of two that divides them, not above `most`."""
    splits = _power_below(max(1, min(most, _MOST_SPLITS, steps // 2)))
    while steps % splits:
        splits //= 2
    return splits


def power_of_two(number: int) -> int:
    """The least power of two not below `number`."""
    return 1 << (number - 1).bit_length()


def _power_below(number: int) -> int:
    """The largest power of two not above `number`, 0 for none."""
    return 1 << number.bit_length() - 1 if number else 0
