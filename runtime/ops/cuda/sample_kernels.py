"""The Triton kernel of `ingot::sample_with_logit`: one launch, whatever each row asks for.

Every program scans one chunk of a row; the last of a row to finish decides. Greedy and untruncated rows only take a
maximum (of the logits, or of logits and noise). Where top-k, top-p or min-p cut, the threshold is searched exactly, by
bisection on the floats' bits, over those groups of neighbouring logits whose largest one can still matter. All sums
have a fixed order, so a row's token is a function of that row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def ordered(z: tl.tensor) -> tl.tensor:
    """int32 keys in the order of float32 numbers: a NaN is above all, both zeros are one number."""
    bits = z.to(tl.int32, bitcast=True)
    key = tl.where(z == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(z != z, 0x7FFFFFFF, key)


@triton.jit
def number(key: tl.tensor) -> tl.tensor:
    """The float32 of an int32 key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(z: tl.tensor, index: tl.tensor) -> tl.tensor:
    """int64 whose maximum is the largest z and, among equals, the lowest index."""
    return (ordered(z).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def first_largest(z: tl.tensor, index: tl.tensor) -> tl.tensor:
    """The maximum of `ranked`, for half the instructions per number; every index is below 2^30."""
    largest = tl.max(z)
    # A maximum passes over NaN. Where there is one, the first comes before all else.
    place = tl.min(tl.where(z == largest, index, tl.where(z != z, index - 0x40000000, 0x40000000)))
    nan = place < 0
    return ranked(tl.where(nan, float("nan"), largest), tl.where(nan, place + 0x40000000, place))


@triton.jit
def mix32(x: tl.tensor) -> tl.tensor:
    """Finalizer of a 32-bit integer hash ("lowbias32", Wellons 2018) on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_hash(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """What seed and position, int64 each, add to a row's random bits."""
    h = mix32(seed.to(tl.uint32) + 0x9E3779B9)
    h = mix32(h ^ (seed >> 32).to(tl.uint32))
    return mix32(h ^ position.to(tl.uint32))


@triton.jit
def gumbel(hashed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Gumbel noise of the tokens `index`; its float steps are those of `reference.gumbel_noise`."""
    bits = mix32(hashed ^ (index.to(tl.uint32) * 0x9E3779B9))
    uniform = ((bits >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    return -tl.log(-tl.log(tl.minimum(uniform, 0.999999940395355224609375)))


@triton.jit
def pivots(lo: tl.tensor, hi: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Three keys that cut lo .. hi into quarters; all lie below hi."""
    middle = lo + ((hi - lo) >> 1)
    return lo + ((middle - lo) >> 1), middle, middle + ((hi - middle) >> 1)


@triton.jit
def narrow(
    lo: tl.tensor, hi: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor, limit: tl.tensor, s1: tl.tensor,
    s2: tl.tensor, s3: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The quarter of lo .. hi with the smallest key above which less than `limit` lies; s is what lies above p."""
    low = tl.where(s1 < limit, lo, tl.where(s2 < limit, p1 + 1, tl.where(s3 < limit, p2 + 1, p3 + 1)))
    high = tl.where(s1 < limit, p1, tl.where(s2 < limit, p2, tl.where(s3 < limit, p3, hi)))
    return low, high


@triton.jit
def load_peaks(peaks: tl.tensor, GROUPS: tl.constexpr, PEAKS: tl.constexpr) -> tl.tensor:
    """The key of every group's largest z, and beyond them keys below that of any number."""
    every = tl.arange(0, PEAKS)
    return tl.load(peaks + every, mask=every < GROUPS, other=-0x80000000, cache_modifier=".cg")


@triton.jit
def list_groups(
    listed: tl.tensor, peaks: tl.tensor, lo: tl.tensor, GROUPS: tl.constexpr, PEAKS: tl.constexpr
) -> tl.tensor:
    """Write the indices of the groups whose peak lies above key lo, in order, to `listed`; return how many."""
    wanted = (load_peaks(peaks, GROUPS, PEAKS) > lo.to(tl.int32)).to(tl.int32)
    slot = tl.cumsum(wanted, 0) - 1
    # Nobody still reads the old list, everybody sees the new one.
    tl.debug_barrier()
    tl.store(listed + slot, tl.arange(0, PEAKS), mask=wanted != 0)
    tl.debug_barrier()
    return tl.sum(wanted, 0)


@triton.jit
def divided(row: tl.tensor, index: tl.tensor, inside: tl.tensor, t: tl.tensor) -> tl.tensor:
    """The logits at `index` over t, rounded as IEEE division is; -inf where not `inside`."""
    # 0 in the meantime: dividing an infinity takes the division's slow path.
    z = tl.load(row + index, mask=inside, other=0.0)
    return tl.where(inside, tl.div_rn(z, t), float("-inf"))


@triton.jit
def load_groups(
    row: tl.tensor, listed: tl.tensor, start: tl.tensor, count: tl.tensor, t: tl.tensor, V: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """z [ROWS, GROUP] of the groups from list position `start` on, -inf beyond its end, and their indices."""
    slot = start + tl.arange(0, ROWS)
    group = tl.load(listed + slot, mask=slot < count, other=0)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return divided(row, index, (slot < count)[:, None] & (index < V), t), index


@triton.jit
def above(
    row: tl.tensor, listed: tl.tensor, count: tl.tensor, t: tl.tensor, top: tl.tensor, p1: tl.tensor, p2: tl.tensor,
    p3: tl.tensor, COUNT: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """What of the listed groups lies above each of three keys: tokens (COUNT), or their sum of exp(z - top)."""
    sum1 = tl.zeros([ROWS, GROUP], tl.float32)
    sum2 = tl.zeros([ROWS, GROUP], tl.float32)
    sum3 = tl.zeros([ROWS, GROUP], tl.float32)
    start = tl.full((), 0, tl.int32)
    while start < count:
        z, _ = load_groups(row, listed, start, count, t, V, ROWS, GROUP)
        key = ordered(z)
        weight = tl.full([ROWS, GROUP], 1.0, tl.float32) if COUNT else tl.exp(z - top)
        sum1 += tl.where(key > p1.to(tl.int32), weight, 0.0)
        sum2 += tl.where(key > p2.to(tl.int32), weight, 0.0)
        sum3 += tl.where(key > p3.to(tl.int32), weight, 0.0)
        start += ROWS
    return tl.sum(sum1), tl.sum(sum2), tl.sum(sum3)


@triton.jit
def search(
    row: tl.tensor, listed: tl.tensor, peaks: tl.tensor, t: tl.tensor, top: tl.tensor, lo: tl.tensor, hi: tl.tensor,
    limit: tl.tensor, COUNT: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, PEAKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The smallest key from lo to hi above which less than `limit` lies (as `above` measures it)."""
    count = tl.full((), PEAKS + ROWS, tl.int32)
    while lo < hi:
        # A list of one step costs the same whatever its length; a longer one shrinks as the lower end rises.
        if count > ROWS:
            count = list_groups(listed, peaks, lo, GROUPS, PEAKS)
        p1, p2, p3 = pivots(lo, hi)
        s1, s2, s3 = above(row, listed, count, t, top, p1, p2, p3, COUNT, V, ROWS, GROUP)
        lo, hi = narrow(lo, hi, p1, p2, p3, limit, s1, s2, s3)
    return lo


@triton.jit
def kth_peak(
    peaks: tl.tensor, k: tl.tensor, lo: tl.tensor, hi: tl.tensor, GROUPS: tl.constexpr, PEAKS: tl.constexpr
) -> tl.tensor:
    """The k-th largest peak, or lo if it is smaller: at least k tokens are as large, so it bounds the k-th largest."""
    keys = load_peaks(peaks, GROUPS, PEAKS)
    while lo < hi:
        p1, p2, p3 = pivots(lo, hi)
        s1 = tl.sum((keys > p1.to(tl.int32)).to(tl.int32), 0)
        s2 = tl.sum((keys > p2.to(tl.int32)).to(tl.int32), 0)
        s3 = tl.sum((keys > p3.to(tl.int32)).to(tl.int32), 0)
        lo, hi = narrow(lo, hi, p1, p2, p3, k, s1, s2, s3)
    return lo


@triton.jit
def draw_truncated(
    row: tl.tensor, listed: tl.tensor, peaks: tl.tensor, best: tl.tensor, masses: tl.tensor, t: tl.tensor,
    k: tl.tensor, p: tl.tensor, m: tl.tensor, hashed: tl.tensor, hi: tl.tensor, V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PEAKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`ranked` of the token drawn from what min-p, top-k and top-p leave of a row whose largest z has the key hi.

    `best` and `masses` are its chunks' maxima (ranked) and sums of exp(z - maximum). A token stays in the nucleus while
    the mass of all larger ones is below p: the threshold is the smallest key above which less than p of the mass lies.
    """
    top = number(hi.to(tl.int32))
    everything = ordered(tl.full((), float("-inf"), tl.float32)).to(tl.int64)
    low = everything
    if m > 0:
        low = tl.minimum(ordered(top + tl.log(m)).to(tl.int64), hi)
    if (k > 0) & (k < V):
        # With fewer than k tokens above min-p's threshold the k-th largest lies below it and changes nothing.
        low = kth_peak(peaks, k, low, hi, GROUPS, PEAKS)
        low = search(row, listed, peaks, t, top, low, hi, k.to(tl.float32), True,
                     V, ROWS, GROUP, GROUPS, PEAKS)  # fmt: skip
    if p < 1:
        # A chunk without mass may have a maximum that is no number: it is -inf throughout, or padding.
        total = tl.sum(tl.where(masses > 0, masses * tl.exp(number((best >> 32).to(tl.int32)) - top), 0.0), 0)
        if low > everything:
            count = list_groups(listed, peaks, low - 1, GROUPS, PEAKS)
            total, _, _ = above(row, listed, count, t, top, low - 1, low - 1, low - 1, False, V, ROWS, GROUP)
        # All tokens below this bound together are less than half of what top-p drops.
        bound = ordered(top + tl.log((1.0 - p) * total * (0.5 / V))).to(tl.int64)
        # The likeliest always stays, also where top_p is so small that float32 makes it zero.
        limit = tl.maximum(p, 1.1754943508222875e-38) * total
        low = search(row, listed, peaks, t, top, tl.minimum(tl.maximum(low, bound), hi), hi, limit, False,
                     V, ROWS, GROUP, GROUPS, PEAKS)  # fmt: skip
    count = list_groups(listed, peaks, low - 1, GROUPS, PEAKS)
    winner = tl.full((), -0x8000000000000000, tl.int64)
    start = tl.full((), 0, tl.int32)
    while start < count:
        z, index = load_groups(row, listed, start, count, t, V, ROWS, GROUP)
        noisy = tl.where(ordered(z) >= low.to(tl.int32), z + gumbel(hashed, index), float("-inf"))
        winner = tl.maximum(winner, first_largest(noisy, index))
        start += ROWS
    return winner


@triton.jit
def sample_kernel(
    logits: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor, seeds: tl.tensor,
    positions: tl.tensor, tokens: tl.tensor, logit: tl.tensor, best: tl.tensor, masses: tl.tensor, peaks: tl.tensor,
    listed: tl.tensor, arrived: tl.tensor, input_tokens: tl.tensor, input_positions: tl.tensor, V: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr, TEMPERATURE_STRIDE: tl.constexpr, TOP_K_STRIDE: tl.constexpr,
    TOP_P_STRIDE: tl.constexpr, MIN_P_STRIDE: tl.constexpr, SEEDS_STRIDE: tl.constexpr,
    POSITIONS_STRIDE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    GROUP: tl.constexpr, PEAKS: tl.constexpr, BLOCK: tl.constexpr, ADVANCE: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (CHUNKS, batch). Scratch per row: best [CHUNKS] int64, masses [CHUNKS], peaks and listed [PEAKS] int32 (one
    per GROUP logits), arrived [1] int32, zero before and after. CHUNKS_PADDED and PEAKS are powers of two.

    ADVANCE: a row that has a position gets its token as next input, and moves on by one. EARLY: no launch before this
    one writes the parameters.
    """
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    chunk = tl.program_id(0)
    b = tl.program_id(1)
    t = tl.load(temperature + b * TEMPERATURE_STRIDE)
    k = tl.load(top_k + b * TOP_K_STRIDE)
    p = tl.load(top_p + b * TOP_P_STRIDE)
    m = tl.load(min_p + b * MIN_P_STRIDE)
    position = tl.load(positions + b * POSITIONS_STRIDE)
    hashed = row_hash(tl.load(seeds + b * SEEDS_STRIDE), position)
    if PDL and EARLY:
        gdc_wait()
    row = logits + b.to(tl.int64) * LOGITS_STRIDE
    GROUPS: tl.constexpr = CHUNK // GROUP
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z = tl.load(row + index, mask=index < V, other=float("-inf"))
    best += b * CHUNKS
    masses += b * CHUNKS
    peaks += b * PEAKS
    drawn = t > 0
    truncated = drawn & (((k > 0) & (k < V)) | (p < 1) | (m > 0))
    if drawn:
        z = tl.div_rn(z, t)
        if not truncated:
            z += gumbel(hashed, index)
    largest = first_largest(z, index)
    tl.store(best + chunk, largest)
    if truncated:
        tl.store(peaks + group, tl.max(ordered(z), 1))
        mass = tl.where(z == float("-inf"), 0.0, tl.exp(z - number((largest >> 32).to(tl.int32))))
        tl.store(masses + chunk, tl.sum(mass))
    # All of this program's stores come before its arrival, and the last one's loads after everybody's.
    tl.debug_barrier()
    if tl.atomic_add(arrived + b, 1, sem="acq_rel") == CHUNKS - 1:
        tl.store(arrived + b, 0)
        each = tl.arange(0, CHUNKS_PADDED)
        found = tl.load(best + each, mask=each < CHUNKS, other=-0x8000000000000000, cache_modifier=".cg")
        winner = tl.max(found, 0)
        # A NaN or an infinity is the answer itself: there is nothing to draw, and the host must see it.
        if truncated & (tl.abs(number((winner >> 32).to(tl.int32))) < float("inf")):
            mass = tl.load(masses + each, mask=each < CHUNKS, other=0.0, cache_modifier=".cg")
            winner = draw_truncated(
                row, listed + b * PEAKS, peaks, found, mass, t, k, p, m, hashed, winner >> 32,
                V, BLOCK // GROUP, GROUP, CHUNKS * GROUPS, PEAKS,
            )  # fmt: skip
        token = 0x7FFFFFFF - (winner & 0xFFFFFFFF)
        tl.store(tokens + b, token)
        # The key of a greedy row's winner is its logit's; temperature and noise are in the others'.
        value = number((winner >> 32).to(tl.int32))
        if drawn:
            value = tl.load(row + token)
        tl.store(logit + b, value)
        if ADVANCE:
            # All programs of the row have read its position before they arrived.
            tl.store(input_tokens + b, token, mask=position >= 0)
            tl.store(input_positions + b, position + 1, mask=position >= 0)
