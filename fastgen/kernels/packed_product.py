"""The loop that the stages with int4 and int8 weights share: stream packed weights once, multiply 1 to 16 tokens.

At four bits a weight a multiprocessor must turn 40 weights into products each clock, so nothing may stand between
memory and the tensor cores. The weights lie in memory in the very order in which a warp's lanes hold the operand of
mma.m16n8k16 (`fastgen.kernels.packed`): a lane copies 16 bytes (`cp.async`, a ring of STAGES in shared memory), reads
its own words back, and three shifts, four `lop3` and four packed additions turn a word of eight 4-bit weights into
the four registers that the instruction takes. Nothing is converted, no layout changes.

- The four bits q are put into the mantissa of 16.0, which gives 16 + q, and 16 + the zero point's q is subtracted:
  exact in bf16 and fp16. Scales are applied to sums, in fp32. int8 is two planes of four bits.
- Weights are the operand of 16 rows, tokens its 8 columns (a second product from 9 tokens on; columns beyond the
  tokens repeat the last). A column's sum does not depend on the others, so a token that is verified among others gets
  the bits that it gets alone.
- A warp takes every WARPS-th unit of 128 columns; at the end of a tile the warps' sums are added in order.
- RMSNorm's gain is multiplied into x, its scale into the result. fp16 could overflow there: x is first multiplied
  with the power of two below the scale. One token's x lies in shared memory; for more, `prepare` does this before.
- Under programmatic dependent launch the ring is filled before the program waits for the kernel ahead of it. A
  program takes a quarter of a multiprocessor, so that the next kernel's start beside it and memory stays busy.

Gluon is Triton with explicit layouts. Letters: T tokens, n rows of the output, K width of the input, R tiles of 16
rows in a block.
Sources: conversion in the mantissa, arXiv 2211.10017; operand order in memory, arXiv 2408.11743 (Marlin); PTX ISA,
mma.m16n8k16, cp.async, griddepcontrol.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

UNIT = gl.constexpr(128)
"""Columns of a tile that a warp takes at a time; 256 words, two of 16 bytes a lane, for each plane of four bits."""

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
MMA_BF16, MMA_FP16 = gl.constexpr(MMA.format("bf16")), gl.constexpr(MMA.format("f16"))

# word -> its four registers, d = (word rotated & 0x000f000f at the mantissa's place) | 16.0; lop3 0xEA is (a & b) | c.
WIDEN_BF16 = gl.constexpr("""{ .reg .b32 r;
    lop3.b32 $0, $4, 0x00780078, 0x41804180, 0xEA;
    shf.r.wrap.b32 r, $4, $4, 4;  lop3.b32 $1, r, 0x00780078, 0x41804180, 0xEA;
    shf.r.wrap.b32 r, $4, $4, 8;  lop3.b32 $2, r, 0x00780078, 0x41804180, 0xEA;
    shf.r.wrap.b32 r, $4, $4, 12; lop3.b32 $3, r, 0x00780078, 0x41804180, 0xEA; }""")
WIDEN_FP16 = gl.constexpr("""{ .reg .b32 r;
    shf.l.wrap.b32 r, $4, $4, 3;  lop3.b32 $0, r, 0x03C003C0, 0x4C004C00, 0xEA;
    shf.r.wrap.b32 r, $4, $4, 1;  lop3.b32 $1, r, 0x03C003C0, 0x4C004C00, 0xEA;
    shf.r.wrap.b32 r, $4, $4, 5;  lop3.b32 $2, r, 0x03C003C0, 0x4C004C00, 0xEA;
    shf.r.wrap.b32 r, $4, $4, 9;  lop3.b32 $3, r, 0x03C003C0, 0x4C004C00, 0xEA; }""")


@gluon.constexpr_function
def lanes(warps):
    """Return the layout of [warps, 32]: one value a lane."""
    return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])


@gluon.constexpr_function
def along(warps, dim):
    """Return the layout of one dimension of [warps, 32, 4, 4], 16 words a lane."""
    layout = gl.BlockedLayout([1, 1, 4, 4], [1, 32, 1, 1], [warps, 1, 1, 1], [3, 2, 1, 0])
    for other in (3, 2, 1, 0):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def widen(word, BF16: gl.constexpr):
    """Return the four pairs of 16 + q that a word of eight 4-bit weights stands for."""
    return gl.inline_asm_elementwise(
        WIDEN_BF16 if BF16 else WIDEN_FP16, "=r,=r,=r,=r,r", [word],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def fma(a, b, c, BF16: gl.constexpr):
    """Return a b + c of pairs of 16-bit floats, rounded once."""
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;" if BF16 else "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c],
        dtype=gl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def mma(a, b0, b1, c, BF16: gl.constexpr):
    """Return c + a b for operands in registers, [16, 16] x [16, 8] a warp."""
    return gl.inline_asm_elementwise(
        MMA_BF16 if BF16 else MMA_FP16, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def griddepcontrol(WHAT: gl.constexpr):
    """Let the next kernel start ("launch_dependents"), or wait for the one before ("wait")."""
    gl.inline_asm_elementwise(
        "griddepcontrol." + WHAT + "; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def eight(v, WARPS: gl.constexpr):
    """Return the eight [WARPS, 32] of v [WARPS, 32, 2, 2, 2], in order; they are registers of the lane already."""
    L: gl.constexpr = lanes(WARPS)
    even, odd = gl.split(v)
    v0, v2 = gl.split(even)
    v1, v3 = gl.split(odd)
    a0, a4 = gl.split(v0)
    a1, a5 = gl.split(v1)
    a2, a6 = gl.split(v2)
    a3, a7 = gl.split(v3)
    return (
        gl.convert_layout(a0, L, assert_trivial=True), gl.convert_layout(a1, L, assert_trivial=True),
        gl.convert_layout(a2, L, assert_trivial=True), gl.convert_layout(a3, L, assert_trivial=True),
        gl.convert_layout(a4, L, assert_trivial=True), gl.convert_layout(a5, L, assert_trivial=True),
        gl.convert_layout(a6, L, assert_trivial=True), gl.convert_layout(a7, L, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def load_words(buffer, PLANE: gl.constexpr, PLANES: gl.constexpr, WARPS: gl.constexpr):
    """Return the eight words a lane has of a plane of its unit, from buffer [WARPS * PLANES * 256]."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    L: gl.constexpr = gl.BlockedLayout([1, 2, 4], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    planes = buffer._reinterpret(gl.uint32, [WARPS, 2 * PLANES, 128], FLAT)
    words = planes.slice(2 * PLANE, 2, dim=1).load(L)
    return eight(gl.permute(gl.reshape(words, [WARPS, 2, 32, 2, 2]), (0, 2, 1, 3, 4)), WARPS)


@gluon.jit
def load_pairs(buffer, SUB: gl.constexpr, WARPS: gl.constexpr):
    """Return [WARPS, 32, SUB] of buffer [WARPS, SUB, 8]: what belongs to rows lane / 4 and lane / 4 + 8 of a tile."""
    L: gl.constexpr = gl.BlockedLayout([1, SUB, 1, 1], [1, 1, 8, 4], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    pairs = gl.expand_dims(buffer.load(gl.SliceLayout(3, L)), 3).broadcast_to([WARPS, SUB, 8, 4])
    return gl.permute(gl.reshape(pairs, [WARPS, SUB, 32]), (0, 2, 1))


@gluon.jit
def sixteen(v, WARPS: gl.constexpr):
    """Return the sixteen [WARPS, 32] of v [WARPS, 32, 16], in order."""
    even, odd = gl.split(gl.reshape(v, [WARPS, 32, 2, 2, 2, 2]))
    e, o = eight(even, WARPS), eight(odd, WARPS)
    return (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3], e[4], o[4], e[5], o[5], e[6], o[6], e[7], o[7])


@gluon.jit
def one_token(chunk, WARPS: gl.constexpr):
    """Return a lane's operands of eight products, 16 words, from a chunk [64 WARPS] of the one token's x.

    Of each 32 columns lane 4g + t has the eight from 8t, the same for every g.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 4, 1, 1, 4], [1, 1, 8, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    v = chunk._reinterpret(gl.uint32, [WARPS, 4, 4, 4], FLAT).load(gl.SliceLayout(2, L))
    v = gl.expand_dims(v, 2).broadcast_to([WARPS, 4, 8, 4, 4])
    return sixteen(gl.reshape(gl.permute(v, (0, 2, 3, 1, 4)), [WARPS, 32, 16]), WARPS)


@gluon.jit
def load_tokens(x, first, tokens, chunk, UNITS: gl.constexpr, MASKED: gl.constexpr, WARPS: gl.constexpr):
    """Return a lane's operands of eight products, 16 words, for eight tokens of x from `first` on.

    Lane 4g + t has token g, and of each 32 columns the eight from 8t, so that 16 bytes are two operands.
    """
    warp = gl.arange(0, WARPS, along(WARPS, 0))[:, None, None, None]
    lane = gl.arange(0, 32, along(WARPS, 1))[None, :, None, None]
    part = gl.arange(0, 4, along(WARPS, 2))[None, None, :, None]
    word = gl.arange(0, 4, along(WARPS, 3))[None, None, None, :]
    unit = chunk * WARPS + warp
    at = gl.minimum(lane // 4 + first, tokens - 1) * (UNITS * 64) + unit * 64 + part * 16 + lane % 4 * 4 + word
    words = x.to(gl.pointer_type(gl.uint32), bitcast=True)
    if MASKED:
        v = gl.load(words + at, mask=(unit < UNITS) & (at >= 0), other=0)
    else:
        v = gl.load(words + at)
    return sixteen(gl.reshape(v, [WARPS, 32, 16]), WARPS)


@gluon.jit
def load_chunk(
    x, tokens, chunk, UNITS: gl.constexpr, SETS: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Return `load_tokens` of a chunk: U units of SETS of eight tokens."""
    result = ()
    for u in gl.static_range(U):
        for b in gl.static_range(SETS):
            result += (load_tokens(x, 8 * b, tokens, chunk * U + u, UNITS, UNITS % (U * WARPS) != 0, WARPS),)
    return result


@gluon.jit
def halves(words, BF16: gl.constexpr):
    """Return pairs of 16-bit floats as two fp32."""
    if BF16:
        return (words << 16).to(gl.float32, bitcast=True), (words & 0xFFFF0000).to(gl.float32, bitcast=True)
    low, high = (words & 0xFFFF).to(gl.uint16), (words >> 16).to(gl.uint16)
    return low.to(gl.float16, bitcast=True).to(gl.float32), high.to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def load_row(x, UNITS: gl.constexpr, CHUNKS: gl.constexpr, WARPS: gl.constexpr):
    """Return x [128 UNITS] as words, CHUNKS of [64 WARPS], zeros behind it."""
    LONG: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    words = x.to(gl.pointer_type(gl.uint32), bitcast=True)
    k = gl.arange(0, WARPS * 64, LONG)
    row = ()
    for i in gl.static_range(CHUNKS):
        at = i * (WARPS * 64)
        if UNITS >= (i + 1) * WARPS:
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
def group_sums(xs, zero, GROUPS: gl.constexpr, BF16: gl.constexpr):
    """Return the sums of a warp's unit of x by group, each for the two tokens whose results a lane has."""
    ONE: gl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
    one = xs[0] * 0 + ONE
    result = ()
    for g in gl.static_range(GROUPS):
        c = (zero, zero, zero, zero)
        for s in gl.static_range(g * 8 // GROUPS, (g + 1) * 8 // GROUPS):
            c = mma((one, one, one, one), xs[2 * s], xs[2 * s + 1], c, BF16)
        result += ((c[0], c[1]),)
    return result


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
                    mask, mask_pair, mask_four = at < left * (PLANES * 256), pair < left * (SUB * 8), four < left * (SUB * 4)
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
def unstack(v, SUB: gl.constexpr, WARPS: gl.constexpr):
    """Return the SUB [WARPS, 32] of v [WARPS, 32, SUB] as 32-bit integers, the last one again up to four."""
    L: gl.constexpr = lanes(WARPS)
    v = v.to(gl.uint32)
    if SUB == 1:
        only = gl.convert_layout(gl.reshape(v, [WARPS, 32]), L, assert_trivial=True)
        return only, only, only, only
    elif SUB == 2:
        first, second = gl.split(v)
        second = gl.convert_layout(second, L, assert_trivial=True)
        return gl.convert_layout(first, L, assert_trivial=True), second, second, second
    else:
        even, odd = gl.split(gl.reshape(v, [WARPS, 32, 2, 2]))
        v0, v2 = gl.split(even)
        v1, v3 = gl.split(odd)
        return (
            gl.convert_layout(v0, L, assert_trivial=True), gl.convert_layout(v1, L, assert_trivial=True),
            gl.convert_layout(v2, L, assert_trivial=True), gl.convert_layout(v3, L, assert_trivial=True),
        )  # fmt: skip


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
def add_unit(total, stage, xs, ones, zero, SUB: gl.constexpr, ZEROS: gl.constexpr, BF16: gl.constexpr):
    """Return the four sums of a lane plus a unit of a tile times eight tokens, scaled where groups have scales."""
    high, low, pairs, zeros = stage
    if SUB == 0:
        c, d = (zero, zero, zero, zero), (zero, zero, zero, zero)
        for s in gl.static_range(8):
            c = mma(widen(high[s], BF16), xs[2 * s], xs[2 * s + 1], c, BF16)
            d = mma(widen(low[s], BF16), xs[2 * s], xs[2 * s + 1], d, BF16)
        even, odd = 400.0 * ones[0][0], 400.0 * ones[0][1]
        return (
            total[0] + (16.0 * c[0] + d[0] - even), total[1] + (16.0 * c[1] + d[1] - odd),
            total[2] + (16.0 * c[2] + d[2] - even), total[3] + (16.0 * c[3] + d[3] - odd),
        )  # fmt: skip
    else:
        STEPS: gl.constexpr = 8 // SUB
        for g in gl.static_range(SUB):
            c = (zero, zero, zero, zero)
            for s in gl.static_range(g * STEPS, (g + 1) * STEPS):
                c = mma(widen(high[s], BF16), xs[2 * s], xs[2 * s + 1], c, BF16)
            first, second = halves(pairs[g], BF16)
            if ZEROS:
                z_first, z_second = zero_of(zeros[g], False), zero_of(zeros[g], True)
            else:
                z_first, z_second = 24.0, 24.0
            even, odd = ones[g]
            total = (
                total[0] + first * (c[0] - z_first * even), total[1] + first * (c[1] - z_first * odd),
                total[2] + second * (c[2] - z_second * even), total[3] + second * (c[3] - z_second * odd),
            )  # fmt: skip
        return total


@gluon.jit
def stream_product(
    x, norm, factors, weight, tokens, n, tiles, eps, finish: gl.constexpr, extra, WIDTH: gl.constexpr,
    PLANES: gl.constexpr, SUB: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr, U: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Call finish(y, tile, row, token, here, n, extra) with every tile of y = weight @ rms_norm(x).

    SETS is 0 for one token: x [128 UNITS], norm [128 UNITS] or None. It is 1 for up to 8 and 2 for up to 16: x
    [tokens, 128 UNITS], where it is to be normalized with factors [tokens] by `prepare_kernel`. weight = (words, scales, zeros), see `packed`.
    y [64, 2] fp32: y[p, h] belongs to token[p] and row[p, h].
    """
    UNITS: gl.constexpr = (WIDTH + 127) // 128
    CHUNKS: gl.constexpr = (UNITS + U * WARPS - 1) // (U * WARPS)
    GROUPS: gl.constexpr = max(SUB, 1)
    COLUMNS: gl.constexpr = max(SETS, 1)
    BF16: gl.constexpr = x.dtype.element_ty == gl.bfloat16
    ZEROS: gl.constexpr = weight[2] is not None
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SQUARE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
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
        only_sums = gl.allocate_shared_memory(gl.float32, [CHUNKS * U * GROUPS, WARPS, 32], SQUARE)
        row_words = load_row(x, UNITS, CHUNKS * U, WARPS)
        if norm is not None:
            row_words, factor = scaled_row(row_words, gains, eps, WIDTH, BF16)
        for i in gl.static_range(CHUNKS * U):
            only.index(i).store(row_words[i])
        for i in gl.static_range(CHUNKS * U):
            found = group_sums(one_token(only.index(i), WARPS), zero, GROUPS, BF16)
            for g in gl.static_range(GROUPS):
                only_sums.index(i * GROUPS + g).store(found[g][0])
    else:
        ahead = load_chunk(x, tokens, 0, UNITS, SETS, U, WARPS)
    slot = 0
    for tile in range(first, tiles, step):
        totals = ((zero, zero, zero, zero),) * (R * COLUMNS)
        scales = ()
        if SUB == 0:
            for r in gl.static_range(R):
                scales += (gl.load(weight[1] + gl.minimum(tile + r, tiles - 1) * 8 + pair // 8),)
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
                ones = ()
                if SETS == 0:
                    xs += (one_token(only.index(chunk * U + u), WARPS),)
                    sums = ()
                    for g in gl.static_range(GROUPS):
                        one_sum = only_sums.index((chunk * U + u) * GROUPS + g).load(lanes(WARPS))
                        sums += ((one_sum, one_sum),)
                    ones = (sums,)
                else:
                    for b in gl.static_range(SETS):
                        ones += (group_sums(xs[u * SETS + b], zero, GROUPS, BF16),)
                new = ()
                for r in gl.static_range(R):
                    for b in gl.static_range(COLUMNS):
                        new += (
                            add_unit(
                                totals[r * COLUMNS + b], stages[r * U + u], xs[u * COLUMNS + b], ones[b], zero, SUB,
                                ZEROS, BF16,
                            ),
                        )  # fmt: skip
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
                token = pair // 2 % 4 * 2 + pair % 2 + 8 * b
                y = gl.sum(exchange.index(r * COLUMNS + b).load(ADD), axis=0)
                if SUB == 0:
                    low, high = halves(scales[r], BF16)
                    y *= gl.where(half == 0, low[:, None], high[:, None])
                if SETS == 0:
                    y *= factor
                elif factors is not None:
                    y *= gl.load(factors + token, mask=token < tokens, other=0.0)[:, None]
                column = token[:, None]
                finish(y, tile + r, row, column, (row < n) & (column < tokens) & (tile + r < tiles), n, extra)
