"""Quantized weights inside of the kernels of `fused_linear`: bytes to numbers in few instructions, scales, zero points.

A conversion instruction is slow next to what memory delivers, so bytes and nibbles are set into the mantissa of a
float whose exponent makes it "a power of two plus the value" (Kim et al. 2022, "Who says elephants can't run"). The
interpreter knows no inline assembly: there, plain casts compute the same.

int4 comes in halves: byte j of a row holds column j in its low nibble and column k / 2 + j in its high one, so that
the columns of either lie in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Four bytes u of int8, made unsigned: as bits 8 to 15 of a float32, 32768 + u.
_INT8_TO_FLOAT = tl.constexpr("""{
.reg .b32 u;
xor.b32 u, $4, 0x80808080;
prmt.b32 $0, u, 0x47000000, 0x7404;
prmt.b32 $1, u, 0x47000000, 0x7414;
prmt.b32 $2, u, 0x47000000, 0x7424;
prmt.b32 $3, u, 0x47000000, 0x7434;
}""")
# Eight nibbles: the low ones at bits 19 to 22 as 16 + n, the high ones at bits 15 to 18 as 256 + n.
_NIBBLES_TO_FLOAT = tl.constexpr("""{
.reg .b32 t;
shl.b32 t, $8, 19;
lop3.b32 $0, t, 0x00780000, 0x41800000, 0xEA;
shl.b32 t, $8, 11;
lop3.b32 $1, t, 0x00780000, 0x41800000, 0xEA;
lop3.b32 $4, t, 0x00078000, 0x43800000, 0xEA;
shl.b32 t, $8, 3;
lop3.b32 $2, t, 0x00780000, 0x41800000, 0xEA;
lop3.b32 $5, t, 0x00078000, 0x43800000, 0xEA;
shr.u32 t, $8, 5;
lop3.b32 $3, t, 0x00780000, 0x41800000, 0xEA;
lop3.b32 $6, t, 0x00078000, 0x43800000, 0xEA;
shr.u32 t, $8, 13;
lop3.b32 $7, t, 0x00078000, 0x43800000, 0xEA;
}""")
# To bfloat16, whole numbers up to 256 exactly: four bytes of int8, each as (128 + its low seven bits) - (128, or 256 if
# it is negative); the low or the high nibbles of four bytes as 128 + n, less 128 or less 136.
_INT8_TO_BFLOAT16 = tl.constexpr("""{
.reg .b32 a, b, m, h;
mov.b32 m, 0xBF80BF80;
prmt.b32 a, $2, 0, 0x4140;
lop3.b32 h, a, 0x00800080, 0x43004300, 0xEA;
lop3.b32 b, a, 0x007F007F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, h, m, b;
prmt.b32 a, $2, 0, 0x4342;
lop3.b32 h, a, 0x00800080, 0x43004300, 0xEA;
lop3.b32 b, a, 0x007F007F, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, h, m, b;
}""")
_NIBBLES = """{{
.reg .b32 t, a, m, h;
mov.b32 m, {one};
mov.b32 h, {base};
shr.u32 t, $2, {shift};
prmt.b32 a, t, 0, 0x4140;
lop3.b32 a, a, 0x000F000F, {magic}, 0xEA;
fma.rn.{type} $0, a, m, h;
prmt.b32 a, t, 0, 0x4342;
lop3.b32 a, a, 0x000F000F, {magic}, 0xEA;
fma.rn.{type} $1, a, m, h;
}}"""
# What the kernels add to the values of the low and the high nibbles.
# By half, then whether a zero point is given: where none is, it is 8.
_BFLOAT16_NIBBLES = tl.constexpr(
    tuple(
        _NIBBLES.format(one="0x3F803F80", base=base, shift=shift, magic="0x43004300", type="bf16x2")
        for shift in (0, 4)
        for base in ("0xC308C308", "0xC300C300")
    )
)
_LOW_BASE, _HIGH_BASE, _INT8_BASE = tl.constexpr(16.0), tl.constexpr(256.0), tl.constexpr(32768.0 + 128.0)
# The zero point where there is none.
_NO_ZERO = tl.constexpr(8.0)


@triton.jit
def expanded(stored: tl.tensor, FORMAT: tl.constexpr, RAISED: tl.constexpr, ASSEMBLY: tl.constexpr) -> tl.tuple:
    """Stored values in float32, for int4 those of the low nibbles and those of the high ones.

    RAISED: what `base_of` says is added, which is cheaper; int8 then loses in the sum what bits 2**-24 of 32768 are.
    """
    if FORMAT == "int4_halves":
        if ASSEMBLY:
            return tl.inline_asm_elementwise(
                _NIBBLES_TO_FLOAT, "=r,=r,=r,=r,=r,=r,=r,=r,r", [stored], (tl.float32, tl.float32), True, 4
            )
        else:
            return (stored & 15).to(tl.float32) + _LOW_BASE, (stored >> 4).to(tl.float32) + _HIGH_BASE
    elif FORMAT == "int8" and RAISED:
        if ASSEMBLY:
            return (tl.inline_asm_elementwise(_INT8_TO_FLOAT, "=r,=r,=r,=r,r", [stored], tl.float32, True, 4),)
        else:
            return (stored.to(tl.float32) + _INT8_BASE,)
    else:
        return (stored.to(tl.float32),)


@triton.jit
def base_of(FORMAT: tl.constexpr, half: tl.constexpr) -> tl.constexpr:
    """What a RAISED `expanded` adds to the values, of int4 to those of a half."""
    if FORMAT == "int4_halves":
        return _LOW_BASE if half == 0 else _HIGH_BASE
    else:
        return _INT8_BASE


@triton.jit
def scale_tiles(
    scale: tl.tensor,
    zero: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    start: tl.tensor,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_FIRST: tl.constexpr,
) -> tl.tuple:
    """The scales, then the zero points, of TILES tiles: of their columns, or of the first half's, then the second's.

    `rows`: where the scales of the weight's rows start; `k`: a column of each group of a tile's columns.
    """
    found: tl.tuple = ()
    for kind in tl.static_range(2 if HAS_ZERO else 1):
        source = (zero if kind else scale) + rows[:, None]
        for half in tl.static_range(2 if HALF > 0 else 1):
            for tile in tl.static_range(TILES):
                at = (k + (start + tile * BLOCK))[None, :]
                group = (at + half * HALF) // COLUMNS
                if not IS_FIRST or (tile + 1) * BLOCK > LENGTH:
                    value = tl.load(source + group, mask=at < LENGTH, other=0)
                else:
                    value = tl.load(source + group)
                found = found + (value,)  # noqa: RUF005 - Triton has no unpacking here
    return found


@triton.jit
def scale_of(found: tl.tuple, half: tl.constexpr, tile: tl.constexpr, TILES: tl.constexpr) -> tl.tensor:
    """A tile's scales, of what `scale_tiles` found."""
    return found[half * TILES + tile].to(tl.float32)


@triton.jit
def zero_of(
    found: tl.tuple, half: tl.constexpr, tile: tl.constexpr, TILES: tl.constexpr, HAS_ZERO: tl.constexpr
) -> tl.tensor:
    """A tile's zero points, of what `scale_tiles` found, or the one for all."""
    if HAS_ZERO:
        return found[(2 + half) * TILES + tile].to(tl.float32)
    else:
        return _NO_ZERO


@triton.jit
def narrowed(
    stored: tl.tensor,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
) -> tl.tensor:
    """Stored values in x's dtype, exactly: a tile; of int4 its low (HALF 0) or high nibbles, less 8 without zeros."""
    BFLOAT16: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300
    if FORMAT == "int4_halves":
        if ASSEMBLY and BFLOAT16:
            SOURCE: tl.constexpr = _BFLOAT16_NIBBLES[HALF * 2 + HAS_ZERO]
            return tl.inline_asm_elementwise(SOURCE, "=r,=r,r", [stored], tl.bfloat16, True, 4)
        else:
            nibbles = ((stored >> 4) if HALF else (stored & 15)).to(tl.float32)
            return (nibbles if HAS_ZERO else nibbles - _NO_ZERO).to(DTYPE)
    elif FORMAT == "int8" and ASSEMBLY and BFLOAT16:
        return tl.inline_asm_elementwise(_INT8_TO_BFLOAT16, "=r,=r,r", [stored], tl.bfloat16, True, 4)
    else:
        return stored.to(tl.float32).to(DTYPE)


@triton.jit
def less(numbers: tl.tensor, zero: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:
    """Numbers [R, K] minus their rows' zero points, exact in any dtype; NARROW: computed in theirs."""
    if NARROW:
        return numbers - zero.to(tl.float32).to(numbers.dtype)[:, None]
    else:
        return (numbers.to(tl.float32) - zero.to(tl.float32)[:, None]).to(numbers.dtype)
