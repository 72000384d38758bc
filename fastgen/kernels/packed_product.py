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
- Under programmatic dependent launch a part of the ring is filled before the program waits for the kernel ahead of it,
  and the next kernel is let start right behind the wait. A program takes so much shared memory that a second one does
  not fit: where two fit, some multiprocessors get two and others none.

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
    peak_of,
    pieces_of,
    power_of,
    rms_scale,
    scaled,
    stage_token,
    stage_tokens,
    sum_of_squares,
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
    load_four,
    program_memory,
    recast,
    reduced,
    statement,
    store_float,
    store_floats,
    swapped_float,
    warp_barrier,
)
from fastgen.kernels.packed_units import add_unit, alone, load_unit, tail_bytes, tail_stride, tails_bytes

PIECES_AHEAD = gl.constexpr(8)
"""What of several tokens' x is on its way while a program makes their digits: pieces of a warp, of whole rows."""

UNROLLED = gl.constexpr(2)
"""The most turns in a row; a program that has few tiles runs its code once, at the pace of the instruction cache."""


@gluon.constexpr_function
def sums_bytes(tiles, sets):
    """Return the shared memory of a warp's sums of so many tiles; 16 more keep the warps in different banks."""
    return 64 * tiles * max(1, 8 * sets) + 16


@gluon.constexpr_function
def slot_bytes(planes, groups, zeros, sets, tiles, kept):
    """Return the size of a slot of a warp's ring, in whole lines: records, tails, and several tokens' x if not kept."""
    beside = 0 if kept else digit_bytes(groups, sets)
    return tiles * 1024 * planes + tails_bytes(groups, zeros, tiles) + beside


@gluon.constexpr_function
def fixed_bytes(width, groups, sets, tiles, kept, staged):
    """Return the shared memory beside the ring: the warps' sums twice, their factors and squares, x if it is kept.

    Programs that make x's digits fill whole pieces.
    """
    step = 2 * WARPS.value if staged else WARPS.value
    units = ((width + 127) // 128 + step - 1) // step * step
    x = units * digit_bytes(groups, sets) if kept else 0
    of_columns = 8 * WARPS.value * max(1, 8 * sets)
    return (2 * WARPS.value * sums_bytes(tiles, sets) + of_columns + 127) // 128 * 128 + (x + 127) // 128 * 128


@gluon.jit
def copies(
    words, scales, begin, end, UNITS: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr,
    R: gl.constexpr,
):  # fmt: skip
    """Return what a lane copies of a program's tiles, with R tiles shared out to 32 lanes.

    That is: its places in the records and in the tails of the first R tiles of all; which unit of all tiles a warp
    begins with, and below which one a lane copies of records, and of tails.
    """
    LANES: gl.constexpr = 32 // R
    TAIL: gl.constexpr = tail_bytes(GROUPS, ZEROS)
    lane, warp = lane_of(WARPS)
    r, unit = lane // LANES, begin * UNITS + warp + lane * 0
    record = words.to(gl.int64) + (r * (UNITS * 1024 * PLANES) + lane % LANES * 16)
    limit = unit + (end - begin - r + R - 1) // R * (R * UNITS)
    tail, limit_of_tail = record, limit
    if TAIL > 0:
        PARTS: gl.constexpr = tail_stride(GROUPS, ZEROS) // 16
        gl.static_assert(R * PARTS <= 32, "every lane copies 16 bytes of the tails at most")
        r, place = lane // PARTS, lane % PARTS * 16
        tail = scales.to(gl.int64) + (r * (UNITS * TAIL) + place)
        limit_of_tail = unit + (end - begin - r + R - 1) // R * (R * UNITS)
        limit_of_tail = gl.where((r < R) & (place < TAIL), limit_of_tail, 0)
    return (record, tail), unit, (limit, limit_of_tail)


@gluon.jit
def slot_places(slot, PLANES: gl.constexpr, R: gl.constexpr):
    """Return where a lane finds its words, scales and zero points of the first tile of R in a slot.

    Records lie as they are copied: 512 bytes hold as much of each tile. Behind them are the tails.
    """
    LANES: gl.constexpr = 32 // R
    lane, _warp = lane_of(WARPS)
    tail = slot + R * 1024 * PLANES
    return slot + lane // LANES * 512 + lane % LANES * 16, tail + lane // 4 * 4, tail + lane // 4


@gluon.jit
def copy_units(
    to, sources, unit, limits, size, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, R: gl.constexpr
):  # fmt: skip
    """Start the copies of a unit of R tiles into a slot; see `copies`."""
    wide = unit.to(gl.int64)
    copy(to, sources[0] + wide * (1024 * PLANES), unit, (limits[0], limits[0]), size, 1024 * PLANES, 32 // R)
    if PLANES == 1:
        TAIL: gl.constexpr = tail_bytes(GROUPS, ZEROS)
        tail = sources[1] + wide * TAIL
        copy(to + R * 1024, tail, unit, (limits[1], limits[1]), size, TAIL, 32 // R)


@gluon.jit
def bytes_of_lane(turn, last, UNITS: gl.constexpr):
    """Return how much a lane copies at a time in a turn, 0 where the warp's unit does not exist, in the last of a tile.

    One comparison decides, which ptxas takes for the copies' own predicate.
    """
    lane, warp = lane_of(WARPS)
    if UNITS % WARPS == 0:
        return lane * 0 + warp * 0 + 16
    else:
        missing = (UNITS + WARPS - 1) // WARPS - (UNITS + WARPS - 1 - warp) // WARPS
        return gl.where((turn ^ last) < missing, 0, 16) + lane * 0


@gluon.jit
def behind(unit, last, UNITS: gl.constexpr, TURNS: gl.constexpr, R: gl.constexpr):
    """Return the unit behind what is copied in a turn: of the same tiles, or behind the last turn of the next R."""
    return unit + gl.where(last, R * UNITS - (TURNS - 1) * WARPS, WARPS)


@gluon.jit
def fill(
    state, to, sources, limits, record, COUNT: gl.constexpr, COMMIT: gl.constexpr, UNITS: gl.constexpr,
    TURNS: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SLOT: gl.constexpr,
    R: gl.constexpr,
):  # fmt: skip
    """Start the copies of COUNT turns, each a group of its own if COMMIT says so; return the state behind them.

    The state is: which unit a warp copies next, which turn of a tile, and into which slot.
    """
    unit, turn, slot = state
    for _ in range(unknown(COUNT, record)):
        size, last = bytes_of_lane(turn, TURNS - 1, UNITS), turn == TURNS - 1
        copy_units(to + slot, sources, unit, limits, size, PLANES, GROUPS, ZEROS, R)
        if COMMIT:
            commit()
        unit, turn, slot = behind(unit, last, UNITS, TURNS, R), gl.where(last, 0, turn + 1), slot + SLOT
    return unit, turn, slot


@gluon.jit
def touched_behind(unit, row):
    """Return words that wait for nothing before the copies that end at `unit` have been started.

    Compilers would have x waited for in front of them. A unit's number has no sign, which they cannot tell.
    """
    zero, words = (unit >> 31).to(gl.uint32), ()
    for i in gl.static_range(len(row)):
        words += ((row[i][0] | zero, row[i][1] | zero, row[i][2] | zero, row[i][3] | zero),)
    return words


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
def joined(low, high):
    """Return a number from the sums of its digits."""
    return gl.fma(high, 256.0, low)


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
            first = joined(first, swapped_float(first, 1))
            second = joined(second, swapped_float(second, 1))
            store_floats(address + lane // 4 * 8, first, second, (lane % 4 == 0) & (warp >= 0), r * 64)
        for b in gl.static_range(SETS):
            low, high = floats(totals[r][2 * b]), floats(totals[r][2 * b + 1])
            place, here = address + (lane % 4 * 16 + lane // 4) * 8, (lane >= 0) & (warp >= 0)
            for i in gl.static_range(2):
                first, second = joined(low[i], high[i]), joined(low[i + 2], high[i + 2])
                store_floats(place, first, second, here, (r * COLUMNS + b * 8 + i) * 64)


@gluon.jit
def floats(four):
    """Return four fp32 or integers as fp32."""
    return four[0].to(gl.float32), four[1].to(gl.float32), four[2].to(gl.float32), four[3].to(gl.float32)


@gluon.jit
def stream_packed(  # noqa: PLR0912, PLR0915
    x, norm, factors, words, scales, tokens, n, tiles, record, eps, prefetch: gl.constexpr, finish: gl.constexpr, extra,
    WIDTH: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr, KEPT: gl.constexpr, DTYPE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Call finish(first, second, early, tile, row, token, here, n, tiles, extra) with each R tiles of the product.

    The product is y = weight @ rms_norm(x), without the norm where there is none. SETS is 0 for one token, 1 for up to
    8 and 2 for up to 16. x [tokens, 128 UNITS] of DTYPE, norm [128 UNITS] or None, and no factors: every program makes
    x's digits; else x and factors are `prepare_kernel`'s. words and scales: see `packed`. first and second [P] fp32
    belong to token[p], and to row[p] and row[p] + 8 tiles of n rows; where not here[p], they belong to nothing. `early`
    is what prefetch(row, token, here, n, tiles, extra) has loaded before the sums were made. record: bytes of a record.
    Of the ring's STAGES slots, EARLY are asked for before the wait. KEPT: all of x stays in shared memory, always what
    the program made; else the ring brings it with the weights, for each slot anew.
    """
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    TURNS: gl.constexpr = (UNITS + WARPS - 1) // WARPS
    COLUMNS: gl.constexpr = max(8 * SETS, 1)
    BF16: gl.constexpr = gl.bfloat16 == DTYPE
    BLOCK: gl.constexpr = digit_bytes(GROUPS, SETS)
    SLOT: gl.constexpr = slot_bytes(PLANES, GROUPS, ZEROS, SETS, R, KEPT)
    X_AT: gl.constexpr = 0 if KEPT else slot_bytes(PLANES, GROUPS, ZEROS, SETS, R, True)
    SUMS: gl.constexpr = sums_bytes(R, SETS)
    STAGED: gl.constexpr = factors is None
    FIXED: gl.constexpr = fixed_bytes(WIDTH, GROUPS, SETS, R, KEPT, STAGED)
    REST: gl.constexpr = STAGES - 1 - EARLY
    PAIRS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane, warp = lane_of(WARPS)
    memory, address = program_memory((FIXED + WARPS * STAGES * SLOT + 1023) // 1024 * 1024, WARPS)
    factors_at = address + 2 * WARPS * SUMS  # [column, warp] fp32, and behind them the sums of x's squares
    squares_at, x_at = factors_at + COLUMNS * 32, address + (2 * WARPS * SUMS + COLUMNS * 64 + 127) // 128 * 128
    ring = address + FIXED + warp * (STAGES * SLOT) + lane * 0
    begin = gl.program_id(0) * tiles // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)

    gains = None
    if norm is not None and STAGED:
        gains = load_row(norm, UNITS, True)  # first of all: behind the ring's copies they would wait for all of these
    sources, unit, limits = copies(words, scales, begin, end, UNITS, PLANES, GROUPS, ZEROS, R)
    state, to = (unit, 0, 0), ring + lane * 16
    state = fill(state, to, sources, limits, record, EARLY, STAGED, UNITS, TURNS, PLANES, GROUPS, ZEROS, SLOT, R)
    if PDL:
        statement("griddepcontrol.wait;")
        statement("griddepcontrol.launch_dependents;")
    if STAGED:
        rows = ()
        for token in gl.static_range(max(1, PIECES_AHEAD // pieces_of(UNITS)) if SETS > 0 else 1):
            rows += (load_row(x + token * (UNITS * 128), UNITS, token < tokens),)
        state = fill(state, to, sources, limits, record, REST, True, UNITS, TURNS, PLANES, GROUPS, ZEROS, SLOT, R)
        touched = (touched_behind(state[0], rows[0]),)
        rows = touched + rows[1:]
        if SETS > 0:
            stage_tokens(x, rows, gains, tokens, x_at, factors_at, squares_at, UNITS, GROUPS, SETS, BF16)
        else:
            values = scaled(rows[0], gains, BF16)
            power, factor = power_of(reduced(peak_of(values), "max.u32"))
            stage_token(values, power, x_at, GROUPS)
            warp_barrier()
            store_float(factors_at + warp * 4 + lane * 0, factor, 0)
            if norm is not None:
                store_float(squares_at + warp * 4 + lane * 0, sum_of_squares(rows[0], BF16), 0)
    else:
        of_columns = gl.arange(0, 2 * WARPS * COLUMNS, PAIRS)
        found = gl.load(factors + of_columns)  # in flight while x is asked for
        MIDDLE: gl.constexpr = BLOCK // 1024 * 512
        x_source = x.to(gl.int64) + warp * BLOCK + (lane * 16 + MIDDLE)
        limit = unit + (end - begin + R - 1) // R * (R * UNITS)
        x_limits, turn = (limit, gl.where(lane * 16 < BLOCK % 512, limit, 0)), 0
        x_to = x_at + warp * BLOCK + lane * 16 if KEPT else to + X_AT
        # A turn's group of copies is its x, with the weights that were not asked for before. Of x that is kept, all
        # turns come before these weights; the ring's groups lie so that `arrive` finds both, as EARLY <= TURNS.
        for asked in range(unknown(TURNS if KEPT else STAGES - 1, record)):
            size, last = bytes_of_lane(turn, TURNS - 1, UNITS), turn == TURNS - 1
            copy(x_to, x_source, unit, x_limits, size, BLOCK, 32, MIDDLE)
            if not KEPT and REST > 0:
                late = gl.where(asked < EARLY, 0, limits[0]), gl.where(asked < EARLY, 0, limits[1])
                copy_units(x_to - X_AT, sources, unit, late, size, PLANES, GROUPS, ZEROS, R)
            commit()
            unit, turn = behind(unit, last, UNITS, TURNS, R), gl.where(last, 0, turn + 1)
            x_source += gl.where(last, (1 - TURNS) * (WARPS * BLOCK), WARPS * BLOCK)
            x_to += WARPS * BLOCK if KEPT else SLOT
        if KEPT:
            state = fill(state, to, sources, limits, record, REST, True, UNITS, TURNS, PLANES, GROUPS, ZEROS, SLOT, R)
        else:
            state = unit, turn, (STAGES - 1) * SLOT
        store_float(factors_at + of_columns * 4, found, 0)

    words_at, scales_at, zeros_at = slot_places(ring, PLANES, R)
    if SETS == 0:
        digits_at, sums_at = token_places(x_at + warp * BLOCK)
    elif KEPT:
        digits_at, sums_at = x_at + warp * BLOCK + lane * 16, x_at + warp * BLOCK + lane % 4 * 8
    else:
        digits_at, sums_at = to, ring + lane % 4 * 8
    p = gl.arange(0, R * COLUMNS * 8, PAIRS)
    tile_of, token = p // (8 * COLUMNS), p // 8 % COLUMNS
    zero = gl.zeros([WARPS, 32], gl.int32, lanes(WARPS))
    none = zero if PLANES == 2 else zero.to(gl.float32)
    next_unit, _, next_slot = state
    last_turn = (TURNS - STAGES) % TURNS  # its copies, STAGES - 1 turns ahead, are a tile's last
    if SETS > 0:
        last_turn = unknown(last_turn, record)
    slot, buffer, rms = 0, address, p * 0.0
    for tile in range(begin, end, R):
        row_of = (tile + tile_of) * 8 + p % 8
        here = (token < tokens) & (tile + tile_of < end)
        early = prefetch(row_of, token, here, n, tiles, extra)
        if PLANES == 2:
            scale = gl.load(scales + row_of, mask=tile + tile_of < end, other=0)
        totals = (((none, none, none, none),) * max(2 * SETS, PLANES),) * R
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
                    units += (load_unit(places, r, R, PLANES, GROUPS, ZEROS),)
                size, last = bytes_of_lane(turn, last_turn, UNITS), turn == last_turn
                copy_units(to + next_slot, sources, next_unit, limits, size, PLANES, GROUPS, ZEROS, R)
                if not KEPT:
                    copy(to + (next_slot + X_AT), x_source, next_unit, x_limits, size, BLOCK, 32, MIDDLE)
                    x_source += gl.where(last, (1 - TURNS) * (WARPS * BLOCK), WARPS * BLOCK)
                commit()
                if SETS > 0:
                    x_slot = turn * (WARPS * BLOCK) if KEPT else slot
                    xs, sums = load_tokens(digits_at + x_slot, sums_at + x_slot, X_AT, GROUPS, SETS)
                next_unit = behind(next_unit, last, UNITS, TURNS, R)
                next_slot = slot
                slot = gl.where(slot == (STAGES - 1) * SLOT, 0, slot + SLOT)
                for r in gl.static_range(R):
                    new += (add_unit(totals[r], units[r], xs, sums, zero, PLANES, GROUPS, SETS, BF16),)
                totals = new
        store_sums(totals, buffer + warp * SUMS, COLUMNS, SETS, R, PLANES)
        barrier()
        first, second = add_warps(buffer + p * 8, factors_at + token * 32, SUMS)
        if PLANES == 2:
            low, high = halves(scale.to(gl.uint32, bitcast=True), BF16)
            first, second = first * low, second * high
        else:
            second *= 0.0625
        if norm is not None:
            if tile == begin:
                rms = rms_scale(squares_at + token * 32, eps, WIDTH)
            first, second = first * rms, second * rms
        finish(first, second, early, tile + tile_of, row_of, token, here, n, tiles, extra)
        buffer = 2 * address + WARPS * SUMS - buffer
    memory._keep_alive()


@gluon.jit
def add_warps(address, factors_at, SUMS: gl.constexpr):
    """Return the sums of the warps' pairs of fp32, SUMS bytes apart, each times its warp's factor, in the one order.

    Factors are powers of two: the products are exact.
    """
    total = (0.0, 0.0)
    for w in gl.static_range(0, WARPS, 4):
        f = recast(load_four(factors_at, w * 4), gl.float32)
        a, b = times(load_floats(address, w * SUMS), f[0]), times(load_floats(address, w * SUMS + SUMS), f[1])
        c = times(load_floats(address, w * SUMS + 2 * SUMS), f[2])
        d = times(load_floats(address, w * SUMS + 3 * SUMS), f[3])
        total = (total[0] + ((a[0] + b[0]) + (c[0] + d[0])), total[1] + ((a[1] + b[1]) + (c[1] + d[1])))
    return total


@gluon.jit
def times(pair, factor):
    """Return a pair times a factor."""
    return pair[0] * factor, pair[1] * factor
