"""Activations as exact small integers: the other operand of `packed_product`.

x times the norm's gain becomes a fixed-point number of 16 bits: two digits of base 256, -128 .. 127. A warp takes every
WARPS-th unit of 128 columns, and scales those of a token by a power of two so that their largest value takes 15 bits
and a sign: no warp waits for another. What is rounded away comes to 2^-15.8 of the largest value at most (root mean
square): of normally distributed ones to about a fortieth of what bf16's rounding of each does. Beside one that is
larger than all others together, 1,376 of them (K = 11,008) add up to a third of what bf16's rounding of the result
does, over all rows; in rows that hardly weigh that one, to several times as much.

The digits of one token, or of a few, lie in shared memory, made by every program of a product (`stage_token`,
`stage_tokens`); those of more are made by a kernel before the product (`prepare_kernel`). All serve as the columns of
mma.m16n8k32: of one token, the digits are columns of one product; of several, each digit takes a product of its own,
with eight tokens as columns. Because products and sums of integers are exact, nothing here has an order, and a token's
bits do not depend on the others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import (
    digits,
    halves,
    lanes,
    less_bytes,
    load_four,
    load_global,
    load_two,
    load_word,
    reduced,
    signed_half,
    statement,
    store_float,
    store_two,
    store_word,
    swapped,
    swapped_float,
    wait_where,
)

WARPS = gl.constexpr(8)
"""Warps that share a row; they are the order of every sum along K."""


@gluon.constexpr_function
def digit_bytes(groups, sets):
    """Return the size of a unit of x, digits and sums of groups: of one token, or of `sets` of eight in whole lines."""
    return (sets * (2048 + 64 * groups) + 127) // 128 * 128 if sets else 256 + 16 * groups


@gluon.jit
def lane_of(WARPS: gl.constexpr):
    """Return the number of each lane in its warp, and of its warp, [1, 32] and [warps, 1]."""
    L: gl.constexpr = lanes(WARPS)
    return gl.arange(0, 32, gl.SliceLayout(0, L))[None, :], gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None]


@gluon.constexpr_function
def pieces_of(units):
    """Return in how many pieces a warp takes its share of a row, two units each."""
    return (units + 2 * WARPS.value - 1) // (2 * WARPS.value)


@gluon.jit
def unit_of(i, lane, warp):
    """Return the unit of piece i of a warp's share of a row: half of the lanes have one, half the warp's next."""
    return (2 * i + lane // 16) * WARPS + warp


@gluon.jit
def load_row(x, UNITS: gl.constexpr, here):
    """Return each warp's units of x [128 UNITS], eight values a lane in each of some pieces, zeros behind them or where
    not `here`."""
    lane, warp = lane_of(WARPS)
    row = ()
    for i in gl.static_range(pieces_of(UNITS)):
        row += (load_piece(x, unit_of(i, lane, warp), lane, UNITS, here),)
    return row


@gluon.jit
def load_piece(x, unit, lane, UNITS: gl.constexpr, here):
    """Return eight values a lane of its unit of x [128 UNITS] as four words, zeros where none is or not `here`."""
    return load_global(x.to(gl.int64) + (unit * 16 + lane % 16) * 16, (unit < UNITS) & here)


@gluon.jit
def as_floats(words, BF16: gl.constexpr):
    """Return the eight fp32 of four words."""
    a, b, c, d = (
        halves(words[0], BF16), halves(words[1], BF16), halves(words[2], BF16), halves(words[3], BF16)
    )  # fmt: skip
    return a + b + c + d


@gluon.jit
def scaled(row, gains, BF16: gl.constexpr):
    """Return the pieces of a row as eight fp32 each, times the gains if there are any."""
    values = ()
    for i in gl.static_range(len(row)):
        eight = as_floats(row[i], BF16)
        if gains is not None:
            gain, product = as_floats(gains[i], BF16), ()
            for j in gl.static_range(8):
                product += (eight[j] * gain[j],)
            eight = product
        values += (eight,)
    return values


@gluon.jit
def peak_of(values):
    """Return a lane's largest value without its sign, as the bits of an fp32, which have the order of the values."""
    peak = gl.zeros_like(values[0][0]).to(gl.int32)
    for i in gl.static_range(len(values)):
        for j in gl.static_range(8):
            peak = gl.maximum(peak, values[i][j].to(gl.int32, bitcast=True) & 0x7FFFFFFF)
    return peak


@gluon.jit
def peak_of_warps(values):
    """Return the largest of the `peak_of` of all lanes of all warps, whatever their number."""
    peak = reduced(peak_of(values), "max.u32")
    if peak.shape[0] == 1:
        return peak
    else:
        return gl.max(peak, axis=0)[None, :] + gl.zeros_like(peak)


@gluon.jit
def power_of(top):
    """Return a power of two that brings values up to `top`, of `peak_of`, to 15 bits, and what it is made good with.

    From 32639.5 on, a value would round to more than two digits hold, 127 x 257: it counts as the next power of two.
    For an infinite or NaN value the second is NaN.
    """
    TO_NEXT: gl.constexpr = 0x10100  # in the last places of 32639.5 = 1.9921570 x 2^14
    lifted = gl.maximum((gl.minimum(top, 0x7F800000) + TO_NEXT) >> 23, 15)
    factor = ((lifted - 14) << 23).to(gl.float32, bitcast=True)
    return ((268 - lifted) << 23).to(gl.float32, bitcast=True), gl.where(top >= 0x7F800000, float("nan"), factor)


@gluon.jit
def sum_of_squares(row, BF16: gl.constexpr):
    """Return the sum of the squares of a warp's share of x, in one order."""
    squares = gl.zeros_like(row[0][0]).to(gl.float32)
    for i in gl.static_range(len(row)):
        eight = as_floats(row[i], BF16)
        for j in gl.static_range(8):
            squares += eight[j] * eight[j]
    for i in gl.static_range(5):
        squares += swapped_float(squares, 1 << i)
    return squares


@gluon.jit
def rms_scale(address, eps, WIDTH: gl.constexpr):
    """Return what RMSNorm multiplies a row of WIDTH values with, whose warps' sums of squares lie at `address`."""
    return gl.rsqrt((sum_of(load_four(address, 0)) + sum_of(load_four(address, 16))) / WIDTH + eps)


@gluon.jit
def sum_of(four):
    """Return the sum of four fp32 that were loaded as words."""
    first = four[0].to(gl.float32, bitcast=True) + four[1].to(gl.float32, bitcast=True)
    return first + (four[2].to(gl.float32, bitcast=True) + four[3].to(gl.float32, bitcast=True))


@gluon.jit
def digits_of(eight, power, lane, GROUPS: gl.constexpr):
    """Return the digits of eight values, two words each, and minus the sums of each digit over the values' group."""
    first = digits((eight[0], eight[1], eight[2], eight[3]), power)
    second = digits((eight[4], eight[5], eight[6], eight[7]), power)
    sums = ()
    if GROUPS > 0:
        for d in gl.static_range(2):
            sums += (sum_of_group(less_bytes(first[d], less_bytes(second[d], 0)), lane, GROUPS),)
    return first, second, sums


@gluon.jit
def sum_of_group(total, lane, GROUPS: gl.constexpr):
    """Return the sum of `total` over the lanes of a group of columns.

    Of groups of a unit a warp has two: their sums, of at most 15 bits, are the halves of a single one of all lanes.
    """
    if GROUPS == 1:
        half = lane // 16 + gl.zeros_like(total)
        both = reduced(total << half * 16, "add.s32")
        return signed_half(both + (half << 15), 0x9910 + half * (0xBB32 - 0x9910))
    else:
        for i in gl.static_range(3 if GROUPS == 2 else 2):
            total += swapped(total, 1 << i)
        return total


@gluon.constexpr_function
def preparing_warps(width):
    """Return how many warps `prepare_kernel` takes: one for each piece of a share, a power of two; at most 32 for
    `launch.MAX_COLUMNS`.
    """
    return 1 << (pieces_of((width + 127) // 128) - 1).bit_length()


@gluon.jit(do_not_specialize=["rehearsals"])
def prepare_kernel(
    x, norm, blocks, factors, rehearsals, WIDTH: gl.constexpr, GROUPS: gl.constexpr, SETS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Grid (tokens, WARPS, 2 with a norm, else 1): the digits of x [tokens, 128 UNITS] times norm, and their factors.

    blocks [UNITS, digit_bytes / 4] int32: digits [SETS, 2, 2, 32 lanes, 4 words], lane 4g + t with token g; then the
    sums of groups [SETS, GROUPS, 2, 8 tokens], negated; then what fills a line. factors [2, 8 SETS, WARPS] fp32: of
    each token and warp what makes its scale good, and the sum of x's squares if there is a norm.

    Next to nothing else runs meanwhile, so this shall be short: a program makes what is a single warp's in the product,
    with a warp for each piece; others add up the squares. And before it waits for the kernel ahead, it goes through its
    code `rehearsals` times without loads and stores, which brings that into the cache.
    """
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    BF16: gl.constexpr = x.dtype.element_ty == gl.bfloat16
    lane, piece = lane_of(preparing_warps(WIDTH))
    token, warp = gl.program_id(0), gl.program_id(1)
    unit, gains = unit_of(piece, lane, warp), None
    x += token * (UNITS * 128)
    factor_at = factors + token * WARPS + warp + unit * 0
    if norm is not None:
        gains = (load_piece(norm, unit, lane, UNITS, True),)
    if PDL:
        statement("griddepcontrol.launch_dependents;")
    for attempt in range(rehearsals + 1):
        live = attempt == rehearsals
        once = (lane == 0) & (piece == 0) & live
        if PDL:
            wait_where(live)
        if gl.program_id(2) == 0:
            values = scaled((load_piece(x, unit, lane, UNITS, live),), gains, BF16)
            power, factor = power_of(peak_of_warps(values))
            leave_digits(values[0], power, blocks, unit, token, lane, (unit < UNITS) & live, GROUPS, SETS)
            gl.store(factor_at, factor, mask=once)
        if norm is not None:  # noqa: SIM102  (decided when it is compiled)
            if gl.program_id(2) == 1:
                row, alone = (), live & (piece == 0)  # one warp adds up, in the order of one token
                for i in gl.static_range(pieces_of(UNITS)):
                    row += (load_piece(x, unit + i * (2 * WARPS), lane, UNITS, alone),)
                gl.store(factor_at + SETS * 8 * WARPS, sum_of_squares(row, BF16), mask=once)


@gluon.jit
def leave_digits(
    eight, power, blocks, unit, token, lane, here, GROUPS: gl.constexpr, SETS: gl.constexpr
):  # fmt: skip
    """Store a lane's digits of a token and minus the sums of their groups where `prepare_kernel` leaves them."""
    first, second, sums = digits_of(eight, power, lane, GROUPS)
    at, sums_at = places_of(token, lane % 16, GROUPS, SETS)
    block = blocks + unit * (digit_bytes(GROUPS, SETS) // 4)
    for d in gl.static_range(2):
        gl.store(block + at + d * 256, first[d].to(gl.int32, bitcast=True), mask=here)
        gl.store(block + at + d * 256 + 1, second[d].to(gl.int32, bitcast=True), mask=here)
        if GROUPS > 0:
            gl.store(block + sums_at + d * 8, sums[d], mask=here)


@gluon.jit
def places_of(token, place, GROUPS: gl.constexpr, SETS: gl.constexpr):
    """Return at which word of a unit's block (see `prepare_kernel`) a token's eight columns from 8 `place` on have the
    first two words of their digits, and their group its first sum; the second digit's are 256 and 8 words behind."""
    digits_at = token // 8 * 512 + place // 8 * 128 + (token % 8 * 4 + place % 4) * 4 + place // 4 % 2 * 2
    return digits_at, SETS * 512 + (token // 8 * GROUPS + place * GROUPS // 16) * 16 + token % 8


@gluon.jit
def stage_token(values, power, address, GROUPS: gl.constexpr):
    """Store one token's digits, [unit, 2, 2 halves, 4 t, 4 words], and minus the sums of its groups, [unit, group, 4].

    A warp stores what only its own lanes load. Of the two words of a digit that belong to the eight columns of a lane
    t, the first is in the first half.
    """
    lane, warp = lane_of(WARPS)
    BLOCK: gl.constexpr = digit_bytes(GROUPS, 0)
    for i in gl.static_range(len(values)):
        first, second, sums = digits_of(values[i], power, lane, GROUPS)
        place, block = lane % 16, address + unit_of(i, lane, warp) * BLOCK
        at = block + place % 4 * 16 + place // 4 * 4
        for d in gl.static_range(2):
            store_word(at, first[d].to(gl.int32, bitcast=True), d * 128)
            store_word(at, second[d].to(gl.int32, bitcast=True), d * 128 + 64)
            if GROUPS > 0:
                store_word(block + place * GROUPS // 16 * 16, sums[d], 256 + d * 4)


@gluon.jit
def stage_tokens(
    x, rows, gains, tokens, address, factors_at, squares_at, UNITS: gl.constexpr, GROUPS: gl.constexpr,
    SETS: gl.constexpr, BF16: gl.constexpr,
):  # fmt: skip
    """Store the digits of several tokens x [tokens, 128 UNITS] as `prepare_kernel` leaves them, and their factors.

    `rows` are the first tokens' rows: as many are on their way at any time. As of one token, a warp stores what only
    its own lanes load.
    """
    lane, warp = lane_of(WARPS)
    for token in range(tokens):
        row, ahead = rows[0], token + len(rows)
        rows = rows[1:]
        rows += (load_row(x + ahead * (UNITS * 128), UNITS, ahead < tokens),)
        values = scaled(row, gains, BF16)
        power, factor = power_of(reduced(peak_of(values), "max.u32"))
        at, sums_at = places_of(token, lane % 16, GROUPS, SETS)
        for i in gl.static_range(len(values)):
            first, second, sums = digits_of(values[i], power, lane, GROUPS)
            block = address + unit_of(i, lane, warp) * digit_bytes(GROUPS, SETS)
            for d in gl.static_range(2):
                store_two(block + at * 4, first[d], second[d], d * 1024)
                if GROUPS > 0:
                    store_word(block + sums_at * 4, sums[d], d * 32)
        store_float(factors_at + (token * 32 + warp * 4 + lane * 0), factor, 0)
        if gains is not None:
            store_float(squares_at + (token * 32 + warp * 4 + lane * 0), sum_of_squares(row, BF16), 0)


@gluon.jit
def token_places(block):
    """Return where a lane finds its digits and sums in a unit at `block` that `stage_token` left.

    The operand's even columns are the digits of the first words, its odd ones those of the second; see `sums_alone`.
    """
    lane, _warp = lane_of(WARPS)
    column, t = lane // 4, lane % 4
    return block + gl.minimum(column // 2, 1) * 128 + column % 2 * 64 + t * 16, block + gl.minimum(t, 1) * 4


@gluon.jit
def load_token(digits_at, sums_at, GROUPS: gl.constexpr):
    """Return four words of digits and minus the sums of groups, from `token_places`."""
    sums = ()
    for g in gl.static_range(GROUPS):
        sums += (load_word(sums_at, 256 + 16 * g, "b32").to(gl.int32),)
    return load_four(digits_at, 0), sums


@gluon.jit
def load_tokens(digits_at, sums_at, AT: gl.constexpr, GROUPS: gl.constexpr, SETS: gl.constexpr):
    """Return what a lane needs of a unit that `prepare_kernel` or `stage_tokens` left: eight words of digits a product,
    and the sums.

    The unit begins AT bytes behind digits_at less 16 lanes and sums_at less 8 t. sums[product][group] holds minus the
    sums for the lane's two columns.
    """
    xs, sums = (), ()
    for i in gl.static_range(2 * SETS):
        xs += (load_four(digits_at, AT + 1024 * i) + load_four(digits_at, AT + 1024 * i + 512),)
        of_groups = ()
        for g in gl.static_range(GROUPS):
            of_groups += (load_two(sums_at, AT + 2048 * SETS + (i // 2 * GROUPS + g) * 64 + i % 2 * 32),)
        sums += (of_groups,)
    return xs, sums
