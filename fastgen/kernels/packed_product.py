"""The loop that the stages with int4 and int8 weights share: stream packed weights once, multiply 1 to 16 tokens.

At four bits a weight a multiprocessor must turn 40 weights into products each clock, so nothing may stand between
memory and the tensor cores. Weights are small integers already; the activations become integers too (`fixed_point`),
and mma.m16n8k32 multiplies 16 rows of weights with 8 columns of digits exactly.

- The weights lie in memory in the very order in which a warp's lanes hold the operand (`packed`). int8 weights are the
  operand as they are, int4 weights after one AND for eight of them (`packed_units`).
- Only the fp32 sums over groups have an order, the same for any number of tokens: a token that is verified among
  others gets the bits that it gets alone.
- A warp takes every WARPS-th unit of 128 columns of the program's tiles, through a ring of its own in shared memory
  that no other warp waits for; after R tiles the warps' sums are added in order, across one barrier.
- Under programmatic dependent launch the ring is filled before the program waits for the kernel ahead of it, and the
  next kernel is let start right behind the wait. A program takes so much shared memory that a second one does not fit:
  where two fit, some multiprocessors get two and others none.

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
    load_row,
    load_token,
    load_tokens,
    power_of,
    rms_scale,
    scaled_row,
    share_squares,
    stage_token,
    token_places,
)
from fastgen.kernels.fragments import (
    arrive,
    barrier,
    commit,
    copy,
    halves,
    lanes,
    load_floats,
    shared_memory,
    statement,
    store_floats,
    swapped_float,
)
from fastgen.kernels.packed_units import add_unit, alone, load_unit, record_bytes

BEFORE_WAIT = gl.constexpr(48 << 10)
"""Bytes that a program with one token's x asks for before it waits, about; the rest, behind x, shall not delay that."""

SHIFT = gl.constexpr(16)
"""By how much the rings of odd warps lie behind, where their units do so in memory, modulo the 32 bytes of a sector."""

UNROLLED = gl.constexpr(2)
"""The most turns in a row; a program that has few tiles runs its code once, at the pace of the instruction cache."""


@gluon.constexpr_function
def sums_bytes(tiles, sets):
    """Return the shared memory of a warp's sums of so many tiles; 16 more keep the warps in different banks."""
    return 64 * tiles * max(1, 8 * sets) + 16


@gluon.constexpr_function
def stride_bytes(planes, groups, zeros):
    """Return how far apart the records of a slot lie: as in memory, modulo the 32 bytes that are copied at a time."""
    return (record_bytes(planes, groups, zeros) + 31) // 32 * 32


@gluon.constexpr_function
def slot_bytes(planes, groups, zeros, sets, tiles):
    """Return the size of a slot of a warp's ring."""
    return tiles * stride_bytes(planes, groups, zeros) + (digit_bytes(groups, sets) if sets else 0)


@gluon.constexpr_function
def fixed_bytes(width, groups, sets, tiles):
    """Return the shared memory beside the ring: the warps' sums twice, what its scale needs, one token's x."""
    units = (width + 128 * WARPS.value - 1) // (128 * WARPS.value) * WARPS.value
    alone = (units + 16 - 1) // 16 * 16 * digit_bytes(groups, 0)
    return (2 * WARPS.value * sums_bytes(tiles, sets) + 64 + (0 if sets else alone) + 127) // 128 * 128


@gluon.jit
def copies(
    words, begin, end, UNITS: gl.constexpr, TURNS: gl.constexpr, RECORD: gl.constexpr, STRIDE: gl.constexpr,
    R: gl.constexpr,
):  # fmt: skip
    """Return what a lane copies of a program's tiles, and where to in a slot, with R tiles shared out to 32 lanes.

    That is: where it begins; in how many turns; in how many it has a part of a record's end, 0 or as many.
    """
    LANES: gl.constexpr = 32 // R
    lane, warp = lane_of(WARPS)
    r, place = lane // LANES, lane % LANES * 16
    source = words.to(gl.int64) + (begin * UNITS).to(gl.int64) * RECORD + (r * (UNITS * RECORD) + warp * RECORD + place)
    turns = (end - begin - r + R - 1) // R * TURNS + warp * 0
    return source, turns, gl.where(place < RECORD % (16 * LANES), turns, 0), r * STRIDE + place


@gluon.jit
def bytes_of_lane(turn, UNITS: gl.constexpr):
    """Return how much a lane copies at a time, 0 where the warp's unit does not exist."""
    lane, warp = lane_of(WARPS)
    if UNITS % WARPS == 0:
        return lane * 0 + warp * 0 + 16
    else:
        return gl.where(turn < (UNITS + WARPS - 1 - warp) // WARPS, 16, 0) + lane * 0


@gluon.jit
def behind(source, turn, record, UNITS: gl.constexpr, TURNS: gl.constexpr, R: gl.constexpr):
    """Return the place behind what is copied in a turn: of the same tiles, or the first of the next R.

    `record` is RECORD, but unknown to the compiler, which would keep a pointer for every sum of constants.
    """
    return source + gl.where(turn == TURNS - 1, (R * UNITS - (TURNS - 1) * WARPS) * record, WARPS * record)


@gluon.constexpr_function
def slots_before_wait(stages, slot):
    """Return how many slots of the ring, of which one stays free, are filled before the wait."""
    return min(stages - 1, max(1, round(BEFORE_WAIT.value / (WARPS.value * slot))))


@gluon.jit
def fill(
    state, to, lane_turns, record, COUNT: gl.constexpr, COMMIT: gl.constexpr, UNITS: gl.constexpr,
    TURNS: gl.constexpr, RECORD: gl.constexpr, SLOT: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """Start the copies of COUNT turns, each a group of its own if COMMIT says so; return the state behind them.

    The state is: what a lane copies next, how many turns it has copied, which turn of a tile is next, and which slot.
    """
    source, copied, turn, slot = state
    for _ in range(unknown(COUNT, record)):
        copy(to + slot, source, copied, lane_turns, bytes_of_lane(turn, UNITS), RECORD, 32 // R)
        if COMMIT:
            commit()
        source = behind(source, turn, record, UNITS, TURNS, R)
        copied, turn, slot = copied + 1, turn_behind(turn, TURNS), slot + SLOT
    return source, copied, turn, slot


@gluon.jit
def touched_behind(source, row):
    """Return words that wait for nothing before the copies that end at `source` have been started.

    Compilers would have x waited for in front of them. An address has no sign, which they cannot tell.
    """
    zero, words = (source >> 63).to(gl.uint32), ()
    for i in gl.static_range(len(row)):
        words += ((row[i][0] | zero, row[i][1] | zero, row[i][2] | zero, row[i][3] | zero),)
    return words


@gluon.jit
def turn_behind(turn, TURNS: gl.constexpr):
    """Return the turn of a tile that follows one, 0 behind the last."""
    return gl.where(turn == TURNS - 1, 0, turn + 1)


@gluon.jit
def unknown(COUNT: gl.constexpr, record):
    """Return COUNT, which the compiler cannot tell: a loop of so many turns stays one.

    Code that runs once costs some ten clocks an instruction. `record`, the bytes of a record, are always more.
    """
    return gl.minimum(record, COUNT)


@gluon.constexpr_function
def unrolled(turns, sets):
    """Return how many turns are compiled one after the other: one's loads run beside the products of the one before.

    Those of several tokens need all registers alone.
    """
    return 1 if sets else max(n for n in range(1, UNROLLED.value + 1) if turns % n == 0)


@gluon.jit
def joined(low, middle, high):
    """Return a number from the sums of its digits."""
    return gl.fma(high, 65536.0, gl.fma(middle, 256.0, low))


@gluon.jit
def store_sums(totals, address, COLUMNS: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr, PLANES: gl.constexpr):
    """Store a warp's sums of R tiles for the exchange: [R, column, 8 g, 2 halves] fp32."""
    lane, warp = lane_of(WARPS)
    for r in gl.static_range(R):
        if SETS == 0:
            if PLANES == 2:
                first, second = alone(totals[r][0]).to(gl.float32), alone(totals[r][1]).to(gl.float32)
            else:
                first, second = totals[r][0]
            first = joined(first, swapped_float(first, 1), swapped_float(first, 2))
            second = joined(second, swapped_float(second, 1), swapped_float(second, 2))
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
    x, norm, factors, words, scales, tokens, n, tiles, record, eps, prefetch: gl.constexpr, finish: gl.constexpr, extra,
    WIDTH: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Call finish(first, second, early, tile, row, token, here, n, tiles, extra) with each R tiles of the product.

    The product is y = weight @ rms_norm(x), without the norm where there is none. SETS is 0 for one token: x
    [128 UNITS] of DTYPE, norm [128 UNITS] or None. It is 1 for up to 8 and 2 for up to 16: x and factors [tokens] are
    `prepare_kernel`'s. words and scales (of int8): see `packed`. first and second [P] fp32 belong to token[p], and to
    row[p] and row[p] + 8 tiles of n rows; where not here[p], they belong to nothing. `early` is what
    prefetch(row, token, here, n, tiles, extra) has loaded before the sums were made. record: bytes of a record.
    """
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    TURNS: gl.constexpr = (UNITS + WARPS - 1) // WARPS
    COLUMNS: gl.constexpr = max(8 * SETS, 1)
    BF16: gl.constexpr = gl.bfloat16 == DTYPE
    RECORD: gl.constexpr = record_bytes(PLANES, GROUPS, ZEROS)
    STRIDE: gl.constexpr = stride_bytes(PLANES, GROUPS, ZEROS)
    BLOCK: gl.constexpr = digit_bytes(GROUPS, SETS)
    SLOT: gl.constexpr = slot_bytes(PLANES, GROUPS, ZEROS, SETS, R)
    SUMS: gl.constexpr = sums_bytes(R, SETS)
    FIXED: gl.constexpr = fixed_bytes(WIDTH, GROUPS, SETS, R)
    EARLY: gl.constexpr = slots_before_wait(STAGES, SLOT) if SETS == 0 else STAGES - 1
    PAIRS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane, warp = lane_of(WARPS)
    memory, address = shared_memory((FIXED + WARPS * STAGES * SLOT + SHIFT + 1023) // 1024 * 1024, WARPS)
    exchange_at, x_at = address + 2 * WARPS * SUMS, address + 2 * WARPS * SUMS + 64
    ring = address + FIXED + warp * (STAGES * SLOT) + lane * 0
    if SETS == 0 and RECORD % 32 == 16 and UNITS % 2 == 0:
        ring += warp % 2 * SHIFT  # copies between places that are unlike modulo a sector take longer
    begin = gl.program_id(0) * tiles // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)

    gains = None
    if norm is not None:
        gains = load_row(norm, UNITS)  # first of all: behind the ring's copies they would wait for all of these
    # What a lane copies next is of the `turn` of a tile, at `source`, and goes to `next_slot`.
    source, turns, turns_of_last, to = copies(words, begin, end, UNITS, TURNS, RECORD, STRIDE, R)
    lane_turns, to = (turns, turns_of_last), to + ring
    state = source, 0, 0, 0
    state = fill(state, to, lane_turns, record, EARLY, SETS == 0, UNITS, TURNS, RECORD, SLOT, R)
    if PDL:
        statement("griddepcontrol.wait;")
        statement("griddepcontrol.launch_dependents;")
    if SETS == 0:
        row = load_row(x, UNITS)
        state = fill(state, to, lane_turns, record, STAGES - 1 - EARLY, True, UNITS, TURNS, RECORD, SLOT, R)
        row = touched_behind(state[0], row)
        values, peak, squares = scaled_row(row, gains, BF16)
        power, factor = power_of(peak, exchange_at)
        stage_token(values, power, x_at, GROUPS)
        if norm is not None:
            share_squares(squares, exchange_at + 32)
        barrier()
        if norm is not None:
            factor *= rms_scale(exchange_at + 32, eps, WIDTH)
    else:
        x_source, x_to = x.to(gl.int64) + warp * BLOCK + lane * 16, ring + R * STRIDE + lane * 16
        all_turns = (end - begin + R - 1) // R * TURNS + lane * 0 + warp * 0
        x_turns = all_turns, gl.where(lane * 16 < BLOCK % 512, all_turns, 0)
        turn = 0
        for ahead in range(unknown(STAGES - 1, record)):
            size = bytes_of_lane(turn, UNITS)
            copy(x_to + ahead * SLOT, x_source + turn * (WARPS * BLOCK), ahead, x_turns, size, BLOCK, 32)
            commit()
            turn = turn_behind(turn, TURNS)

    words_at, scales_at, zeros_at = ring + lane * 16, ring + lane // 4 * 4, ring + lane // 4
    if SETS == 0:
        digits_at, sums_at = token_places(x_at + warp * BLOCK)
    else:
        digits_at, sums_at = ring + lane * 16, ring + lane % 4 * 8
    p = gl.arange(0, R * COLUMNS * 8, PAIRS)
    tile_of, token = p // (8 * COLUMNS), p // 8 % COLUMNS
    zero = gl.zeros([WARPS, 32], gl.int32, lanes(WARPS))
    none = zero if PLANES == 2 else zero.to(gl.float32)
    source, copied, next_turn, next_slot = state
    slot, buffer = 0, address
    for tile in range(begin, end, R):
        row_of = (tile + tile_of) * 8 + p % 8
        here = (token < tokens) & (tile + tile_of < end)
        early = prefetch(row_of, token, here, n, tiles, extra)
        if PLANES == 2:
            scale = gl.load(scales + row_of, mask=tile + tile_of < end, other=0)
        totals = (((none, none, none, none),) * max(3 * SETS, PLANES),) * R
        if SETS == 0 and PLANES == 1:
            totals = (((none, none),),) * R
        for some in range(0, TURNS, unrolled(TURNS, SETS)):
            for i in gl.static_range(unrolled(TURNS, SETS)):
                turn = some + i
                if SETS == 0:
                    xs, sums = load_token(digits_at + turn * (WARPS * BLOCK), sums_at + turn * (WARPS * BLOCK), GROUPS)
                arrive(STAGES - 2)
                units, new = (), ()
                for r in gl.static_range(R):
                    places = words_at + slot, scales_at + slot, zeros_at + slot
                    units += (load_unit(places, r * STRIDE, PLANES, GROUPS, ZEROS),)
                size = bytes_of_lane(next_turn, UNITS)
                copy(to + next_slot, source, copied, lane_turns, size, RECORD, 32 // R)
                if SETS > 0:
                    next_x = x_source + next_turn * (WARPS * BLOCK)
                    copy(x_to + next_slot, next_x, copied, x_turns, size, BLOCK, 32)
                commit()
                if SETS > 0:
                    xs, sums = load_tokens(digits_at + slot, sums_at + slot, R * STRIDE, GROUPS, SETS)
                source = behind(source, next_turn, record, UNITS, TURNS, R)
                copied, next_turn = copied + 1, turn_behind(next_turn, TURNS)
                next_slot = slot
                slot = gl.where(slot == (STAGES - 1) * SLOT, 0, slot + SLOT)
                for r in gl.static_range(R):
                    new += (add_unit(totals[r], units[r], xs, sums, zero, PLANES, GROUPS, SETS, BF16),)
                totals = new
        store_sums(totals, buffer + warp * SUMS, COLUMNS, SETS, R, PLANES)
        barrier()
        first, second = add_warps(buffer + p * 8, SUMS)
        if PLANES == 2:
            low, high = halves(scale.to(gl.uint32, bitcast=True), BF16)
            first, second = first * low, second * high
        else:
            second *= 0.0625
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
