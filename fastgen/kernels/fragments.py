"""Weights and activations as lanes of a warp hold them for mma.m16n8k16: what `packed_product` is made of.

A tensor [WARPS, 32] in the layout `lanes` is one register of every lane; a function that returns several of them
returns what a lane has in several registers. Moving between layouts is free or does not compile (`assert_trivial`).
Pairs are two 16-bit floats, bf16 or fp16, in 32 bits. Gluon is Triton with explicit layouts.

Sources: conversion of integers in the mantissa, arXiv 2211.10017; PTX ISA, mma.m16n8k16, lop3.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)
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
def load_chunk(x, tokens, chunk, UNITS: gl.constexpr, SETS: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr):
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
