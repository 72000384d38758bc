"""What one lane does by hand: private copies into shared memory, and the operands of mma.m16n8k16.

Everything here is a tensor [warps, 32] in the layout `lanes`: one register of every lane. What a lane copies it reads
back itself, or leaves to its own warp, so a warp waits for its own copies (`arrive`) and never for another warp.
Triton's own operations on shared memory put a barrier of the whole program around each; these are PTX, which Triton
takes as it is. Pairs are two 16-bit floats, bf16 or fp16, in 32 bits. Gluon is Triton with explicit layouts.

Sources: conversion of integers in the mantissa, arXiv 2211.10017; PTX ISA, cp.async, mma.m16n8k16, lop3.
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
def copy_text(size, source, target):
    """Return PTX that copies `size` bytes, 16 a lane and 512 a warp at a time, from $2 + source to $1 + target."""
    copy = "cp.async.cg.shared.global [$1 + {0}], [$2 + {1}], 16, $3;"
    lines = [copy.format(target + at, source + at) for at in range(0, size - size % 512, 512)]
    if size % 512:
        at = size - size % 512
        lines.append("setp.ne.b32 p, $4, 0; @p " + copy.format(target + at, source + at))
    return "{ .reg .pred p; " + " ".join(lines) + " mov.b32 $0, 0; }"


@gluon.jit
def copy(target, source, bytes_a_lane, in_tail, SIZE: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr):
    """Start a warp's copy of SIZE bytes, from source + FROM in global to target + TO in shared memory.

    source and target are a lane's own; bytes_a_lane is 16, or 0 to fill with zeros; in_tail says whether the lane has
    a part of the last SIZE % 512 bytes.
    """
    gl.inline_asm_elementwise(
        copy_text(SIZE, FROM, TO), "=r,r,l,r,r", [target, source, bytes_a_lane, in_tail],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def statement(TEXT: gl.constexpr):
    """A statement of PTX without operands, in its place among loads, stores and other statements."""
    gl.inline_asm_elementwise(TEXT + " // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def commit():
    """End a group of copies; every lane counts its own."""
    statement("cp.async.commit_group;")


@gluon.jit
def arrive(AHEAD: gl.constexpr):
    """Wait until all groups but the newest AHEAD have arrived, for all lanes of the warp."""
    gl.inline_asm_elementwise(
        f"cp.async.wait_group {AHEAD}; bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def barrier():
    """Let all warps of the program meet."""
    statement("bar.sync 0;")


@gluon.jit
def shared_memory(BYTES: gl.constexpr, WARPS: gl.constexpr):
    """Return the program's shared memory and its address; `_keep_alive` of the first stands at the kernel's end.

    The address is that of Triton's symbol for all shared memory, so nothing else of the kernel may need any (a test
    compares sizes). The store makes Triton declare it.
    """
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.int32, [BYTES // (128 * WARPS), WARPS * 32], FLAT)
    memory.index(0).store(gl.zeros([WARPS * 32], gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])))
    address = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip
    return memory, address


@gluon.jit
def load_four(address, OFFSET: gl.constexpr):
    """Return four words of shared memory from address + OFFSET."""
    return gl.inline_asm_elementwise(
        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {OFFSET}];", "=r,=r,=r,=r,r", [address],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_word(address, OFFSET: gl.constexpr, TYPE: gl.constexpr):
    """Return a value of PTX's TYPE, b32 or u16, of shared memory as a word."""
    return gl.inline_asm_elementwise(
        f"ld.shared.{TYPE} $0, [$1 + {OFFSET}];", "=r,r", [address], dtype=gl.uint32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def load_floats(address, OFFSET: gl.constexpr):
    """Return two fp32 of shared memory."""
    return gl.inline_asm_elementwise(
        f"ld.shared.v2.f32 {{$0, $1}}, [$2 + {OFFSET}];", "=f,=f,r", [address],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_floats(address, first, second, OFFSET: gl.constexpr):
    """Store two fp32 in shared memory."""
    gl.inline_asm_elementwise(
        f"st.shared.v2.f32 [$1 + {OFFSET}], {{$2, $3}}; // $0", "=r,r,f,f", [address, first, second],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_float(address, value, OFFSET: gl.constexpr):
    """Store an fp32 in shared memory."""
    gl.inline_asm_elementwise(
        f"st.shared.f32 [$1 + {OFFSET}], $2; // $0", "=r,r,f", [address, value], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def store_four(address, words, OFFSET: gl.constexpr):
    """Store four words in shared memory."""
    gl.inline_asm_elementwise(
        f"st.shared.v4.b32 [$1 + {OFFSET}], {{$2, $3, $4, $5}}; // $0", "=r,r,r,r,r,r",
        [address, words[0], words[1], words[2], words[3]],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_global(address, here):
    """Return four words of global memory, past L1 (a kernel that ran before may have left old ones there), or zeros."""
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @p ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4]; }""", "=r,=r,=r,=r,l,r", [address, here.to(gl.int32)],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


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
def halves(words, BF16: gl.constexpr):
    """Return pairs of 16-bit floats as two fp32."""
    if BF16:
        return (words << 16).to(gl.float32, bitcast=True), (words & 0xFFFF0000).to(gl.float32, bitcast=True)
    low, high = (words & 0xFFFF).to(gl.uint16), (words >> 16).to(gl.uint16)
    return low.to(gl.float16, bitcast=True).to(gl.float32), high.to(gl.float16, bitcast=True).to(gl.float32)
