"""What one lane does by hand: private copies into shared memory, and the operands of mma.m16n8k32.

Everything here is a tensor [warps, 32] in the layout `lanes`: one register of every lane. What a lane copies it reads
back itself, or leaves to its own warp, so a warp waits for its own copies (`arrive`) and never for another warp.
Triton's own operations on shared memory put a barrier of the whole program around each; these are PTX, which Triton
takes as it is. Gluon is Triton with explicit layouts.

Source: PTX ISA, cp.async, mma.m16n8k32, prmt, dp4a.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MAGIC = gl.constexpr(0x4B400000)
"""1.5 * 2^23 as fp32: with an integer of at most 22 bits added to its bits, it is the float that much larger."""

MMA_K32 = gl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.{}.s8.s32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)
MMA_K16 = gl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.s32.{}.s8.s32 {{$0, $1, $2, $3}}, {{$4, $5}}, {{$6}}, {{$7, $8, $9, $10}};"
)

# Four fp32 times a power of two, rounded to integers n; n + 128, the low half of MAGIC plus that, holds the digits: the
# first one, + 128, and the second.
DIGITS = gl.constexpr("""{ .reg .f32 f; .reg .b32 a, b, c, d, p, q;
    fma.rn.f32 f, $2, $6, 0f4B400080; mov.b32 a, f; fma.rn.f32 f, $3, $6, 0f4B400080; mov.b32 b, f;
    fma.rn.f32 f, $4, $6, 0f4B400080; mov.b32 c, f; fma.rn.f32 f, $5, $6, 0f4B400080; mov.b32 d, f;
    prmt.b32 p, a, b, 0x5140; prmt.b32 q, c, d, 0x5140;
    prmt.b32 $0, p, q, 0x5410; xor.b32 $0, $0, 0x80808080; prmt.b32 $1, p, q, 0x7632; }""")


@gluon.constexpr_function
def lanes(warps):
    """Return the layout of [warps, 32]: one value a lane."""
    return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])


@gluon.constexpr_function
def copy_text(size, lanes, ahead):
    """Return PTX that copies `size` bytes from $2 to $1, 16 a lane and 16 `lanes` at a time; the last by fewer lanes.

    The first are at $2 - ahead. All but the last happen where $3 < $4, the last where $3 < $5.
    """
    step = 16 * lanes
    copy = "@{0} cp.async.cg.shared.global [$1 + {1}], [$2 + {2}], 16, $6;"
    lines = ["setp.lt.s32 p, $3, $4; setp.lt.s32 q, $3, $5;"]
    lines += [
        copy.format("p" if at + step <= size else "q", 32 * at // lanes, at - ahead) for at in range(0, size, step)
    ]
    return "{ .reg .pred p, q; " + " ".join(lines) + " mov.b32 $0, 0; }"


@gluon.jit
def copy(target, source, unit, limits, bytes_a_lane, SIZE: gl.constexpr, LANES: gl.constexpr, AHEAD: gl.constexpr = 0):
    """Start a copy of SIZE bytes by LANES lanes from global to shared memory, if `unit` is below limits[0].

    source and target are a lane's own; the lanes that have a part of the last SIZE % (16 LANES) bytes copy that below
    limits[1]. What 32 lanes copy at a time fills 512 bytes. bytes_a_lane is 16, or 0 to fill with zeros.
    source is AHEAD bytes too far: ptxas computes an address anew for each copy 2 KiB or more away from it.
    """
    gl.inline_asm_elementwise(
        copy_text(SIZE, LANES, AHEAD), "=r,r,l,r,r,r,r", [target, source, unit, limits[0], limits[1], bytes_a_lane],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def statement(TEXT: gl.constexpr):
    """A statement of PTX without operands, in its place among loads, stores and other statements."""
    gl.inline_asm_elementwise(TEXT + " // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_where(here):
    """Wait for the kernel ahead if all lanes are `here`; without a branch, for which compilers copy the code behind."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p griddepcontrol.wait; mov.b32 $0, 0; }", "=r,r", [here.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def commit():
    """End a group of copies; every lane counts its own."""
    statement("cp.async.commit_group;")


@gluon.jit
def arrived(AHEAD: gl.constexpr):
    """Wait until all of the lane's own groups but the newest AHEAD are there."""
    gl.inline_asm_elementwise(
        f"cp.async.wait_group {AHEAD}; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def arrive(AHEAD: gl.constexpr):
    """Wait until all groups but the newest AHEAD have arrived, for all lanes of the warp."""
    arrived(AHEAD)
    warp_barrier()


@gluon.jit
def warp_barrier():
    """Let all lanes of the warp meet."""
    statement("bar.warp.sync 0xffffffff;")


@gluon.jit
def barrier():
    """Let all warps of the program meet."""
    statement("bar.sync 0;")


@gluon.jit
def program_memory(BYTES: gl.constexpr, WARPS: gl.constexpr):
    """Return the program's shared memory and its address; `_keep_alive` of the first stands at the kernel's end.

    The address is that of Triton's symbol for all shared memory, so nothing else of the kernel may need any (a test
    compares sizes). The store makes Triton declare it.
    """
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.int32, [BYTES // (128 * WARPS), WARPS * 32], FLAT)
    memory.index(0).store(gl.zeros([WARPS * 32], gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])))
    return memory, shared_address()


@gluon.jit
def shared_address():
    """Return where Triton's symbol for all of a program's shared memory lies."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def load_four(address, OFFSET: gl.constexpr):
    """Return four words of shared memory from address + OFFSET."""
    return gl.inline_asm_elementwise(
        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {OFFSET}];", "=r,=r,=r,=r,r", [address],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def recast(values, TYPE: gl.constexpr):
    """Return several values of 32 bits as another type of the same bits."""
    result = ()
    for n in gl.static_range(len(values)):
        result += (values[n].to(TYPE, bitcast=True),)
    return result


@gluon.jit
def load_word(address, OFFSET: gl.constexpr, TYPE: gl.constexpr):
    """Return a value of PTX's TYPE, b32 or u8, of shared memory as a word."""
    return gl.inline_asm_elementwise(
        f"ld.shared.{TYPE} $0, [$1 + {OFFSET}];", "=r,r", [address], dtype=gl.uint32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def load_two(address, OFFSET: gl.constexpr):
    """Return two words of shared memory."""
    return gl.inline_asm_elementwise(
        f"ld.shared.v2.b32 {{$0, $1}}, [$2 + {OFFSET}];", "=r,=r,r", [address],
        dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_floats(address, OFFSET: gl.constexpr):
    """Return two fp32 of shared memory."""
    return gl.inline_asm_elementwise(
        f"ld.shared.v2.f32 {{$0, $1}}, [$2 + {OFFSET}];", "=f,=f,r", [address],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_floats(address, first, second, here, OFFSET: gl.constexpr):
    """Store two fp32 in shared memory where `here` says so."""
    gl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.shared.v2.f32 [$1 + {OFFSET}], {{$2, $3}}; mov.b32 $0, 0; }}",
        "=r,r,f,f,r", [address, first, second, here.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_float(address, value, OFFSET: gl.constexpr):
    """Store an fp32 in shared memory."""
    gl.inline_asm_elementwise(
        f"st.shared.f32 [$1 + {OFFSET}], $2; // $0", "=r,r,f", [address, value], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def store_word(address, value, OFFSET: gl.constexpr):
    """Store a word in shared memory."""
    gl.inline_asm_elementwise(
        f"st.shared.b32 [$1 + {OFFSET}], $2; // $0", "=r,r,r", [address, value], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def store_two(address, first, second, OFFSET: gl.constexpr):
    """Store two words in shared memory."""
    gl.inline_asm_elementwise(
        f"st.shared.v2.b32 [$1 + {OFFSET}], {{$2, $3}}; // $0", "=r,r,r,r", [address, first, second], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_global(address, here):
    """Return four words of global memory, past L1 (a kernel that ran before may have left old ones there), or zeros."""
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @p ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4]; }""", "=r,=r,=r,=r,l,r", [address, here.to(gl.int32)],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def mma_text(registers, signed):
    """Return PTX and constraints of a product whose first operand has 4 registers a lane (32 columns) or 2 (16)."""
    text = MMA_K32 if registers == 4 else MMA_K16
    return text.value.format("s8" if signed else "u8"), "=r,=r,=r,=r" + ",r" * (registers // 2 * 3 + 4)


@gluon.jit
def mma(a, b, c, SIGNED: gl.constexpr):
    """Return c + a b in exact integers, [16, 8 len(a)] of signed or unsigned bytes x 8 columns of signed bytes a warp.

    a: words of rows g and g + 8, then of as many columns further on; b: words of the same columns; c: columns 2t and
    2t + 1 of row g, then of row g + 8.
    """
    TEXT: gl.constexpr = mma_text(len(a), SIGNED)
    return gl.inline_asm_elementwise(
        TEXT[0], TEXT[1], a + b + c, dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def digits(four, power):
    """Return two words: the digits -128 .. 127 of 1 and of 256, of four fp32 times a power of two."""
    return gl.inline_asm_elementwise(
        DIGITS, "=r,=r,f,f,f,f,f", [four[0], four[1], four[2], four[3], power], dtype=(gl.uint32, gl.uint32),
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def less_bytes(word, total):
    """Return total minus the four signed bytes of a word."""
    return gl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, 0xffffffff, $2;", "=r,r,r", [word, total], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def signed_half(word, bytes_):
    """Return a signed half of a word, the low one if bytes_ is 0x9910, the high one if it is 0xBB32."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [word, bytes_], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def swapped(value, MASK: gl.constexpr):
    """Return the integer of the lane whose number differs in the bits of MASK."""
    return gl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {MASK}, 0x1f, 0xffffffff;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def reduced(value, HOW: gl.constexpr):
    """Return the max.u32 or add.s32 of all lanes of a warp."""
    return gl.inline_asm_elementwise(
        f"redux.sync.{HOW} $0, $1, 0xffffffff;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def swapped_float(value, MASK: gl.constexpr):
    """Return the fp32 of the lane whose number differs in the bits of MASK."""
    return swapped(value.to(gl.int32, bitcast=True), MASK).to(gl.float32, bitcast=True)


@gluon.jit
def halves(words, BF16: gl.constexpr):
    """Return pairs of 16-bit floats as two fp32."""
    if BF16:
        return (words << 16).to(gl.float32, bitcast=True), (words & 0xFFFF0000).to(gl.float32, bitcast=True)
    low, high = (words & 0xFFFF).to(gl.uint16), (words >> 16).to(gl.uint16)
    return low.to(gl.float16, bitcast=True).to(gl.float32), high.to(gl.float16, bitcast=True).to(gl.float32)
