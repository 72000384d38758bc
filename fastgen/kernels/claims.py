"""Rows that programs claim when they are through with their own, so that all of them end at the same time.

A GPU does not serve its multiprocessors alike: on an H200 some read a tenth faster than others, and two programs of one
differ more. Programs that had taken equal shares of a matrix would all wait for the slowest. So some blocks of rows are
left, and thread 0 of a program takes the number of the next one from a counter in global memory, long before its rows
are to be copied; the other threads find it in shared memory behind the next barrier.

Every program claims until it is told a number beyond the blocks, once. The one that is told the last such number knows
that all others are through, and leaves the counter at 0 for the next kernel, which claims nothing before this one ends.

Source: PTX ISA, atom.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FIRST = "{ .reg .pred p, q; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
CLAIM = gl.constexpr(
    FIRST + "setp.ne.s32 q, $2, 0; and.pred p, p, q; mov.b32 $0, 0; @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }"
)
PUBLISH = gl.constexpr(
    FIRST + "@p st.shared.b32 [$1], $2; setp.eq.s32 q, $2, $4; and.pred p, p, q; @p st.global.b32 [$3], 0;"
    " mov.b32 $0, 0; }"
)


@gluon.jit
def claim(counter, wanted):
    """Return in thread 0 the number of the next block, where one is wanted."""
    return gl.inline_asm_elementwise(CLAIM, "=r,l,r", [counter, wanted], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def publish(address, number, counter, last):
    """Store thread 0's number in shared memory; whoever was told the last number sets the counter back."""
    gl.inline_asm_elementwise(
        PUBLISH, "=r,r,r,l,r", [address, number, counter, last], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def published(address):
    """Return the number that `publish` stored, behind a barrier."""
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
