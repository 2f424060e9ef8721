"""Which configurations of the prefill kernels of `fused_linear` are worth measuring, as `linear_configs` for decode."""

from __future__ import annotations

import math

from .linear_configs import MULTIPROCESSORS, SHARED_BYTES, power_of_two, split_count
from .linear_problem import Problem
from .spec import Config

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
# As for `gemm`, where x and the weight are of one byte, at twice the rate.
_GEMM_BYTE_TILES = (
    (128, 256, 128, 8, 4, 1.00),
    (128, 256, 128, 8, 3, 0.98),
    (128, 128, 128, 8, 4, 0.93),
    (128, 128, 128, 4, 4, 0.92),
    (64, 256, 128, 4, 3, 0.80),
    (64, 128, 128, 4, 5, 0.70),
)
# For quantized weights, of which a tile becomes numbers in registers: rows of x, rows of the weight, bytes of each a
# step, warps, stages. A group's scales take a second sum, so the tiles are smaller.
_TALL = ((256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 64, 64, 4, 4))
_TALL_GROUPED = ((128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 8, 3), (64, 64, 128, 4, 3))
_TALL_EXACT = ((64, 64, 16, 4, 3), (32, 64, 32, 4, 3))
# float32 has no tensor cores here: exact products on the plain cores, small tiles.
_GEMM_EXACT = ((64, 64, 16, 4, 3, 1.0), (128, 64, 16, 8, 3, 1.0), (32, 64, 32, 4, 3, 0.8))
# In a microsecond: floating point operations of a multiprocessor; bytes of memory, of the L2 cache, and of a program.
_RATE, _MEMORY_RATE, _CACHE_RATE, _PROGRAM_RATE = 5.9e6, 4.3e6, 7.0e6, 1.0e5


def gemm_configs(problem: Problem) -> list[Config]:
    """`block_m`, `block_n`, `block_k`, `splits`, `group`: see `gemm`; the fastest by an estimate."""
    m, n, k = problem.m, problem.n, problem.k
    item = 1 if problem.activations else problem.item_bytes
    choices = {1: _GEMM_BYTE_TILES, 2: _GEMM_TILES, 4: _GEMM_EXACT}[item]
    rate = _RATE * (2 if item == 1 else 1)
    found: dict[tuple[int, ...], tuple[float, Config]] = {}
    for block_m, block_n, block_k, warps, stages, share in choices:
        if stages * (block_m + block_n) * block_k * item > SHARED_BYTES:
            continue
        tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
        # The sum of a split and what it is added to are in registers together: more than 64 of each spill.
        splittable = tiles < MULTIPROCESSORS and block_m * block_n <= 64 * 32 * warps
        for wanted in (1, 2, 4) if splittable else (1,):
            splits = split_count(wanted, math.ceil(k / block_k))
            part, programs = k / splits, tiles * splits
            waves, read = math.ceil(programs / MULTIPROCESSORS), (block_m + block_n) * part * item
            product = waves * 2 * block_m * block_n * part / (share * rate)
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


def tall_configs(problem: Problem) -> list[Config]:
    """As `skinny_configs`, for quantized weights and more rows of x than a decode step has."""
    length = problem.row_bytes
    each = problem.k // length
    choices = _TALL_EXACT if problem.item_bytes == 4 else _TALL_GROUPED if problem.grouped else _TALL
    found: dict[tuple[int, ...], Config] = {}
    for block_m, rows, step_bytes, warps, stages in choices:
        block = max(16, min(step_bytes, power_of_two(length)))
        if problem.grouped:
            block = math.gcd(block, problem.group[1], length)
            rows = math.gcd(rows, problem.group[0]) if problem.group[0] > 1 else rows
        block_m = min(block_m, power_of_two(problem.m))
        shared = stages * block * (rows + block_m * each * problem.item_bytes)
        if shared > SHARED_BYTES or block < 16:
            continue
        found[block_m, rows, block, warps, stages] = {
            "kind": "skinny", "block_m": block_m, "block_n": rows // problem.gated, "block_k": block * each,
            "splits": 1, "ahead": 0, "apart": False, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
    return list(found.values())
