"""Which configurations of the kernels of `fused_linear` are worth measuring for a call, from its shape alone.

Numbers are for an H100 or H200. The lists hold what won somewhere when it was measured, and what should where nothing
was; the order is an estimate.
"""

from __future__ import annotations

import math

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
# Rows of x, rows of the weight, columns a step, warps, stages, and the share of the matmul rate such a tile can reach.
_GEMM_TILES = (
    (128, 256, 64, 8, 4, 1.00),
    (128, 128, 64, 4, 3, 0.95),
    (128, 128, 64, 8, 3, 0.93),
    (64, 256, 64, 4, 4, 0.87),
    (64, 128, 64, 4, 5, 0.70),
    (128, 64, 64, 4, 5, 0.68),
    (64, 64, 128, 4, 4, 0.50),
)
_MOST_GEMMS = 3
# For the copy engine: rows of x, rows of the weight, columns a step, warps, stages.
_TMA_TILES = (
    (128, 256, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
)
_MOST_TMA = 3
# float32 has no tensor cores here: exact products on the plain cores, small tiles.
_SKINNY_EXACT = ((32, 128, 4, 3, 2, False), (16, 128, 4, 3, 1, True), (64, 64, 4, 3, 0, False))
_GEMM_EXACT = ((64, 64, 16, 4, 3, 1.0), (128, 64, 16, 8, 3, 1.0), (32, 64, 32, 4, 3, 0.8))
# In a microsecond: floating point operations of a multiprocessor; bytes of memory, of the L2 cache, and of a program.
_RATE, _MEMORY_RATE, _CACHE_RATE, _PROGRAM_RATE = 5.9e6, 4.3e6, 7.0e6, 1.0e5


def gemv_configs(problem: Problem) -> list[Config]:
    """`block_n`, `block_k`, `tiles`, `ahead`, `wave`: see `gemv`; at least one."""
    item, row_bytes = problem.item_bytes, problem.k * problem.item_bytes
    vector = 16 // item
    found: dict[tuple[int, ...], Config] = {}
    choices = _GEMV_SHORT if row_bytes <= 4096 else _GEMV_MIDDLE if row_bytes <= 8192 else _GEMV_LONG
    for most_warps, thread_bytes, asks in (*choices, (4, 0, False)):
        # All warps side by side along k, so that a program meets once, at its end.
        warps = min(most_warps, max(1, power_of_two(problem.k) // (32 * vector)))
        block_k = min(32 * vector * warps, power_of_two(problem.k))
        tiles = math.ceil(problem.k / block_k)
        if thread_bytes:
            rows = min(16, _power_below(warps * 32 * thread_bytes // (tiles * block_k * item)))
        else:
            rows, tiles = 2, min(tiles, max(1, 4096 // (block_k * item)))
        block_n = rows // problem.gated
        if not block_n:
            continue
        held = min(problem.k, tiles * block_k)
        programs = math.ceil(problem.columns / block_n)
        # Registers a thread takes, roughly, and so how many programs run at once.
        fit = 2048 // (warps * (32 + (rows * held * item) // (128 * warps)))
        wave = ahead = 0
        if asks and problem.askable and held == problem.k:
            wave = min(MULTIPROCESSORS * fit, programs // 2, _AHEAD_BYTES // (rows * row_bytes))
        elif asks and problem.askable:
            ahead = _AHEAD_BYTES // (min(programs, MULTIPROCESSORS * fit) * rows * item)
            ahead = min(ahead // 64 * 64, problem.k - held)
        found[block_n, block_k, tiles, warps, ahead, wave] = {
            "kind": "gemv", "block_n": block_n, "block_k": block_k, "tiles": tiles, "ahead": ahead, "wave": wave,
            "num_warps": warps, "num_stages": 2,
        }  # fmt: skip
    return list(found.values())[:MOST_CANDIDATES]


def skinny_configs(problem: Problem) -> list[Config]:
    """`block_m`, `block_n`, `block_k`, `splits`, `ahead`: see `skinny`; `apart`: the norm is a launch of its own."""
    item = problem.item_bytes
    block_m = max(16, power_of_two(problem.m))
    few = problem.n < 2 * 64 * MULTIPROCESSORS
    choices: tuple[tuple[int, int, int, int, int, bool], ...]
    if item == 4:
        choices = _SKINNY_EXACT
    elif block_m <= 32:
        choices = _SKINNY_FEW if few else _SKINNY_MANY
    else:
        choices = _SKINNY_FEW_WIDE if few else _SKINNY_MANY_WIDE
    found: dict[tuple[int, ...], Config] = {}
    for rows, step_bytes, warps, stages, crowd, apart in choices:
        block_k = max(16, min(step_bytes // item, power_of_two(problem.k)))
        block_n = rows // problem.gated
        # x times the norm's weight may be too large for float16, as it is before it is normed.
        apart = (apart or problem.dtype == "float16") and problem.normed
        shared = stages * (rows + block_m) * block_k * item
        # Below 64 rows, warps scale x in registers, each the whole of it: more than this spills.
        spills = problem.normed and not apart and rows < 64 and block_m * block_k > 256 * rows
        if shared > SHARED_BYTES or spills:
            continue
        tiles, steps = math.ceil(problem.columns / block_n), math.ceil(problem.k / block_k)
        splits = split_count(crowd * MULTIPROCESSORS // tiles, steps)
        at_once = min(SHARED_BYTES // shared, math.ceil(tiles * splits / MULTIPROCESSORS)) * MULTIPROCESSORS
        ahead = _AHEAD_BYTES // (at_once * rows * item) // 64 * 64
        # The last part of k may be shorter than its steps.
        ahead = min(ahead, steps // splits * block_k - (steps * block_k - problem.k)) if problem.askable else 0
        found[block_n, block_k, warps, stages, splits, apart] = {
            "kind": "skinny", "block_m": block_m, "block_n": block_n, "block_k": block_k, "splits": splits,
            "ahead": ahead, "apart": apart, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
    return list(found.values())


def gemm_configs(problem: Problem) -> list[Config]:
    """`block_m`, `block_n`, `block_k`, `splits`, `group`: see `gemm`; the fastest by an estimate."""
    m, n, k, item = problem.m, problem.n, problem.k, problem.item_bytes
    found: dict[tuple[int, ...], tuple[float, Config]] = {}
    for block_m, block_n, block_k, warps, stages, share in _GEMM_EXACT if item == 4 else _GEMM_TILES:
        if stages * (block_m + block_n) * block_k * item > SHARED_BYTES:
            continue
        tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
        # The sum of a split and what it is added to are in registers together: more than 64 of each spill.
        splittable = tiles < MULTIPROCESSORS and block_m * block_n <= 64 * 32 * warps
        for wanted in (1, 2, 4) if splittable else (1,):
            splits = split_count(wanted, math.ceil(k / block_k))
            part, programs = k / splits, tiles * splits
            waves, read = math.ceil(programs / MULTIPROCESSORS), (block_m + block_n) * part * item
            product = waves * 2 * block_m * block_n * part / (share * _RATE)
            operands = max(programs * read / _CACHE_RATE, waves * read / _PROGRAM_RATE)
            # Every split's float32 sums are written and read once, and the last program waits for the others.
            adding = 2 * splits * m * n * 4 / _CACHE_RATE + 2.0 if splits > 1 else 0.0
            config: Config = {
                "kind": "gemm", "block_m": block_m, "block_n": block_n, "block_k": block_k, "splits": splits,
                "group": 8, "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
            cost = max(product, operands, n * k * item / _MEMORY_RATE) + adding
            found[block_m, block_n, warps, stages, splits] = (cost, config)
    return [config for _cost, config in sorted(found.values(), key=lambda pair: pair[0])][:_MOST_GEMMS]


def tma_configs(problem: Problem) -> list[Config]:
    """`block_m`, `block_n`, `block_k`, `group`, `programs`: see `tma_gemm`; none where the copy engine does not fit."""
    if not problem.tileable:
        return []
    found: list[Config] = []
    for block_m, block_n, block_k, warps, stages in _TMA_TILES:
        # Half a tile's result, and as much of what is added to it, are in shared memory beside the operands.
        ends = (1 + ("residual" in problem.flags)) * block_m * block_n // 2
        tiles = math.ceil(problem.m / block_m) * math.ceil(problem.n / block_n)
        if (stages * (block_m + block_n) * block_k + ends) * problem.item_bytes + 1024 <= SHARED_BYTES:
            found.append({
                "kind": "tma", "block_m": block_m, "block_n": block_n, "block_k": block_k, "group": 8,
                "programs": min(tiles, MULTIPROCESSORS), "num_warps": warps, "num_stages": stages,
            })  # fmt: skip
    # With fewer tiles than multiprocessors smaller ones are better.
    found.sort(key=lambda c: math.ceil(problem.m / int(c["block_m"])) * math.ceil(problem.n / int(c["block_n"])) < 100)
    return found[:_MOST_TMA]


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
