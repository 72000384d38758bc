"""A warp's own copies: shared memory in which a warp reads back what it copied itself; and products of floats.

Triton's operations on shared memory put a barrier of the whole program around each use, because they know nothing of
who reads what. A warp that copies (`cp.async`) what only its own lanes read needs none: it waits for its own copies,
and warps drift apart as memory serves them. So this is PTX, which Triton takes as it is: volatile, hence kept in its
order. Each 128 bytes of memory, a line, land in one line of shared memory: where they straddle two, copies take longer.
Values are tensors [warps, 32] in the layout `fragments.lanes`, one register of every lane; pairs are two 16-bit floats
in 32 bits. What the stages with integer weights need besides: `fastgen.kernels.fragments`.

Gluon is Triton with explicit layouts. Sources: PTX ISA, cp.async, cp.async.wait_group, ld.shared, mma.m16n8k16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import shared_address

MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)
MMA_BF16, MMA_FP16 = gl.constexpr(MMA.format("bf16")), gl.constexpr(MMA.format("f16"))


@gluon.jit
def ring_memory(LINES: gl.constexpr):
    """Return LINES x 512 bytes of shared memory and their address; a kernel ends with `release` or `_keep_alive`.

    It must be the first that a kernel allocates: the address is that of Triton's symbol for all of a program's shared
    memory (a test looks at where the rest lies). From sm_80 on that is 1024, behind CUDA's own, so lines begin at
    multiples of 128.
    """
    memory = gl.allocate_shared_memory(gl.uint32, [LINES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return memory, shared_address()


@gluon.jit
def release(memory, WARPS: gl.constexpr):
    """Use the ring's memory once more, so that Triton gives it to nobody else before."""
    memory.index(0).store(gl.zeros([128], gl.uint32, gl.BlockedLayout([1], [32], [WARPS], [0])))


@gluon.jit
def place_of(row, piece):
    """Return where piece 0 to 7 of a row's 128 bytes lies in a tile.

    Odd rows have their halves swapped, so that neighbours' equal pieces lie in different banks.
    """
    return row * 128 + (piece ^ row % 2 * 4) * 16


@gluon.jit
def copy_rows(to, source, sizes, STEP: gl.constexpr, AT: gl.constexpr):
    """Start copying a lane's 16 bytes of two rows that lie STEP bytes apart, to AT and 512 bytes behind.

    sizes: 16 or 0 (zeros, nothing read) for either row.
    """
    gl.inline_asm_elementwise(
        f"""cp.async.cg.shared.global.L2::128B [$1+{AT}], [$2], 16, $3;
        cp.async.cg.shared.global.L2::128B [$1+{AT + 512}], [$2+{STEP}], 16, $4; mov.b32 $0, 0;""",
        "=r,r,l,r,r", [to, source, sizes[0], sizes[1]], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def write_four(address, words):
    """Store four words in shared memory."""
    gl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,r,r,r,r,r",
        [address, words[0], words[1], words[2], words[3]], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_words(pointer):
    """Return four words of global memory, in its place behind a wait for the kernel that wrote them."""
    return gl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointer],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=False, pack=1,
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
