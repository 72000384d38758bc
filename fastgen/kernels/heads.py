"""A lane's part of heads in attention: queries, keys and values as operands of mma.m16n8k16.

A warp has 16 positions and up to 8 rows (token, query head). Lane 4g + t holds, in words of two 16-bit floats,

- of the keys of positions g and g + 8, and of the query of row g, eight neighbouring dims at 8t + 32c of either half of
  the head. Sums over dims do not care about their order as long as queries and keys agree, so the 16 bytes that a lane
  loads serve two products.
- of the values of positions 2t, 2t + 1, 2t + 8, 2t + 9 eight neighbouring dims at 8g + 64c: those positions whose
  weights the lane has, since queries x keys is an operand of the next product as it stands. That is values x weights,
  [dims, positions] x [positions, rows], so that no product has more rows of either than there are.

Queries and new keys are normalized and rotated once for all warps and reach them through shared memory. d is a multiple
of 16; chunks c that a half (a head) does not fill are zeros. Everything is a tensor [warps, 32] as in
`fastgen.kernels.fragments`. Sources: PTX ISA, "Matrix Fragments for mma.m16n8k16"; RoPE: arXiv 2104.09864.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import halves, swapped_float
from fastgen.kernels.masked import load_over, load_pair, load_word_over, store_shared, store_words
from fastgen.kernels.ring import mma


@gluon.constexpr_function
def place(s):
    """Return which position, from 2t on, is a lane's s-th."""
    return s % 2 + s // 2 * 8


@gluon.constexpr_function
def head_place(n, d):
    """Return where the n-th of a lane's sixteen bytes lies in a head, in elements from 8t: by halves, then chunks."""
    chunks = (d + 63) // 64
    return n // chunks * (d // 2) + n % chunks * 32


@gluon.constexpr_function
def key_pitch(d):
    """Return the bytes from key to key in shared memory, such that neighbours lie in different banks."""
    return 2 * d + 64


@gluon.constexpr_function
def query_pitch(d):
    """Return the bytes from query to query in shared memory."""
    return 2 * d + 16


@gluon.constexpr_function
def query_bytes(rows, d):
    """Return the bytes of all queries in shared memory."""
    return rows * query_pitch(d)


@gluon.constexpr_function
def heads_lines(rows, tokens, d):
    """Return how many lines of 512 bytes `turn_heads` needs."""
    return (query_bytes(rows, d) + tokens * key_pitch(d) + 511) // 512


@gluon.jit
def pair(low, high, BF16: gl.constexpr):
    """Return two fp32 as a word of two 16-bit floats, rounded."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high],
        dtype=gl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def interleave(a, b, HIGH: gl.constexpr):
    """Return the low or the high halves of two words as one."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;" if HIGH else "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b],
        dtype=gl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def of_row(value, lane):
    """Return the fp32 of another lane."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [value, lane], dtype=gl.float32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def load_keys(words, pointer, high, t, D: gl.constexpr):
    """Return a lane's words of the keys of positions g and g + 8 in the cache, if below `high`, relative to g.

    words: what stays elsewhere, two heads of both halves; pointer: 8t into the key of position g.
    """
    CHUNKS: gl.constexpr = (D + 63) // 64
    result = ()
    for j in gl.static_range(2):
        one = ()
        for n in gl.static_range(2 * CHUNKS):
            here = (high > 8 * j) & (t < (D // 2 - n % CHUNKS * 32) // 8)
            one += (load_over(words[j][n], pointer, here, 2 * (8 * j * D + head_place(n, D))),)
        result += (one,)
    return result


@gluon.jit
def load_queries(address, g, t, R: gl.constexpr, D: gl.constexpr):
    """Return the operands that `turn_heads` left of R queries, two for each chunk."""
    CHUNKS: gl.constexpr = (D + 63) // 64
    zero = (g * 0).to(gl.uint32)
    at = address + gl.minimum(g, R - 1) * query_pitch(D) + 32 * t
    result = ()
    for n in gl.static_range(2 * CHUNKS):
        inside = t < (D // 2 - n // 2 * 32) // 8
        result += (load_over((zero, zero, zero, zero), at, inside, n // 2 * 128 + n % 2 * 16, True),)
    return result


@gluon.jit
def load_new_keys(words, address, low, high, t, D: gl.constexpr):
    """Return a lane's words of the keys of positions g and g + 8 that `turn_heads` left, as `load_keys` does.

    address: where that of position g would lie; low .. high - 1: those that are new, relative to g.
    """
    CHUNKS: gl.constexpr = (D + 63) // 64
    result = ()
    for j in gl.static_range(2):
        one = ()
        for n in gl.static_range(2 * CHUNKS):
            here = (low <= 8 * j) & (high > 8 * j) & (t < (D // 2 - n % CHUNKS * 32) // 8)
            one += (load_over(
                words[j][n], address + 16 * t, here, 8 * j * key_pitch(D) + 2 * head_place(n, D), True
            ),)  # fmt: skip
        result += (one,)
    return result


@gluon.jit
def load_values(words, pointer, low, high, g, STEP: gl.constexpr, D: gl.constexpr):
    """Return a lane's words of the values of positions 2t + 0, 1, 8, 9, if in low .. high - 1, which count from 2t.

    words: what stays elsewhere; pointer: 8g into the value of position 2t.
    """
    CHUNKS: gl.constexpr = (D + 63) // 64
    result = ()
    for s in gl.static_range(4):
        here = (low <= place(s)) & (high > place(s))
        for c in gl.static_range(CHUNKS):
            inside = here & (g < (D - 64 * c) // 8)
            result += (load_over(words[s * CHUNKS + c], pointer, inside, 2 * (place(s) * STEP + 64 * c)),)
    return result


@gluon.jit
def store_keys(keys, pointer, low, high, t, D: gl.constexpr):
    """Store a lane's words of the keys of positions g and g + 8 in low .. high - 1, which count from g."""
    CHUNKS: gl.constexpr = (D + 63) // 64
    for j in gl.static_range(2):
        for n in gl.static_range(2 * CHUNKS):
            here = (low <= 8 * j) & (high > 8 * j) & (t < (D // 2 - n % CHUNKS * 32) // 8)
            store_words(pointer, keys[j][n], here, 2 * (8 * j * D + head_place(n, D)))


@gluon.jit
def store_values(values, pointer, low, high, g, D: gl.constexpr):
    """Store what `load_values` would load from the cache."""
    CHUNKS: gl.constexpr = (D + 63) // 64
    for s in gl.static_range(4):
        here = (low <= place(s)) & (high > place(s))
        for c in gl.static_range(CHUNKS):
            inside = here & (g < (D - 64 * c) // 8)
            store_words(pointer, values[s * CHUNKS + c], inside, 2 * (place(s) * D + 64 * c))


@gluon.jit
def load_heads(
    warp, lane, rows, tokens, source, key, turns, norms, live, G: gl.constexpr, N: gl.constexpr, STRIDE: gl.constexpr,
    D: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Return what `turn_heads` needs of R queries and N new keys, a head a warp.

    rows: (R, the first query's row, the last row that there is); tokens: how many there are; source: the first query
    of token 0, whose tokens are STRIDE apart; key: how many elements behind it its key lies; turns: rotations; norms:
    gains of queries and keys, or None; `live`: whether heads are read, which are 0 otherwise.
    """
    R: gl.constexpr = rows[0]
    PIECES: gl.constexpr = (D + 127) // 128
    none = (lane * 0).to(gl.uint32)
    result = ()
    for m in gl.static_range((R + N + WARPS - 1) // WARPS):
        n = warp + WARPS * m
        row = gl.minimum(rows[1] + n, rows[2])
        query = n < R
        token = gl.where(query, row // G, gl.minimum(n - R, tokens - 1))
        head = source + token * STRIDE + gl.where(query, row % G * D, key)
        for i in gl.static_range(PIECES):
            dim = 2 * (lane + 32 * i)
            inside = dim < D // 2
            first = load_word_over(none, head + dim, inside & live, 0)
            second = load_word_over(none, head + dim, inside & live, D)
            cosines = load_pair(turns + token * D + dim, inside, 0)
            sines = load_pair(turns + token * D + dim, inside, 2 * D)
            gain, next_gain = none, none
            if norms[0] is not None:
                gain = load_word_over(none, norms[0] + dim, inside & query, 0)
                gain = load_word_over(gain, norms[1] + dim, inside & (n >= R), 0)
                next_gain = load_word_over(none, norms[0] + dim, inside & query, D)
                next_gain = load_word_over(next_gain, norms[1] + dim, inside & (n >= R), D)
            result += ((first, second, cosines, sines, gain, next_gain),)
    return result


@gluon.jit
def turn_heads(
    heads, address, warp, lane, eps, R: gl.constexpr, N: gl.constexpr, NORM: gl.constexpr, D: gl.constexpr,
    BF16: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Leave R queries and N new keys, normalized and rotated, in shared memory, a barrier behind it.

    They are rounded where the reference rounds. Keys lie there as in memory. Queries lie as operands: word by word
    the two halves of a head.
    """
    PIECES: gl.constexpr = (D + 127) // 128
    for m in gl.static_range(len(heads) // PIECES):
        n = warp + WARPS * m
        factor = lane * 0.0
        if NORM:
            for i in gl.static_range(2 * PIECES):
                low, high = halves(heads[PIECES * m + i // 2][i % 2], BF16)
                factor = gl.fma(high, high, gl.fma(low, low, factor))
            for i in gl.static_range(5):
                factor += swapped_float(factor, 1 << i)
            factor = gl.rsqrt(factor / D + eps)
        for i in gl.static_range(PIECES):
            a, b, cosines, sines, gain, next_gain = heads[PIECES * m + i]
            if NORM:
                a, b = normalized(a, factor, gain, BF16), normalized(b, factor, next_gain, BF16)
            a, b = turned(a, b, cosines, sines, BF16)
            word = lane + 32 * i
            here = (word < D // 4) & (n < R + N)
            at = address + query_bytes(R, D) + (n - R) * key_pitch(D) + 4 * word
            query = address + n * query_pitch(D) + 8 * word
            store_shared(gl.where(n < R, query, at), a, here, 0)
            store_shared(gl.where(n < R, query + 4, at + D), b, here, 0)


@gluon.jit
def normalized(word, factor, gain, BF16: gl.constexpr):
    """Return two values times a factor and their gains, rounded."""
    low, high = halves(word, BF16)
    near, far = halves(gain, BF16)
    return pair(low * factor * near, high * factor * far, BF16)


@gluon.jit
def turned(a, b, cos, sin, BF16: gl.constexpr):
    """Return two pairs of dims (j, j + d / 2) rotated and rounded."""
    low, high = halves(a, BF16)
    far_low, far_high = halves(b, BF16)
    return (
        pair(gl.fma(low, cos[0], -(far_low * sin[0])), gl.fma(high, cos[1], -(far_high * sin[1])), BF16),
        pair(gl.fma(far_low, cos[0], low * sin[0]), gl.fma(far_high, cos[1], high * sin[1]), BF16),
    )


@gluon.jit
def products(queries, keys, BF16: gl.constexpr):
    """Return row g x positions 2t, 2t + 1, 2t + 8, 2t + 9.

    queries: see `load_queries`. The halves of a head have a sum each, and are rows of one operand: of its product with
    either half of the keys, the other eight rows are of no use.
    """
    zero = gl.zeros_like(keys[0][0][0]).to(gl.float32)
    HALF: gl.constexpr = len(queries) // 2
    result = ()
    for j in gl.static_range(2):
        near, far = (zero, zero, zero, zero), (zero, zero, zero, zero)
        for n in gl.static_range(2 * HALF):
            k, m = keys[j][n // 2], keys[j][HALF + n // 2]
            near = mma(queries[n], k[n % 2 * 2], k[n % 2 * 2 + 1], near, BF16)
            far = mma(queries[n], m[n % 2 * 2], m[n % 2 * 2 + 1], far, BF16)
        result += (near[0] + far[2], near[1] + far[3])
    return result


@gluon.jit
def add_values(sums, weights, values, BF16: gl.constexpr):
    """Return sums plus values x weights.

    weights: a word for either eight positions, of row g. sums: element 4c + i has dims 8g + 64c + 2i of rows 2t and
    2t + 1, then the next dim of both.
    """
    CHUNKS: gl.constexpr = len(values) // 4
    result = ()
    for n in gl.static_range(4 * CHUNKS):
        near, next_near = values[n // 4][n % 4], values[CHUNKS + n // 4][n % 4]
        far, next_far = values[2 * CHUNKS + n // 4][n % 4], values[3 * CHUNKS + n // 4][n % 4]
        a = (
            interleave(near, next_near, False), interleave(near, next_near, True),
            interleave(far, next_far, False), interleave(far, next_far, True),
        )  # fmt: skip
        result += (mma(a, weights[0], weights[1], sums[n], BF16),)
    return result
