"""The loop that the stages with int4 and int8 weights share: stream packed weights once, multiply 1 to 16 tokens.

At four bits a weight a multiprocessor must turn 40 weights into products each clock, so nothing may stand between
memory and the tensor cores. The weights lie in memory in the very order in which a warp's lanes hold the operand of
mma.m16n8k16 (`fastgen.kernels.packed`): a lane copies 16 bytes (`cp.async`, a ring of STAGES in shared memory), reads
them back, and three shifts and four `lop3` turn a word of eight 4-bit weights q into the four registers of 16 + q
that the instruction takes. Nothing is converted to a float, no layout changes.

- 16 + q: the four bits are put into the mantissa of 16.0. The 16 leaves the sum again by B = sum(x), a product with
  ones: sum(w x) = s (sum((16 + q) x) - (24 + z) B) for a group of scale s and zero point z, in fp32. int8 is two
  planes of four bits, q + 128 = 16 high + low.
- Weights are the operand of 16 rows, tokens its 8 columns (a second product from 9 tokens on; columns beyond the
  tokens repeat the last). A column's sum does not depend on the others, so a token that is verified among others gets
  the bits that it gets alone.
- A warp takes every WARPS-th unit of 128 columns; at the end of a tile the warps' sums are added in order.
- RMSNorm's gain is multiplied into x, its scale into the result. fp16 could overflow there: x is first multiplied
  with the power of two below the scale. One token's x lies in shared memory; for more, `prepare_kernel` does this
  before, and x is read from the caches a chunk ahead.
- Under programmatic dependent launch the ring is filled before the program waits for the kernel ahead of it.

Gluon is Triton with explicit layouts. Letters: T tokens, n rows of the output, K width of the input, R tiles of 16
rows and U units a warp in a stage.
Sources: conversion in the mantissa, arXiv 2211.10017; operand order in memory, arXiv 2408.11743 (Marlin); PTX ISA,
mma.m16n8k16, cp.async, griddepcontrol.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from fastgen.kernels.fragments import (
    fma,
    halves,
    lanes,
    load_chunk,
    load_pairs,
    load_words,
    mma,
    one_token,
    unstack,
    widen,
)


@gluon.jit
def griddepcontrol(WHAT: gl.constexpr):
    """Let the next kernel start ("launch_dependents"), or wait for the one before ("wait")."""
    gl.inline_asm_elementwise(
        "griddepcontrol." + WHAT + "; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def load_row(x, UNITS: gl.constexpr, CHUNKS: gl.constexpr, WARPS: gl.constexpr):
    """Return x [128 UNITS] as words, CHUNKS of [64 WARPS], zeros behind it."""
    LONG: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    words = x.to(gl.pointer_type(gl.uint32), bitcast=True)
    k = gl.arange(0, WARPS * 64, LONG)
    row = ()
    for i in gl.static_range(CHUNKS):
        at = i * (WARPS * 64)
        if (i + 1) * WARPS <= UNITS:
            row += (gl.load(words + at + k),)
        else:
            row += (gl.load(words + at + k, mask=k < UNITS * 64 - at, other=0),)
    return row


@gluon.jit
def rms_scale(row, eps, WIDTH: gl.constexpr, BF16: gl.constexpr):
    """Return 1 / rms of a row of WIDTH values as fp32."""
    squares = gl.zeros_like(row[0]).to(gl.float32)
    for i in gl.static_range(len(row)):
        low, high = halves(row[i], BF16)
        squares += low * low + high * high
    return gl.rsqrt(gl.sum(squares) / WIDTH + eps)


@gluon.jit
def scaled_row(row, gains, eps, WIDTH: gl.constexpr, BF16: gl.constexpr):
    """Return a row times the gains, and what is left to multiply the product with."""
    NOTHING: gl.constexpr = 0x80008000
    scaled = ()
    if BF16:
        for i in gl.static_range(len(row)):
            scaled += (fma(row[i], gains[i], NOTHING, BF16),)
        return scaled, rms_scale(row, eps, WIDTH, BF16)
    else:
        scale = rms_scale(row, eps, WIDTH, BF16)
        power = (scale.to(gl.uint32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
        pair = power.to(gl.float16).to(gl.uint16, bitcast=True).to(gl.uint32) * 0x10001
        for i in gl.static_range(len(row)):
            scaled += (fma(fma(row[i], pair, NOTHING, BF16), gains[i], NOTHING, BF16),)
        return scaled, scale / power


@gluon.jit
def prepare_kernel(
    x, norm, out, factors, eps, WIDTH: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr
):  # fmt: skip
    """Grid (tokens): x [tokens, 128 UNITS] times norm [128 UNITS] into out, and what is left into factors [tokens]."""
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    CHUNKS: gl.constexpr = (UNITS + WARPS - 1) // WARPS
    LONG: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    BF16: gl.constexpr = x.dtype.element_ty == gl.bfloat16
    gains = load_row(norm, UNITS, CHUNKS, WARPS)
    if PDL:
        griddepcontrol("launch_dependents")
        griddepcontrol("wait")
    token = gl.program_id(0)
    row, factor = scaled_row(load_row(x + token * (UNITS * 128), UNITS, CHUNKS, WARPS), gains, eps, WIDTH, BF16)
    k = gl.arange(0, WARPS * 64, LONG)
    words = (out + token * (UNITS * 128)).to(gl.pointer_type(gl.uint32), bitcast=True)
    for i in gl.static_range(CHUNKS):
        gl.store(words + i * (WARPS * 64) + k, row[i], mask=k < UNITS * 64 - i * (WARPS * 64))
    gl.store(factors + token, factor)


@gluon.jit
def copy_stage(
    weight, rings, slot, tile, chunk, tiles, UNITS: gl.constexpr, PLANES: gl.constexpr, SUB: gl.constexpr,
    R: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Start the copies of one chunk of R tiles: U * WARPS units of each, with their scales and zero points."""
    words, scales, zeros = weight
    LONG: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    SHORT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    if tile < tiles:
        at = gl.arange(0, WARPS * PLANES * 256, LONG)
        pair = gl.arange(0, WARPS * max(SUB, 1) * 8, SHORT)
        four = gl.arange(0, WARPS * max(SUB, 1) * 4, SHORT)
        for r in gl.static_range(R):
            base = gl.minimum(tile + r, tiles - 1).to(gl.int64) * UNITS + chunk * (U * WARPS)
            for u in gl.static_range(U):
                index = (slot * R + r) * U + u
                left = UNITS - chunk * (U * WARPS) - u * WARPS
                mask, mask_pair, mask_four = None, None, None
                if UNITS % (U * WARPS):
                    mask, mask_pair, mask_four = (
                        at < left * (PLANES * 256),
                        pair < left * (SUB * 8),
                        four < left * (SUB * 4),
                    )
                source = words + base * (PLANES * 256) + u * (WARPS * PLANES * 256)
                async_copy.async_copy_global_to_shared(rings[0].index(index), source + at, mask)
                if SUB > 0:
                    source = scales + base * (SUB * 8) + u * (WARPS * SUB * 8)
                    async_copy.async_copy_global_to_shared(rings[1].index(index), source + pair, mask_pair)
                    if zeros is not None:
                        source = zeros + base * (SUB * 4) + u * (WARPS * SUB * 4)
                        async_copy.async_copy_global_to_shared(rings[2].index(index), source + four, mask_four)
    async_copy.commit_group()


@gluon.jit
def read_stage(rings, at, PLANES: gl.constexpr, SUB: gl.constexpr, ZEROS: gl.constexpr, WARPS: gl.constexpr):
    """Return a lane's words of both planes, its scales and its zero points, of the tile at `at` of the rings."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    buffer = rings[0].index(at)
    high = load_words(buffer, 0, PLANES, WARPS)
    low, pairs, zeros = high, high, high
    if PLANES == 2:
        low = load_words(buffer, 1, PLANES, WARPS)
    if SUB > 0:
        pairs = rings[1].index(at)._reinterpret(gl.uint32, [WARPS, SUB, 8], FLAT)
        pairs = unstack(load_pairs(pairs, SUB, WARPS), SUB, WARPS)
        if ZEROS:
            zeros = rings[2].index(at)._reinterpret(gl.uint16, [WARPS, SUB, 8], FLAT)
            zeros = unstack(load_pairs(zeros, SUB, WARPS), SUB, WARPS)
    return high, low, pairs, zeros


@gluon.jit
def zero_of(pair, HIGH: gl.constexpr):
    """Return one byte of a pair as fp32."""
    byte = pair >> 8 if HIGH else pair & 255
    return (byte | 0x4B000000).to(gl.float32, bitcast=True) - 8388608.0


@gluon.jit
def add_unit(total, stage, xs, zero, SUB: gl.constexpr, ZEROS: gl.constexpr, BF16: gl.constexpr):
    """Return the four sums of a lane plus a unit of a tile times eight tokens, scaled where groups have scales."""
    ONE: gl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
    high, low, pairs, zeros = stage
    one = xs[0] * 0 + ONE
    nothing = (zero, zero, zero, zero)
    if SUB == 0:
        b, c, d = nothing, nothing, nothing
        for s in gl.static_range(8):
            b = mma((one, one, one, one), xs[2 * s], xs[2 * s + 1], b, BF16)
            c = mma(widen(high[s], BF16), xs[2 * s], xs[2 * s + 1], c, BF16)
            d = mma(widen(low[s], BF16), xs[2 * s], xs[2 * s + 1], d, BF16)
        return (
            total[0] + (16.0 * c[0] + d[0] - 400.0 * b[0]), total[1] + (16.0 * c[1] + d[1] - 400.0 * b[1]),
            total[2] + (16.0 * c[2] + d[2] - 400.0 * b[0]), total[3] + (16.0 * c[3] + d[3] - 400.0 * b[1]),
        )  # fmt: skip
    else:
        STEPS: gl.constexpr = 8 // SUB
        for g in gl.static_range(SUB):
            b, c = nothing, nothing
            for s in gl.static_range(g * STEPS, (g + 1) * STEPS):
                b = mma((one, one, one, one), xs[2 * s], xs[2 * s + 1], b, BF16)
                c = mma(widen(high[s], BF16), xs[2 * s], xs[2 * s + 1], c, BF16)
            first, second = halves(pairs[g], BF16)
            if ZEROS:
                z_first, z_second = zero_of(zeros[g], False), zero_of(zeros[g], True)
            else:
                z_first, z_second = 24.0, 24.0
            total = (
                total[0] + first * (c[0] - z_first * b[0]), total[1] + first * (c[1] - z_first * b[1]),
                total[2] + second * (c[2] - z_second * b[0]), total[3] + second * (c[3] - z_second * b[1]),
            )  # fmt: skip
        return total


@gluon.jit
def stream_product(  # noqa: PLR0912, PLR0915
    x, norm, factors, weight, tokens, n, tiles, eps, prefetch: gl.constexpr, finish: gl.constexpr, extra,
    WIDTH: gl.constexpr, PLANES: gl.constexpr, SUB: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr, U: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Call finish(y, early, tile, row, token, here, n, extra) with every tile of y = weight @ rms_norm(x).

    SETS is 0 for one token: x [128 UNITS], norm [128 UNITS] or None. It is 1 for up to 8 and 2 for up to 16: x
    [tokens, 128 UNITS], where it is to be normalized with factors [tokens] by `prepare_kernel`. weight = (words,
    scales, zeros), see `packed`. y [64, 2] fp32: y[p, h] belongs to token[p] and row[p, h]. `early` is what
    prefetch(row, token, here, n, extra) has loaded before the sums were made.
    """
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    CHUNKS: gl.constexpr = (UNITS + U * WARPS - 1) // (U * WARPS)
    GROUPS: gl.constexpr = max(SUB, 1)
    COLUMNS: gl.constexpr = max(SETS, 1)
    BF16: gl.constexpr = x.dtype.element_ty == gl.bfloat16
    ZEROS: gl.constexpr = weight[2] is not None
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    ADD: gl.constexpr = gl.BlockedLayout([WARPS, 1, 2], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    PAIR: gl.constexpr = gl.SliceLayout(0, ADD)
    rings = (
        gl.allocate_shared_memory(gl.uint32, [STAGES * R * U, WARPS * PLANES * 256], FLAT),
        gl.allocate_shared_memory(gl.uint32, [STAGES * R * U, WARPS * GROUPS * 8], FLAT),
        gl.allocate_shared_memory(gl.uint32, [STAGES * R * U, WARPS * GROUPS * 4], FLAT),
    )
    exchange = gl.allocate_shared_memory(gl.float32, [R * COLUMNS, WARPS, 64, 2], CUBE)
    first, step = gl.program_id(0) * R, gl.num_programs(0) * R
    if PDL:
        griddepcontrol("launch_dependents")
    next_tile, next_chunk, next_slot = first, 0, 0
    for _ in gl.static_range(STAGES - 1):
        copy_stage(weight, rings, next_slot, next_tile, next_chunk, tiles, UNITS, PLANES, SUB, R, U, WARPS)
        next_slot += 1
        next_tile = gl.where(next_chunk == CHUNKS - 1, next_tile + step, next_tile)
        next_chunk = gl.where(next_chunk == CHUNKS - 1, 0, next_chunk + 1)
    if norm is not None:
        gains = load_row(norm, UNITS, CHUNKS * U, WARPS)
    if PDL:
        griddepcontrol("wait")
    pair = gl.arange(0, 64, gl.SliceLayout(1, PAIR))
    half = gl.arange(0, 2, gl.SliceLayout(0, PAIR))[None, :]
    zero = gl.zeros([WARPS, 32], gl.float32, lanes(WARPS))
    factor = 1.0
    ahead = ()
    if SETS == 0:
        only = gl.allocate_shared_memory(gl.uint32, [CHUNKS * U, WARPS * 64], FLAT)
        row_words = load_row(x, UNITS, CHUNKS * U, WARPS)
        if norm is not None:
            row_words, factor = scaled_row(row_words, gains, eps, WIDTH, BF16)
        for i in gl.static_range(CHUNKS * U):
            only.index(i).store(row_words[i])
    else:
        ahead = load_chunk(x, tokens, 0, UNITS, SETS, U, WARPS)
    slot = 0
    for tile in range(first, tiles, step):
        early, scales = (), ()
        for r in gl.static_range(R):
            row = ((tile + r) * 8 + pair // 8)[:, None] + half * (tiles * 8)
            if SUB == 0:
                scales += (gl.load(weight[1] + gl.minimum(tile + r, tiles - 1) * 8 + pair // 8),)
            for b in gl.static_range(COLUMNS):
                token = (pair % 8 + 8 * b)[:, None]
                early += (prefetch(row, token, (row < n) & (token < tokens) & (tile + r < tiles), n, extra),)
        totals = ((zero, zero, zero, zero),) * (R * COLUMNS)
        for chunk in range(CHUNKS):
            async_copy.wait_group(STAGES - 2)
            stages = ()
            for i in gl.static_range(R * U):
                stages += (read_stage(rings, slot * (R * U) + i, PLANES, SUB, ZEROS, WARPS),)
            copy_stage(weight, rings, next_slot, next_tile, next_chunk, tiles, UNITS, PLANES, SUB, R, U, WARPS)
            xs = ahead
            if SETS > 0:
                ahead = load_chunk(x, tokens, gl.where(chunk == CHUNKS - 1, 0, chunk + 1), UNITS, SETS, U, WARPS)
            for u in gl.static_range(U):
                if SETS == 0:
                    xs += (one_token(only.index(chunk * U + u), WARPS),)
                new = ()
                for r in gl.static_range(R):
                    for b in gl.static_range(COLUMNS):
                        total, these = totals[r * COLUMNS + b], xs[u * COLUMNS + b]
                        new += (add_unit(total, stages[r * U + u], these, zero, SUB, ZEROS, BF16),)
                totals = new
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            next_slot = gl.where(next_slot == STAGES - 1, 0, next_slot + 1)
            next_tile = gl.where(next_chunk == CHUNKS - 1, next_tile + step, next_tile)
            next_chunk = gl.where(next_chunk == CHUNKS - 1, 0, next_chunk + 1)
        for i in gl.static_range(R * COLUMNS):
            t = totals[i]
            four = gl.join(gl.join(t[0], t[2]), gl.join(t[1], t[3]))
            exchange.index(i).store(gl.reshape(gl.permute(four, (0, 1, 3, 2)), [WARPS, 64, 2]))
        for r in gl.static_range(R):
            row = ((tile + r) * 8 + pair // 8)[:, None] + half * (tiles * 8)
            for b in gl.static_range(COLUMNS):
                token = pair % 8 + 8 * b
                y = gl.sum(exchange.index(r * COLUMNS + b).load(ADD), axis=0)
                if SUB == 0:
                    low, high = halves(scales[r], BF16)
                    y *= gl.where(half == 0, low[:, None], high[:, None])
                if SETS == 0:
                    y *= factor
                elif factors is not None:
                    y *= gl.load(factors + token, mask=token < tokens, other=0.0)[:, None]
                column = token[:, None]
                here = (row < n) & (column < tokens) & (tile + r < tiles)
                finish(y, early[r * COLUMNS + b], tile + r, row, column, here, n, extra)
