"""What a warp does with a unit of packed weights, 128 columns of a tile, and 1 to 16 tokens: products and sums.

A sum of int8 weights times digits stays an integer until the end. One of int4 weights becomes fp32 with each group of
columns: sum(w x) = s (sum(q x) - (8 + z) sum(x)) for a scale s and a zero point z. A byte of words holds two weights,
low and high; the high one is multiplied where it is, 16 times too large, which the row's last factor makes good.
Integers turn into fp32 at no cost: they are added to the bits of a large float (`fragments.MAGIC`), whose 22 bits
255 x 128 columns x 128 do not leave.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import MAGIC, halves, load_four, load_word, mma

OFFSET = gl.constexpr(12582912.0)
"""MAGIC as a float."""


@gluon.constexpr_function
def tail_bytes(groups, zeros):
    """Return the size of a unit's scales and zero points, 0 for int8."""
    return groups * 32 + (groups * 8 + 8) // 16 * 16 * zeros


@gluon.constexpr_function
def tail_stride(groups, zeros):
    """Return how far apart the tails of a slot lie; in lines, those that fill at most one begin in one each."""
    return (tail_bytes(groups, zeros) + 63) // 64 * 64


@gluon.constexpr_function
def tails_bytes(groups, zeros, tiles):
    """Return the size of the tails in a slot, in whole lines."""
    return (tiles * tail_stride(groups, zeros) + 127) // 128 * 128


@gluon.jit
def load_unit(
    places, TILE: gl.constexpr, R: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr
):  # fmt: skip
    """Return what a lane needs of a tile's unit: its words, and each group's pair of scales and byte of zero points.

    places: where the lane finds them for the first of the slot's R tiles, see `packed_product.slot_places`.
    """
    TAIL: gl.constexpr = TILE * tail_stride(GROUPS, ZEROS)
    words_at, scales_at, zeros_at = places
    words, scales, zeros = (), (), ()
    for part in gl.static_range(2 * PLANES):
        words += load_four(words_at, 512 // R * TILE + 512 * R * part)
    for i in gl.static_range(GROUPS):
        scales += (load_word(scales_at, TAIL + 32 * i, "b32"),)
        if ZEROS:
            zeros += (load_word(zeros_at, TAIL + 32 * GROUPS + 8 * i, "u8").to(gl.int32),)
    return words, scales, zeros


@gluon.jit
def add_unit(
    totals, unit, xs, sums, none, PLANES: gl.constexpr, GROUPS: gl.constexpr, SETS: gl.constexpr, BF16: gl.constexpr
):  # fmt: skip
    """Return the sums of a lane plus a unit's: for each product those of row g, then of g + 8.

    xs and sums: see `load_token` and `load_tokens`; none is 0. One token's sums of int8 weights are two products, of
    the tile's first half and of its second. Those of int4 weights are 16 times too large for the second half.
    """
    words, scales, zeros = unit
    if PLANES == 2 and SETS == 0:
        first, second = totals
        for c in gl.static_range(2):
            first = mma(words[4 * c : 4 * c + 4], xs[2 * c : 2 * c + 2], first, True)
            second = mma(words[4 * c + 8 : 4 * c + 12], xs[2 * c : 2 * c + 2], second, True)
        totals = (first, second)
    elif PLANES == 2:
        for s in gl.static_range(4):
            a = words[2 * s], words[2 * s + 8], words[2 * s + 1], words[2 * s + 9]
            totals = add_products(totals, a, xs, s, True)
    for i in gl.static_range(GROUPS):
        first, second = halves(scales[i], BF16)
        zero = zeros[i] if len(zeros) > 0 else none + 0x88
        if SETS == 0:
            group = sums_alone(words, xs, zero, sums[i], none, i, GROUPS)
        else:
            group = sums_among(words, xs, zero, sums, i, GROUPS)
        new = ()
        for j in gl.static_range(len(totals)):
            new += (add_scaled(totals[j], group[j], first, second),)
        totals = new
    return totals


@gluon.jit
def add_products(cs, a, xs, S: gl.constexpr, SIGNED: gl.constexpr):
    """Return each product's c plus step S of four, of 32 columns: words a times digits."""
    new = ()
    for j in gl.static_range(len(cs)):
        new += (mma(a, xs[j][2 * S : 2 * S + 2], cs[j], SIGNED),)
    return new


@gluon.jit
def sums_alone(words, xs, zero, negated, none, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """Return one token's sums of (q - zero) x over a group in fp32: a digit's for the low and 16 times the high bits.

    A token's digits leave columns of the product to spare. So words are an operand as they lie in four registers, no
    matter that the second and fourth are of other columns than the first and third: they meet the digits of these in
    columns of their own, the odd ones. And the high bits are never taken out of a byte: theirs is the difference of
    the sums for all bits and for the low ones.
    """
    PIECE: gl.constexpr = 2 if GROUPS == 4 else 4
    low, all_ = (none, none, none, none), (none, none, none, none)
    for s in gl.static_range(8 // PIECE * GROUP // GROUPS, 8 // PIECE * (GROUP + 1) // GROUPS):
        a, b, masked = words[PIECE * s : PIECE * (s + 1)], xs[PIECE // 2 * s : PIECE // 2 * (s + 1)], ()
        for i in gl.static_range(PIECE):
            masked += (a[i] & 0x0F0F0F0F,)
        all_ = mma(a, b, all_, False)
        low = mma(masked, b, low, False)
    low = in_fp32(alone(low) + ((zero & 15) * negated + MAGIC))
    return ((low - OFFSET, in_fp32(alone(all_) + (zero * negated + MAGIC)) - low),)


@gluon.jit
def alone(four):
    """Return one token's sum: an even column of the first eight rows, an odd one of the others."""
    return four[0] + four[3]


@gluon.jit
def sums_among(words, xs, zero, sums, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """Return for each product of several tokens what `sums_alone` does, for two columns: of low bits, then of high."""
    low, high, cs, results = zero & 15, zero & 0xF0, (), ()
    for j in gl.static_range(len(xs)):
        one, other = sums[j][GROUP]
        cs += ((low * one + MAGIC, low * other + MAGIC, high * one + MAGIC, high * other + MAGIC),)
    for s in gl.static_range(GROUP * 4 // GROUPS, (GROUP + 1) * 4 // GROUPS):
        a, b = words[2 * s], words[2 * s + 1]
        cs = add_products(cs, (a & 0x0F0F0F0F, a & 0xF0F0F0F0, b & 0x0F0F0F0F, b & 0xF0F0F0F0), xs, s, False)
    for j in gl.static_range(len(xs)):
        result = ()
        for i in gl.static_range(4):
            result += (in_fp32(cs[j][i]) - OFFSET,)
        results += (result,)
    return results


@gluon.jit
def in_fp32(bits):
    """Return an integer that was added to MAGIC as the fp32 that is OFFSET larger."""
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def add_scaled(totals, sums, first, second):
    """Return totals plus sums times the scale of the tile's half: the first of them, then as many of the second."""
    new = ()
    for i in gl.static_range(len(sums)):
        scale = first if 2 * i < len(sums) else second
        new += (totals[i] + scale * sums[i],)
    return new
