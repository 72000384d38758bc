"""The loop that the stages with int4 and int8 weights share: stream packed weights once, multiply 1 to 16 tokens.

At four bits a weight a multiprocessor must turn 40 weights into products each clock, so nothing may stand between
memory and the tensor cores. Weights are small integers already; the activations become integers too (`fixed_point`),
and mma.m16n8k32 multiplies 16 rows of weights with 8 columns of digits exactly.

- The weights lie in memory in the very order in which a warp's lanes hold the operand (`packed`). int8 weights are the
  operand as they are, int4 weights after a shift and two ANDs for eight of them.
- int4: sum(w x) = s (sum(q x) - (8 + z) B) for a group of scale s and zero point z, B = sum(x). The integers turn into
  fp32 at no cost: a sum starts at the bits of a large float (`fragments.MAGIC`).
- Only the fp32 sums over groups have an order, the same for any number of tokens: a token that is verified among
  others gets the bits that it gets alone.
- A warp takes every WARPS-th unit of 128 columns of the program's tiles, through a ring of its own in shared memory
  that no other warp waits for; after R tiles the warps' sums are added in order, across one barrier.
- Under programmatic dependent launch the ring is filled before the program waits for the kernel ahead of it, and the
  next kernel is let start when `late` turns are left. A program takes so much shared memory that a second one does not
  fit: where two fit, some multiprocessors get two and others none.

Gluon is Triton with explicit layouts. Letters: T tokens, n rows of the output, K width of the input, R tiles of 16
rows in a slot of the ring; a turn is one slot.
Sources: operand order in memory, arXiv 2408.11743 (Marlin); PTX ISA, mma.m16n8k32, cp.async, griddepcontrol.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fixed_point import (
    WARPS,
    digit_bytes,
    lane_of,
    load_products,
    load_row,
    scales_of,
    stage_token,
)
from fastgen.kernels.fragments import (
    MAGIC,
    arrive,
    barrier,
    commit,
    copy,
    halves,
    lanes,
    load_floats,
    load_four,
    load_word,
    mma,
    nibbles,
    shared_memory,
    statement,
    store_floats,
    swapped_float,
)


@gluon.constexpr_function
def record_bytes(planes, groups, zeros):
    """Return the size of a unit of a tile: words, scales, zero points."""
    return 1024 * planes + groups * (48 if zeros else 32)


@gluon.constexpr_function
def sums_bytes(tiles, sets):
    """Return the shared memory of a warp's sums of so many tiles; 16 more keep the warps in different banks."""
    return 64 * tiles * max(1, 8 * sets) + 16


@gluon.constexpr_function
def slot_bytes(planes, groups, zeros, sets, tiles):
    """Return the size of a slot of a warp's ring."""
    return tiles * record_bytes(planes, groups, zeros) + (digit_bytes(groups, sets) if sets else 0)


@gluon.constexpr_function
def fixed_bytes(width, groups, sets, tiles):
    """Return the shared memory beside the ring: the warps' sums twice, what `scales_of` exchanges, one token's x."""
    units = (width + 128 * WARPS.value - 1) // (128 * WARPS.value) * WARPS.value
    alone = (units + 16 - 1) // 16 * 16 * digit_bytes(groups, 0)
    return 2 * WARPS.value * sums_bytes(tiles, sets) + 64 + (0 if sets else alone)


@gluon.jit
def copy_weights(
    words, slot, tile, turn, end, UNITS: gl.constexpr, RECORD: gl.constexpr, R: gl.constexpr
):  # fmt: skip
    """Start the copies of a warp's unit of R tiles into its slot; zeros where there is no such unit."""
    lane, warp = lane_of(WARPS)
    source = words.to(gl.int64) + (tile * UNITS + turn * WARPS).to(gl.int64) * RECORD + (warp * RECORD + lane * 16)
    size = gl.where(turn * WARPS + warp < UNITS, 16, 0) + lane * 0
    in_tail = (lane * 16 < RECORD % 512).to(gl.int32) + warp * 0
    for r in gl.static_range(R):
        copy(slot, source, gl.where(tile + r < end, size, 0), in_tail, RECORD, r * UNITS * RECORD, r * RECORD)


@gluon.jit
def copy_tokens(blocks, slot, turn, UNITS: gl.constexpr, BLOCK: gl.constexpr, TO: gl.constexpr):
    """Start the copies of a warp's unit of x as `prepare_kernel` leaves it."""
    lane, warp = lane_of(WARPS)
    unit = turn * WARPS + warp
    size = gl.where(unit < UNITS, 16, 0) + lane * 0
    in_tail = (lane * 16 < BLOCK % 512).to(gl.int32) + warp * 0
    copy(slot, blocks.to(gl.int64) + unit * BLOCK + lane * 16, size, in_tail, BLOCK, 0, TO)


@gluon.jit
def zero_of(pair, HIGH: gl.constexpr):
    """Return one byte of a pair as fp32."""
    byte = pair >> 8 if HIGH else pair & 255
    return (byte | 0x4B000000).to(gl.float32, bitcast=True) - 8388608.0


@gluon.jit
def add_int8(totals, slot, xs, AT: gl.constexpr):
    """Return the four sums of a lane for each product plus the int8 unit at slot + AT."""
    rows = load_four(slot, AT) + load_four(slot, AT + 512)
    others = load_four(slot, AT + 1024) + load_four(slot, AT + 1536)
    for s in gl.static_range(4):
        new = ()
        for i in gl.static_range(len(xs)):
            new += (mma(
                rows[2 * s], others[2 * s], rows[2 * s + 1], others[2 * s + 1], xs[i][2 * s], xs[i][2 * s + 1],
                totals[i], True,
            ),)  # fmt: skip
        totals = new
    return totals


@gluon.jit
def add_int4(
    totals, slot, start, g, xs, sums, AT: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, BF16: gl.constexpr
):  # fmt: skip
    """Return the four sums of a lane for each product plus the int4 unit at slot + AT.

    start is the slot's beginning, g the row of a tile's halves that a lane has, sums[i][group] the sums of x.
    """
    words = load_four(slot, AT) + load_four(slot, AT + 512)
    magic = slot * 0 + MAGIC
    for i in gl.static_range(GROUPS):
        cs = ((magic, magic, magic, magic),) * len(xs)
        for s in gl.static_range(i * 4 // GROUPS, (i + 1) * 4 // GROUPS):
            a0, a1 = nibbles(words[2 * s])
            a2, a3 = nibbles(words[2 * s + 1])
            new = ()
            for j in gl.static_range(len(xs)):
                new += (mma(a0, a1, a2, a3, xs[j][2 * s], xs[j][2 * s + 1], cs[j], False),)
            cs = new
        first, second = halves(load_word(start + g * 4, AT + 1024 + 32 * i, "b32"), BF16)
        if ZEROS:
            pair = load_word(start + g * 2, AT + 1024 + 32 * GROUPS + 16 * i, "u16")
            z_first, z_second = zero_of(pair, False), zero_of(pair, True)
        else:
            z_first, z_second = 8.0, 8.0
        new = ()
        for j in gl.static_range(len(xs)):
            c, b, t = cs[j], sums[j][i], totals[j]
            new += ((
                t[0] + first * (whole(c[0]) - z_first * b[0]), t[1] + first * (whole(c[1]) - z_first * b[1]),
                t[2] + second * (whole(c[2]) - z_second * b[0]), t[3] + second * (whole(c[3]) - z_second * b[1]),
            ),)  # fmt: skip
        totals = new
    return totals


@gluon.jit
def whole(value):
    """Return as fp32 the integer that was added to MAGIC."""
    return value.to(gl.float32, bitcast=True) - 12582912.0


@gluon.jit
def joined(low, middle, high):
    """Return a number from the sums of its digits."""
    return gl.fma(high, 65536.0, gl.fma(middle, 256.0, low))


@gluon.jit
def store_sums(totals, address, COLUMNS: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr):
    """Store a warp's sums of R tiles for the exchange: [R, column, 8 g, 2 halves] fp32."""
    lane, warp = lane_of(WARPS)
    for r in gl.static_range(R):
        if SETS == 0:
            t = floats(totals[r][0])
            first = joined(t[0], t[1], swapped_float(t[0], 1))
            second = joined(t[2], t[3], swapped_float(t[2], 1))
            store_floats(address + lane // 4 * 8, first, second, (lane % 4 == 0) & (warp >= 0), r * 64)
        for b in gl.static_range(SETS):
            low, middle, high = floats(totals[r][3 * b]), floats(totals[r][3 * b + 1]), floats(totals[r][3 * b + 2])
            place, here = address + (lane % 4 * 16 + lane // 4) * 8, (lane >= 0) & (warp >= 0)
            for i in gl.static_range(2):
                store_floats(
                    place, joined(low[i], middle[i], high[i]), joined(low[i + 2], middle[i + 2], high[i + 2]), here,
                    (r * COLUMNS + b * 8 + i) * 64,
                )  # fmt: skip


@gluon.jit
def floats(four):
    """Return four fp32 or integers as fp32."""
    return four[0].to(gl.float32), four[1].to(gl.float32), four[2].to(gl.float32), four[3].to(gl.float32)


@gluon.jit
def stream_product(  # noqa: PLR0912, PLR0915
    x, norm, factors, words, scales, tokens, n, tiles, late, eps, prefetch: gl.constexpr, finish: gl.constexpr, extra,
    WIDTH: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Call finish(first, second, early, tile, row, token, here, n, tiles, extra) with each R tiles of the product.

    The product is y = weight @ rms_norm(x), without the norm where there is none. SETS is 0 for one token: x
    [128 UNITS] of DTYPE, norm [128 UNITS] or None. It is 1 for up to 8 and 2 for up to 16: x and factors [tokens] are
    `prepare_kernel`'s. words and scales (of int8): see `packed`. first and second [P] fp32 belong to token[p], and to
    row[p] and row[p] + 8 tiles of n rows; where not here[p], they belong to nothing. `early` is what
    prefetch(row, token, here, n, tiles, extra) has loaded before the sums were made.
    """
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    TURNS: gl.constexpr = (UNITS + WARPS - 1) // WARPS
    COLUMNS: gl.constexpr = max(8 * SETS, 1)
    BF16: gl.constexpr = gl.bfloat16 == DTYPE
    RECORD: gl.constexpr = record_bytes(PLANES, GROUPS, ZEROS)
    BLOCK: gl.constexpr = digit_bytes(GROUPS, SETS)
    SLOT: gl.constexpr = slot_bytes(PLANES, GROUPS, ZEROS, SETS, R)
    SUMS: gl.constexpr = sums_bytes(R, SETS)
    FIXED: gl.constexpr = fixed_bytes(WIDTH, GROUPS, SETS, R)
    PAIRS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane, warp = lane_of(WARPS)
    memory, address = shared_memory((FIXED + WARPS * STAGES * SLOT + 1023) // 1024 * 1024, WARPS)
    scales_at, x_at = address + 2 * WARPS * SUMS, address + 2 * WARPS * SUMS + 64
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
    gains = None
    if norm is not None:
        gains = load_row(norm, UNITS)
    if PDL:
        statement("griddepcontrol.wait;")
        if left <= late:
            statement("griddepcontrol.launch_dependents;")
    if SETS == 0:
        values, power, factor = scales_of(load_row(x, UNITS), gains, scales_at, eps, WIDTH, BF16)
        stage_token(values, power, x_at, GROUPS)
        barrier()
    else:
        for i in gl.static_range(STAGES - 1):
            copy_tokens(x, ring + i * SLOT, i % TURNS, UNITS, BLOCK, R * RECORD)
            commit()

    p = gl.arange(0, R * COLUMNS * 8, PAIRS)
    tile_of, token = p // (8 * COLUMNS), p // 8 % COLUMNS
    none = gl.zeros([WARPS, 32], gl.int32 if PLANES == 2 else gl.float32, lanes(WARPS))
    slot, buffer = 0, address
    for tile in range(begin, end, R):
        row_of = (tile + tile_of) * 8 + p % 8
        here = (token < tokens) & (tile + tile_of < end)
        early = prefetch(row_of, token, here, n, tiles, extra)
        if PLANES == 2:
            scale = gl.load(scales + row_of, mask=tile + tile_of < end, other=0)
        totals = (((none, none, none, none),) * max(3 * SETS, 1),) * R
        for turn in range(TURNS):
            arrive(STAGES - 2)
            if next_tile < end:
                copy_weights(words, ring + next_slot, next_tile, next_turn, end, UNITS, RECORD, R)
                if SETS > 0:
                    copy_tokens(x, ring + next_slot, next_turn, UNITS, BLOCK, R * RECORD)
            commit()
            at = ring + slot
            if SETS == 0:
                block = x_at + (turn * WARPS + warp) * BLOCK + lane * 0
                digits_at = block + gl.minimum(lane // 4, 2) * 64 + lane % 4 * 16
                xs, sums = load_products(digits_at, block + lane % 2 * 8, GROUPS, 0, 0)
            else:
                xs, sums = load_products(at, at - lane * 16 + lane % 4 * 8, GROUPS, SETS, R * RECORD)
            new = ()
            for r in gl.static_range(R):
                if PLANES == 2:
                    new += (add_int8(totals[r], at, xs, r * RECORD),)
                else:
                    new += (add_int4(
                        totals[r], at, at - lane * 16, lane // 4, xs, sums, r * RECORD, GROUPS, ZEROS, BF16,
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
        store_sums(totals, buffer + warp * SUMS, COLUMNS, SETS, R)
        barrier()
        first, second = add_warps(buffer + p * 8, SUMS)
        if PLANES == 2:
            low, high = halves(scale.to(gl.uint32, bitcast=True), BF16)
            first, second = first * low, second * high
        if SETS > 0:
            factor = gl.load(factors + token, mask=token < tokens, other=0.0)
        finish(first * factor, second * factor, early, tile + tile_of, row_of, token, here, n, tiles, extra)
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
