"""The loop that the stages with int4 and int8 weights share: stream packed weights once, multiply 1 to 16 tokens.

At four bits a weight a multiprocessor must turn 40 weights into products each clock, so nothing may stand between
memory and the tensor cores. The weights lie in memory in the very order in which a warp's lanes hold the operand of
mma.m16n8k16 (`fastgen.kernels.packed`): a lane copies 16 bytes, reads them back, and three shifts and four `lop3`
turn a word of eight 4-bit weights q into the four registers of 16 + q that the instruction takes. Nothing is converted
to a float, no layout changes.

- 16 + q: the four bits are put into the mantissa of 16.0. The 16 leaves the sum again by B = sum(x), a product with
  ones: sum(w x) = s (sum((16 + q) x) - (24 + z) B) for a group of scale s and zero point z, in fp32. int8 is two
  planes of four bits, q + 128 = 16 high + low.
- Weights are the operand of 16 rows, tokens its 8 columns (a second product from 9 tokens on; columns beyond the
  tokens repeat the last). A column's sum does not depend on the others, so a token that is verified among others gets
  the bits that it gets alone.
- A warp takes every WARPS-th unit of 128 columns of the program's tiles, through a ring of its own in shared memory
  that no other warp waits for; after R tiles the warps' sums are added in order, across one barrier.
- RMSNorm's gain is multiplied into x, its scale into the result. fp16 could overflow there: x is first multiplied
  with the power of two below the scale. One token's x lies in shared memory; for more, `prepare_kernel` does this
  before, and x travels through the ring beside the weights.
- Between two kernels memory would lie idle for 2 to 3 us (the last sums, the launch, x, the first sums). Programmatic
  dependent launch fills that time: a program lets the next kernel start when `late` of its turns are left, whose ring
  fits beside its own, and which fills its ring before it waits.

Gluon is Triton with explicit layouts. Letters: T tokens, n rows of the output, K width of the input, R tiles of 16
rows in a slot of the ring; a turn is one slot.
Sources: conversion in the mantissa, arXiv 2211.10017; operand order in memory, arXiv 2408.11743 (Marlin); PTX ISA,
mma.m16n8k16, cp.async, griddepcontrol.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import (
    arrive,
    barrier,
    commit,
    copy,
    fma,
    halves,
    lanes,
    load_floats,
    load_four,
    load_global,
    load_word,
    mma,
    shared_memory,
    statement,
    store_float,
    store_floats,
    store_four,
    widen,
)

WARPS = gl.constexpr(8)
"""Warps that share a row; they are the order of every sum along K."""

NOTHING = gl.constexpr(0x80008000)
"""A pair of -0.0: what is added to it does not change."""


@gluon.constexpr_function
def record_bytes(planes, groups, zeros):
    """Return the size of a unit of a tile: words, scales, zero points."""
    return 1024 * planes + groups * (48 if zeros else 32)


@gluon.constexpr_function
def row_bytes(width):
    """Return the shared memory that one token's x takes: what `load_row` returns."""
    pieces = 16 * 32 * WARPS.value
    return (2 * width + pieces - 1) // pieces * pieces


@gluon.constexpr_function
def sums_bytes(tiles, sets):
    """Return the shared memory of a warp's sums of so many tiles; 16 more keep the warps in different banks."""
    return 64 * tiles * max(1, 8 * sets) + 16


@gluon.constexpr_function
def slot_bytes(planes, groups, zeros, sets, tiles):
    """Return the size of a slot of a warp's ring."""
    return tiles * record_bytes(planes, groups, zeros) + 2048 * sets


@gluon.constexpr_function
def fixed_bytes(width, sets, tiles):
    """Return the shared memory beside the ring: the warps' sums twice, the squares of x, x."""
    return 2 * WARPS.value * sums_bytes(tiles, sets) + 64 + (row_bytes(width) if sets == 0 else 0)


@gluon.jit
def load_row(x, UNITS: gl.constexpr):
    """Return x [128 UNITS], 16 bytes a lane in each of some pieces, zeros behind it."""
    L: gl.constexpr = lanes(WARPS)
    lane = gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None] * 32 + gl.arange(0, 32, gl.SliceLayout(0, L))[None, :]
    row = ()
    for i in gl.static_range((UNITS + 2 * WARPS - 1) // (2 * WARPS)):
        piece = lane + i * (32 * WARPS)
        row += (load_global(x.to(gl.int64) + piece * 16, piece < UNITS * 16),)
    return row


@gluon.jit
def times(four, pairs, BF16: gl.constexpr):
    """Return four words of pairs times four others."""
    return (
        fma(four[0], pairs[0], NOTHING, BF16), fma(four[1], pairs[1], NOTHING, BF16),
        fma(four[2], pairs[2], NOTHING, BF16), fma(four[3], pairs[3], NOTHING, BF16),
    )  # fmt: skip


@gluon.jit
def rms_scale(row, squares_at, eps, WIDTH: gl.constexpr, BF16: gl.constexpr):
    """Return 1 / rms of a row of WIDTH values, for all warps; 32 bytes at squares_at serve the exchange."""
    squares = gl.zeros([WARPS, 32], gl.float32, lanes(WARPS))
    for i in gl.static_range(len(row)):
        for j in gl.static_range(4):
            low, high = halves(row[i][j], BF16)
            squares += low * low + high * high
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, lanes(WARPS)))
    store_float(squares_at + warp * 4, gl.sum(squares, axis=1), 0)
    barrier()
    total = 0.0
    for i in gl.static_range(WARPS // 4):
        total += add_four(load_four(squares_at, 16 * i))
    return gl.rsqrt(total / WIDTH + eps)


@gluon.jit
def add_four(four):
    """Return the sum of four fp32 that were loaded as words."""
    first = four[0].to(gl.float32, bitcast=True) + four[1].to(gl.float32, bitcast=True)
    return first + (four[2].to(gl.float32, bitcast=True) + four[3].to(gl.float32, bitcast=True))


@gluon.jit
def scaled_row(row, gains, squares_at, eps, WIDTH: gl.constexpr, BF16: gl.constexpr):
    """Return a row times the gains, and what is left to multiply the product with."""
    scale = rms_scale(row, squares_at, eps, WIDTH, BF16)
    scaled = ()
    if BF16:
        for i in gl.static_range(len(row)):
            scaled += (times(row[i], gains[i], BF16),)
        return scaled, scale
    else:
        power = (scale.to(gl.uint32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
        pair = power.to(gl.float16).to(gl.uint16, bitcast=True).to(gl.uint32) * 0x10001
        for i in gl.static_range(len(row)):
            scaled += (times(times(row[i], (pair, pair, pair, pair), BF16), gains[i], BF16),)
        return scaled, scale / power


@gluon.jit
def prepare_kernel(x, norm, out, factors, eps, WIDTH: gl.constexpr, PDL: gl.constexpr):
    """Grid (tokens): x [tokens, 128 UNITS] times norm [128 UNITS] into out, and what is left into factors [tokens]."""
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    BF16: gl.constexpr = x.dtype.element_ty == gl.bfloat16
    L: gl.constexpr = lanes(WARPS)
    lane = gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None] * 32 + gl.arange(0, 32, gl.SliceLayout(0, L))[None, :]
    memory, address = shared_memory(1024, WARPS)
    gains = load_row(norm, UNITS)
    if PDL:
        statement("griddepcontrol.launch_dependents;")
        statement("griddepcontrol.wait;")
    barrier()
    token = gl.program_id(0)
    row = load_row(x + token * (UNITS * 128), UNITS)
    row, factor = scaled_row(row, gains, address, eps, WIDTH, BF16)
    words = (out + token * (UNITS * 128)).to(gl.pointer_type(gl.uint32), bitcast=True)
    for i in gl.static_range(len(row)):
        piece = lane + i * (32 * WARPS)
        for j in gl.static_range(4):
            gl.store(words + piece * 4 + j, row[i][j], mask=piece < UNITS * 16)
    gl.store(factors + token, factor)
    memory._keep_alive()


@gluon.jit
def copy_weights(
    words, slot, tile, turn, end, UNITS: gl.constexpr, RECORD: gl.constexpr, R: gl.constexpr
):  # fmt: skip
    """Start the copies of a warp's unit of R tiles into its slot; zeros where there is no such unit."""
    L: gl.constexpr = lanes(WARPS)
    warp, lane = gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None], gl.arange(0, 32, gl.SliceLayout(0, L))[None, :]
    source = words.to(gl.int64) + (tile * UNITS + turn * WARPS).to(gl.int64) * RECORD + (warp * RECORD + lane * 16)
    size = gl.where(turn * WARPS + warp < UNITS, 16, 0) + lane * 0
    in_tail = (lane * 16 < RECORD % 512).to(gl.int32) + warp * 0
    for r in gl.static_range(R):
        copy(slot, source, gl.where(tile + r < end, size, 0), in_tail, RECORD, r * UNITS * RECORD, r * RECORD)


@gluon.jit
def copy_tokens(x, slot, turn, tokens, UNITS: gl.constexpr, SETS: gl.constexpr, TO: gl.constexpr):
    """Start the copies of a warp's unit of SETS of eight tokens: lane 4g + t has token g, of 32 columns those from 8t.

    Tokens beyond the last repeat it.
    """
    L: gl.constexpr = lanes(WARPS)
    warp, lane = gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None], gl.arange(0, 32, gl.SliceLayout(0, L))[None, :]
    unit = turn * WARPS + warp
    size = gl.where(unit < UNITS, 16, 0) + lane * 0
    for b in gl.static_range(SETS):
        token = gl.minimum(lane // 4 + 8 * b, tokens - 1)
        source = x.to(gl.int64) + token * (UNITS * 256) + unit * 256 + lane % 4 * 16
        for part in gl.static_range(4):
            copy(slot, source, size, size, 512, part * 64, TO + b * 2048 + part * 512)


@gluon.jit
def load_operands(address, STRIDE: gl.constexpr, TO: gl.constexpr):
    """Return a lane's operands of eight products, 16 words of x."""
    a, b = load_four(address, TO), load_four(address, TO + STRIDE)
    c, d = load_four(address, TO + 2 * STRIDE), load_four(address, TO + 3 * STRIDE)
    return a + b + c + d


@gluon.jit
def zero_of(pair, HIGH: gl.constexpr):
    """Return one byte of a pair as fp32."""
    byte = pair >> 8 if HIGH else pair & 255
    return (byte | 0x4B000000).to(gl.float32, bitcast=True) - 8388608.0


@gluon.jit
def sums_of_tokens(xs, zero, GROUPS: gl.constexpr, BF16: gl.constexpr):
    """Return B of each group for a lane's two tokens: products with ones, the same for every row."""
    ONE: gl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
    one = xs[0] * 0 + ONE
    sums = ()
    for g in gl.static_range(GROUPS):
        b = (zero, zero, zero, zero)
        for s in gl.static_range(g * 8 // GROUPS, (g + 1) * 8 // GROUPS):
            b = mma((one, one, one, one), xs[2 * s], xs[2 * s + 1], b, BF16)
        sums += ((b[0], b[1]),)
    return sums


@gluon.jit
def load_plane(slot, OFFSET: gl.constexpr):
    """Return a lane's eight words of a plane of its unit."""
    return load_four(slot, OFFSET) + load_four(slot, OFFSET + 512)


@gluon.jit
def add_int8(totals, slot, xs, sums, zero, AT: gl.constexpr, SETS: gl.constexpr, BF16: gl.constexpr):
    """Return the four sums of a lane for each set of eight tokens plus the int8 unit at slot + AT."""
    high, low = load_plane(slot, AT), load_plane(slot, AT + 1024)
    cs, ds = ((zero, zero, zero, zero),) * SETS, ((zero, zero, zero, zero),) * SETS
    for s in gl.static_range(8):
        a, b = widen(high[s], BF16), widen(low[s], BF16)
        new_cs, new_ds = (), ()
        for i in gl.static_range(SETS):
            new_cs += (mma(a, xs[i][2 * s], xs[i][2 * s + 1], cs[i], BF16),)
            new_ds += (mma(b, xs[i][2 * s], xs[i][2 * s + 1], ds[i], BF16),)
        cs, ds = new_cs, new_ds
    new = ()
    for i in gl.static_range(SETS):
        c, d, b, t = cs[i], ds[i], sums[i][0], totals[i]
        new += ((
            t[0] + (16.0 * c[0] + d[0] - 400.0 * b[0]), t[1] + (16.0 * c[1] + d[1] - 400.0 * b[1]),
            t[2] + (16.0 * c[2] + d[2] - 400.0 * b[0]), t[3] + (16.0 * c[3] + d[3] - 400.0 * b[1]),
        ),)  # fmt: skip
    return new


@gluon.jit
def add_int4(
    totals, slot, start, g, xs, sums, zero, AT: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr,
    SETS: gl.constexpr, BF16: gl.constexpr,
):  # fmt: skip
    """Return the four sums of a lane for each set of eight tokens plus the int4 unit at slot + AT.

    start is the slot's beginning, and g the row of a tile's halves that a lane has.
    """
    words = load_plane(slot, AT)
    for i in gl.static_range(GROUPS):
        first, second = halves(load_word(start + g * 4, AT + 1024 + 32 * i, "b32"), BF16)
        if ZEROS:
            pair = load_word(start + g * 2, AT + 1024 + 32 * GROUPS + 16 * i, "u16")
            z_first, z_second = zero_of(pair, False), zero_of(pair, True)
        else:
            z_first, z_second = 24.0, 24.0
        cs = ((zero, zero, zero, zero),) * SETS
        for s in gl.static_range(i * 8 // GROUPS, (i + 1) * 8 // GROUPS):
            a = widen(words[s], BF16)
            new = ()
            for j in gl.static_range(SETS):
                new += (mma(a, xs[j][2 * s], xs[j][2 * s + 1], cs[j], BF16),)
            cs = new
        new = ()
        for j in gl.static_range(SETS):
            c, b, t = cs[j], sums[j][i], totals[j]
            new += ((
                t[0] + first * (c[0] - z_first * b[0]), t[1] + first * (c[1] - z_first * b[1]),
                t[2] + second * (c[2] - z_second * b[0]), t[3] + second * (c[3] - z_second * b[1]),
            ),)  # fmt: skip
        totals = new
    return totals


@gluon.jit
def stream_product(  # noqa: PLR0912, PLR0915
    x, norm, factors, words, scales, tokens, n, tiles, late, eps, prefetch: gl.constexpr, finish: gl.constexpr, extra,
    WIDTH: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Call finish(first, second, early, tile, row, token, here, n, tiles, extra) with each R tiles of the product.

    The product is y = weight @ rms_norm(x), without the norm where there is none.
    SETS is 0 for one token: x [128 UNITS], norm [128 UNITS] or None. It is 1 for up to 8 and 2 for up to 16: x
    [tokens, 128 UNITS], where it is to be normalized with factors [tokens] by `prepare_kernel`. words and scales (of
    int8): see `packed`. first and second [P] fp32 belong to token[p], and to row[p] and row[p] + 8 tiles of n rows;
    where not here[p], they belong to nothing. `early` is what prefetch(row, token, here, n, tiles, extra) has loaded
    before the sums were made.
    """
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    TURNS: gl.constexpr = (UNITS + WARPS - 1) // WARPS
    COLUMNS: gl.constexpr = max(8 * SETS, 1)
    BF16: gl.constexpr = x.dtype.element_ty == gl.bfloat16
    RECORD: gl.constexpr = record_bytes(PLANES, GROUPS, ZEROS)
    SLOT: gl.constexpr = slot_bytes(PLANES, GROUPS, ZEROS, SETS, R)
    SUMS: gl.constexpr = sums_bytes(R, SETS)
    FIXED: gl.constexpr = fixed_bytes(WIDTH, SETS, R)
    L: gl.constexpr = lanes(WARPS)
    PAIRS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    warp, lane = gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None], gl.arange(0, 32, gl.SliceLayout(0, L))[None, :]
    memory, address = shared_memory((FIXED + WARPS * STAGES * SLOT + 1023) // 1024 * 1024, WARPS)
    squares_at, x_at = address + 2 * WARPS * SUMS, address + 2 * WARPS * SUMS + 64
    ring = address + FIXED + warp * (STAGES * SLOT) + lane * 16
    begin = gl.program_id(0) * tiles // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)
    left = (end - begin + R - 1) // R * TURNS

    next_tile, next_turn, next_slot = begin, 0, 0
    for _ in gl.static_range(STAGES - 1):
        if next_tile < end:
            copy_weights(words, ring + next_slot, next_tile, next_turn, end, UNITS, RECORD, R)
        if SETS == 0:
            commit()
        next_slot += SLOT
        next_tile = gl.where(next_turn == TURNS - 1, next_tile + R, next_tile)
        next_turn = gl.where(next_turn == TURNS - 1, 0, next_turn + 1)
    if norm is not None:
        gains = load_row(norm, UNITS)
    if PDL:
        statement("griddepcontrol.wait;")
        if left <= late:
            statement("griddepcontrol.launch_dependents;")
    zero = gl.zeros([WARPS, 32], gl.float32, L)
    factor = 1.0
    if SETS == 0:
        row = load_row(x, UNITS)
        if norm is not None:
            row, factor = scaled_row(row, gains, squares_at, eps, WIDTH, BF16)
        for i in gl.static_range(len(row)):
            store_four(x_at + (warp * 32 + lane) * 16, row[i], i * 512 * WARPS)
        barrier()
    else:
        for i in gl.static_range(STAGES - 1):
            copy_tokens(x, ring + i * SLOT, i % TURNS, tokens, UNITS, SETS, R * RECORD)
            commit()

    p = gl.arange(0, R * COLUMNS * 8, PAIRS)
    tile_of, token = p // (8 * COLUMNS), p // 8 % COLUMNS
    slot, buffer = 0, address
    for tile in range(begin, end, R):
        row_of = (tile + tile_of) * 8 + p % 8
        here = (token < tokens) & (tile + tile_of < end)
        early = prefetch(row_of, token, here, n, tiles, extra)
        if PLANES == 2:
            scale = gl.load(scales + row_of, mask=tile + tile_of < end, other=0)
        totals = (((zero, zero, zero, zero),) * max(SETS, 1),) * R
        for turn in range(TURNS):
            arrive(STAGES - 2)
            if next_tile < end:
                copy_weights(words, ring + next_slot, next_tile, next_turn, end, UNITS, RECORD, R)
                if SETS > 0:
                    copy_tokens(x, ring + next_slot, next_turn, tokens, UNITS, SETS, R * RECORD)
            commit()
            at = ring + slot
            xs, sums = (), ()
            if SETS == 0:
                operands = load_operands(x_at + (turn * WARPS + warp) * 256 + lane % 4 * 16, 64, 0)
                xs += (operands,)
            else:
                for b in gl.static_range(SETS):
                    xs += (load_operands(at, 512, R * RECORD + 2048 * b),)
            for b in gl.static_range(max(SETS, 1)):
                sums += (sums_of_tokens(xs[b], zero, max(GROUPS, 1), BF16),)
            new = ()
            for r in gl.static_range(R):
                if PLANES == 2:
                    new += (add_int8(totals[r], at, xs, sums, zero, r * RECORD, max(SETS, 1), BF16),)
                else:
                    new += (add_int4(
                        totals[r], at, at - lane * 16, lane // 4, xs, sums, zero, r * RECORD, GROUPS, ZEROS,
                        max(SETS, 1), BF16,
                    ),)  # fmt: skip
            totals = new
            left -= 1
            if PDL:  # noqa: SIM102  (decided when it is compiled)
                if left == late:
                    statement("griddepcontrol.launch_dependents;")
            slot = gl.where(slot == (STAGES - 1) * SLOT, 0, slot + SLOT)
            next_slot = gl.where(next_slot == (STAGES - 1) * SLOT, 0, next_slot + SLOT)
            next_tile = gl.where(next_turn == TURNS - 1, next_tile + R, next_tile)
            next_turn = gl.where(next_turn == TURNS - 1, 0, next_turn + 1)
        for r in gl.static_range(R):
            if SETS == 0:
                t = totals[r][0]
                store_floats(buffer + warp * SUMS + lane // 4 * 8, t[0], t[2], r * 64)
            for b in gl.static_range(SETS):
                t = totals[r][b]
                place = buffer + warp * SUMS + (lane % 4 * 16 + lane // 4) * 8
                store_floats(place, t[0], t[2], (r * COLUMNS + b * 8) * 64)
                store_floats(place, t[1], t[3], (r * COLUMNS + b * 8) * 64 + 64)
        barrier()
        first, second = add_warps(buffer + p * 8, SUMS)
        if PLANES == 2:
            low, high = halves(scale.to(gl.uint32, bitcast=True), BF16)
            first, second = first * low, second * high
        if SETS == 0:
            first, second = first * factor, second * factor
        elif factors is not None:
            of_token = gl.load(factors + token, mask=token < tokens, other=0.0)
            first, second = first * of_token, second * of_token
        finish(first, second, early, tile + tile_of, row_of, token, here, n, tiles, extra)
        buffer = 2 * address + WARPS * SUMS - buffer
    memory._keep_alive()


@gluon.jit
def add_warps(address, SUMS: gl.constexpr):
    """Return the sums of the warps' pairs of fp32, which lie SUMS bytes apart, in the one order."""
    total = (0.0, 0.0)
    for w in gl.static_range(0, WARPS, 4):
        a, b = load_floats(address, w * SUMS), load_floats(address, w * SUMS + SUMS)
        c, d = load_floats(address, w * SUMS + 2 * SUMS), load_floats(address, w * SUMS + 3 * SUMS)
        total = (total[0] + ((a[0] + b[0]) + (c[0] + d[0])), total[1] + ((a[1] + b[1]) + (c[1] + d[1])))
    return total
