"""The loop that four stages share: stream a weight matrix once, multiply it with 1 to 16 tokens.

For few tokens the product of a linear is bound by reading its weights, so everything here serves one end: that
memory never idles, not within a kernel and not between two.

- The grid is as large as the GPU holds at once. A program takes an even share of the rows, in blocks of 16, and claims
  more blocks when it is through with it (`fastgen.kernels.claims`). Its warps share the columns: warp w takes every
  WARPS-th unit of 64, through a ring of its own (`fastgen.kernels.ring`) that no other warp waits for. Only at a
  block's end the warps' sums are added, in order.
- Weights are an operand of mma.m16n8k16 without any change of layout: the 16 bytes that a lane reads of a row are
  eight neighbours, and since sums do not care in which order k comes as long as x agrees, they serve two products.
  Tokens are the eight columns (16 from 9 tokens on; columns beyond the tokens repeat the last). A column's sum depends
  on WARPS alone: a token that is verified among others gets the bits that it gets alone.
- Under programmatic dependent launch the ring is filled before the program waits for the kernel ahead of it. The
  next kernel's programs do not fit beside these: they start, and fill their rings, as these leave. Programs of two
  kernels side by side were slower, because the hardware then spreads them unevenly over the multiprocessors.
- One token's x lies in shared memory, multiplied by RMSNorm's gains; of several, x and gains are read from the caches
  a unit ahead. RMSNorm's scale multiplies the sums: sum(w g x) / rms(x). fp16 could overflow there, so it multiplies x
  with the power of two below the scale first, for one more pass over x. Squares are summed by eights in one order, and
  those sums in fp64: exactly, so in any order, but for sums below 2^-29 of the total, which fp32 hardly ever shows.

Letters: T tokens, n rows of the output, K width of the input, a multiple of 8; R tiles of 16 rows in a block.
Sources: programmatic dependent launch, CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"; PTX ISA, griddepcontrol, mma.m16n8k16. RMSNorm: arXiv 1910.07467.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.claims import claim, publish, published
from fastgen.kernels.fragments import arrive, barrier, commit, halves, lanes, load_four, statement, warp_barrier
from fastgen.kernels.ring import copy_rows, fma, load_words, mma, place_of, release, ring_memory, write_four

WARPS = 8
"""Warps of a program; they are the order of every sum along K."""

WIDE = 64 * WARPS
"""Columns that the warps of a program take at a time."""

LINES = 4
"""Lines of 512 bytes that a unit of a tile takes of a warp's ring."""

NOTHING = gl.constexpr(0x80008000)
"""A pair of -0.0: what is added to it does not change."""

NO_ROW = gl.constexpr(1 << 30)
"""Stands for the first row of a block that there is not."""


@gluon.jit
def stream_product(  # noqa: PLR0912, PLR0915
    x, norm, weight, claims, tokens, n, own, eps, prefetch: gl.constexpr, finish: gl.constexpr, extra,
    K: gl.constexpr, R: gl.constexpr, SETS: gl.constexpr, DEPTH: gl.constexpr, PAIRED: gl.constexpr, PDL: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Call finish(y, early, tile, row, token, here, n, extra) for every tile of y = weight @ rms_norm(x).

    x [tokens, K], norm [K] or None, weight [n, K]; PAIRED: weight [2n, K], and a tile holds eight rows of the first
    half and the same rows of the second. SETS is 0 for one token, 1 for up to 8, 2 for up to 16. y [64, 2] fp32
    belongs to token[p] and row[p, h], where here[p, h]; `tile` counts the tiles of all programs, and `early` is what
    prefetch(row, token, here, n, extra) has loaded before the sums were made. The first `own` rows are shared out
    evenly; the others are claimed by blocks, with the counter `claims` (None: all rows are shared out).
    """
    UNITS: gl.constexpr = (K + 64 * WARPS - 1) // (64 * WARPS)
    STEP: gl.constexpr = 8 if PAIRED else 16
    SPAN: gl.constexpr = R * STEP
    AHEAD: gl.constexpr = blocks_ahead(DEPTH, UNITS)
    BF16: gl.constexpr = x.dtype.element_ty == gl.bfloat16
    ALONE: gl.constexpr = SETS == 0
    COLUMNS: gl.constexpr = max(SETS, 1)
    PIECES: gl.constexpr = (UNITS + 3) // 4 if ALONE else 0
    L: gl.constexpr = lanes(WARPS)
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    ADD: gl.constexpr = gl.BlockedLayout([WARPS, 1, 2], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    PAIR: gl.constexpr = gl.SliceLayout(0, ADD)
    memory, address = ring_memory((WARPS * DEPTH * R) * 4 + PIECES * WARPS + 1)
    exchange = gl.allocate_shared_memory(gl.float32, [R * COLUMNS, WARPS, 64, 2], CUBE)
    x_at = address + WARPS * DEPTH * R * 2048
    numbers = x_at + PIECES * WARPS * 512
    begin = gl.program_id(0) * own // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * own // gl.num_programs(0)
    blocks = gl.cdiv(gl.cdiv(own, gl.num_programs(0)), SPAN)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, L))[None, :] + warp * 0
    g, offset = lane // 4, warp * 64 + lane % 4 * 8
    ring = address + warp * (DEPTH * R * 2048)
    near = ring + place_of(g, lane % 4)
    c, of_copy, ring = lane // 8, warp * 64 + lane % 8 * 8, ring + place_of(lane // 8, lane % 8)  # what a lane copies
    zero = gl.zeros([WARPS, 32], gl.float32, L)

    firsts = ()
    for i in gl.static_range(AHEAD + 1):
        firsts += (gl.where(i < blocks, begin + i * SPAN, NO_ROW),)
    for i in gl.static_range(DEPTH):
        k = i % UNITS * (64 * WARPS) + of_copy
        copy_unit(weight, ring + i * (R * 2048), firsts[i // UNITS], k, c, end, n, K, R, PAIRED)
    gains = ()
    if ALONE:
        if norm is not None:
            gains = load_row(norm, warp * 32 + lane, K, PIECES, WARPS)
    if PDL:
        statement("griddepcontrol.wait;")
        statement("griddepcontrol.launch_dependents;")

    squares = (zero.to(gl.float64),) * COLUMNS
    powers = (zero,) * COLUMNS
    if ALONE:
        row_words = load_row(x, warp * 32 + lane, K, PIECES, WARPS)
        if norm is not None:
            for i in gl.static_range(PIECES):
                squares = (squares[0] + square_sum(row_words[i], BF16),)
            if not BF16:
                powers = powers_below(squares, K, eps, ALONE, WARPS)
        for i in gl.static_range(PIECES):
            words = row_words[i]
            if norm is not None:
                words = scaled(words, gains[i], powers[0], BF16)
            write_four(x_at + i * (512 * WARPS) + (warp * 32 + lane) * 16, words)
        barrier()
        x_at += offset * 2
    else:
        if norm is not None:
            if not BF16:
                for unit in range(UNITS):
                    all_values, _ = load_unit(x, norm, g, unit * (64 * WARPS) + offset, tokens, K, SETS, WARPS)
                    squares = add_squares(squares, all_values, SETS, BF16)
                powers = powers_below(squares, K, eps, ALONE, WARPS)
        ahead, ahead_gains = load_unit(x, norm, g, offset, tokens, K, SETS, WARPS)
    pair = gl.arange(0, 64, gl.SliceLayout(1, PAIR))
    half = gl.arange(0, 2, gl.SliceLayout(0, PAIR))[None, :]
    factors = (pair * 0.0,) * COLUMNS
    slot, block, next_unit = 0, 0, DEPTH % UNITS
    while firsts[0] < NO_ROW:
        first = firsts[0]
        limit = gl.where(first < own, end, n)
        wanted = (block + AHEAD + 1 >= blocks) & (firsts[AHEAD] < NO_ROW)
        if claims is not None:
            number = claim(claims, wanted.to(gl.int32))
        early = ()
        for r in gl.static_range(R):
            row = (first + r * STEP + pair // 8)[:, None] + half * (0 if PAIRED else 8)
            for b in gl.static_range(COLUMNS):
                token = (pair % 8 + 8 * b)[:, None]
                early += (prefetch(row, token, (row < limit) & (token < tokens), n, extra),)
        totals = ((zero, zero, zero, zero),) * (R * COLUMNS)
        for unit in range(UNITS):
            arrive(DEPTH - 1)
            rows, at, far = (), near + slot, (near + slot) ^ 64
            for r in gl.static_range(R):
                rows += (load_four(at, r * 2048), load_four(at, r * 2048 + 1024))
                rows += (load_four(far, r * 2048), load_four(far, r * 2048 + 1024))
            if ALONE:
                values = (load_four(x_at + unit * (128 * WARPS), 0), load_four(x_at + unit * (128 * WARPS), 64))
            else:
                values, unit_gains = ahead, ahead_gains
                following = gl.where(unit == UNITS - 1, 0, unit + 1) * (64 * WARPS) + offset
                ahead, ahead_gains = load_unit(x, norm, g, following, tokens, K, SETS, WARPS)
                if norm is not None:
                    if BF16:
                        if block == 0:
                            squares = add_squares(squares, values, SETS, BF16)
                    values = scaled_unit(values, unit_gains, powers, SETS, BF16)
            totals = add_unit(totals, rows, values, R, COLUMNS, BF16)
            later = next_unit < DEPTH % UNITS
            next_first = gl.where(later, firsts[AHEAD], firsts[DEPTH // UNITS])
            next_end = gl.where(next_first < own, end, n)
            next_k = next_unit * (64 * WARPS) + of_copy
            warp_barrier()  # all lanes have read the slot
            copy_unit(weight, ring + slot, next_first, next_k, c, next_end, n, K, R, PAIRED)
            slot = gl.where(slot == (DEPTH - 1) * R * 2048, 0, slot + R * 2048)
            next_unit = gl.where(next_unit == UNITS - 1, 0, next_unit + 1)
        if claims is not None:
            publish(numbers + block % 2 * 4, number, claims, gl.cdiv(n - own, SPAN) + gl.num_programs(0) - 1)
        for i in gl.static_range(R * COLUMNS):
            s = totals[i]
            four = gl.join(gl.join(s[0], s[2]), gl.join(s[1], s[3]))
            exchange.index(i).store(gl.reshape(gl.permute(four, (0, 1, 3, 2)), [WARPS, 64, 2]))
        if norm is not None:
            if block == 0:
                factors = factors_of_rows(squares, K, eps, ALONE, BF16, gl.SliceLayout(1, PAIR), WARPS)
        tile = gl.program_id(0) * blocks + block
        if claims is not None:
            if first >= own:
                tile = gl.num_programs(0) * blocks + (first - own) // SPAN
        for r in gl.static_range(R):
            row = (first + r * STEP + pair // 8)[:, None] + half * (0 if PAIRED else 8)
            for b in gl.static_range(COLUMNS):
                y = gl.sum(exchange.index(r * COLUMNS + b).load(ADD), axis=0)
                if norm is not None:
                    y *= factors[b][:, None]
                token = (pair % 8 + 8 * b)[:, None]
                here = (row < limit) & (token < tokens)
                finish(y, early[r * COLUMNS + b], tile * R + r, row, token, here, n, extra)
        block += 1
        last = gl.where(block + AHEAD < blocks, begin + (block + AHEAD) * SPAN, NO_ROW)
        if claims is not None:
            if wanted:
                last = own + published(numbers + (block - 1) % 2 * 4) * SPAN
                last = gl.where(last < n, last, NO_ROW)
        firsts = firsts[1:]
        firsts += (last,)
    release(memory, WARPS)


@gluon.constexpr_function
def blocks_ahead(depth, units):
    """Return how many blocks the copies may be ahead of the products, where a ring holds `depth` units."""
    return (units - 1 + depth) // units


@gluon.jit
def copy_unit(
    weight, to, first, k, c, end, n, K: gl.constexpr, R: gl.constexpr, PAIRED: gl.constexpr
):  # fmt: skip
    """Start a warp's copies of columns k .. k + 8 of R tiles' rows c, c + 4, ..; nothing from `end` on."""
    STEP: gl.constexpr = 8 if PAIRED else 16
    inside = gl.where(k < K, 16, 0)
    for r in gl.static_range(R):
        row = first + r * STEP + c
        source = weight + row.to(gl.int64) * K + k
        sizes = gl.where(row < end, inside, 0), gl.where(row + 4 < end, inside, 0)
        copy_rows(to, source, sizes, 8 * K, r * 2048)
        if PAIRED:
            source += n.to(gl.int64) * K
        else:
            source += 8 * K
            sizes = gl.where(row + 8 < end, inside, 0), gl.where(row + 12 < end, inside, 0)
        copy_rows(to, source, sizes, 8 * K, r * 2048 + 1024)
    commit()


@gluon.jit
def load_row(row, thread, K: gl.constexpr, PIECES: gl.constexpr, WARPS: gl.constexpr):
    """Return a row [K] in pieces of 8 values a thread, zeros behind it."""
    result = ()
    for i in gl.static_range(PIECES):
        result += (load_eight(row, i * (256 * WARPS) + thread * 8, K, (i + 1) * 256 * WARPS > K),)
    return result


@gluon.jit
def load_eight(row, at, K: gl.constexpr, MASKED: gl.constexpr):
    """Return a lane's eight values of a row [K] as four words, zeros behind it."""
    if MASKED:
        here = at < K
        v = load_words(row + gl.where(here, at, 0))
        return (gl.where(here, v[0], 0), gl.where(here, v[1], 0), gl.where(here, v[2], 0), gl.where(here, v[3], 0))
    else:
        return load_words(row + at)


@gluon.jit
def load_unit(x, norm, g, k, tokens, K: gl.constexpr, SETS: gl.constexpr, WARPS: gl.constexpr):
    """Return a lane's words of a unit of x, of SETS of eight tokens at k, then at k + 32, and those of the gains."""
    MASKED: gl.constexpr = K % (64 * WARPS) != 0
    words, gains = (), ()
    for c in gl.static_range(2):
        for b in gl.static_range(SETS):
            token = gl.minimum(g + 8 * b, tokens - 1)
            words += (load_eight(x + token.to(gl.int64) * K, k + 32 * c, K, MASKED),)
        if norm is not None:
            gains += (load_eight(norm, k + 32 * c, K, MASKED),)
    return words, gains


@gluon.jit
def add_unit(totals, rows, words, R: gl.constexpr, COLUMNS: gl.constexpr, BF16: gl.constexpr):
    """Return a lane's sums plus the products of a unit: rows are 4 R times four words, words 2 COLUMNS times four."""
    sums = ()
    for r in gl.static_range(R):
        for b in gl.static_range(COLUMNS):
            total = totals[r * COLUMNS + b]
            for c in gl.static_range(2):
                p, q, v = rows[4 * r + 2 * c], rows[4 * r + 2 * c + 1], words[c * COLUMNS + b]
                total = mma((p[0], q[0], p[1], q[1]), v[0], v[1], total, BF16)
                total = mma((p[2], q[2], p[3], q[3]), v[2], v[3], total, BF16)
            sums += (total,)
    return sums


@gluon.jit
def times(v, w, BF16: gl.constexpr):
    """Return four words of pairs times four others, rounded."""
    return (
        fma(v[0], w[0], NOTHING, BF16), fma(v[1], w[1], NOTHING, BF16),
        fma(v[2], w[2], NOTHING, BF16), fma(v[3], w[3], NOTHING, BF16),
    )  # fmt: skip


@gluon.jit
def scaled(v, gain, power, BF16: gl.constexpr):
    """Return four words of pairs of x times their gains, in fp16 times a power of two before."""
    if not BF16:
        two = power.to(gl.float16).to(gl.uint16, bitcast=True).to(gl.uint32) * 0x10001
        v = times(v, (two, two, two, two), BF16)
    return times(v, gain, BF16)


@gluon.jit
def scaled_unit(values, gains, powers, SETS: gl.constexpr, BF16: gl.constexpr):
    """Return a unit of x times its gains, see `scaled`."""
    result = ()
    for c in gl.static_range(2):
        for b in gl.static_range(SETS):
            result += (scaled(values[c * SETS + b], gains[c], powers[b], BF16),)
    return result


@gluon.jit
def square_sum(v, BF16: gl.constexpr):
    """Return the sum of the squares of four words of pairs, added in their order, as fp64."""
    total = gl.zeros_like(v[0]).to(gl.float32)
    for j in gl.static_range(4):
        low, high = halves(v[j], BF16)
        total = gl.fma(high, high, gl.fma(low, low, total))
    return total.to(gl.float64)


@gluon.jit
def add_squares(squares, words, SETS: gl.constexpr, BF16: gl.constexpr):
    """Return a lane's sums of squares for each set plus those of a unit; `load_eight` gave zeros behind K."""
    new = ()
    for b in gl.static_range(SETS):
        new += (squares[b] + (square_sum(words[b], BF16) + square_sum(words[SETS + b], BF16)),)
    return new


@gluon.constexpr_function
def by_token(warps):
    """Return the layout of [8, 8]: rows of a tile, tokens."""
    return gl.BlockedLayout([1, 1], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def rms_scale(squares, K: gl.constexpr, eps, ALONE: gl.constexpr, WARPS: gl.constexpr):
    """Return 1 / rms of eight tokens from the lanes' sums of squares; lane 4g + t has token g, or all have the one."""
    TOKENS: gl.constexpr = gl.SliceLayout(0, by_token(WARPS))
    if ALONE:
        total = gl.sum(gl.sum(squares, axis=1), axis=0)
        return gl.zeros([8], gl.float32, TOKENS) + gl.rsqrt((total * (1.0 / K)).to(gl.float32) + eps)
    else:
        total = gl.sum(gl.sum(gl.reshape(squares, [WARPS, 8, 4]), axis=2), axis=0)
        return gl.convert_layout(gl.rsqrt((total * (1.0 / K)).to(gl.float32) + eps), TOKENS)


@gluon.jit
def power_of_two(scale):
    """Return the power of two at or below a positive fp32, or the largest that fp16 has."""
    power = (scale.to(gl.uint32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    return gl.minimum(power, 32768.0)


@gluon.jit
def powers_below(squares, K: gl.constexpr, eps, ALONE: gl.constexpr, WARPS: gl.constexpr):
    """Return the power of two below the scale of each lane's token, for every set of tokens."""
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    powers = ()
    for b in gl.static_range(len(squares)):
        power = power_of_two(rms_scale(squares[b], K, eps, ALONE, WARPS))
        power = gl.convert_layout(power, gl.SliceLayout(0, gl.SliceLayout(2, SPREAD)))
        power = power[None, :, None].broadcast_to([WARPS, 8, 4])
        powers += (gl.convert_layout(gl.reshape(power, [WARPS, 32]), lanes(WARPS)),)
    return powers


@gluon.jit
def factors_of_rows(
    squares, K: gl.constexpr, eps, ALONE: gl.constexpr, BF16: gl.constexpr, LAYOUT: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Return what is left to multiply the sums with, for every set of tokens: [64], eight rows of eight tokens."""
    factors = ()
    for b in gl.static_range(len(squares)):
        scale = rms_scale(squares[b], K, eps, ALONE, WARPS)
        if not BF16:
            scale /= power_of_two(scale)
        factors += (gl.convert_layout(gl.reshape(scale[None, :].broadcast_to([8, 8]), [64]), LAYOUT),)
    return factors


@gluon.jit
def nothing(row, token, here, n, extra):
    """Load nothing before the sums are made."""
    return 0.0


@gluon.jit
def biased(y, row, here, bias):
    """Return y plus a bias, where there is one."""
    if bias is not None:
        y += gl.load(bias + row, mask=here, other=0.0).to(gl.float32)
    return y


@gluon.jit
def store_rows(y, early, tile, row, token, here, n, extra):
    """Store y plus a bias [n] or None into out [tokens, n], with extra = (out, bias)."""
    out, bias = extra
    gl.store(out + token.to(gl.int64) * n + row, biased(y, row, here, bias).to(out.dtype.element_ty), mask=here)
