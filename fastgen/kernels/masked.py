"""Loads and stores that some lanes skip, in PTX.

A lane that skips a load keeps what it has, so the registers of a tile fill from several places, and nothing waits for a
load before its result is used. All are volatile, hence stay in their order, behind a wait for another kernel too.
Values are tensors [warps, 32] as in `fastgen.kernels.fragments`. Source: PTX ISA, ld, st.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def load_over(words, address, here, OFFSET: gl.constexpr, SHARED: gl.constexpr = False):
    """Return four words of global or shared memory at address + OFFSET where `here` says so, `words` elsewhere."""
    SPACE: gl.constexpr = "shared" if SHARED else "global"
    OPERANDS: gl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,r,r" if SHARED else "=&r,=&r,=&r,=&r,r,r,r,r,l,r"
    return gl.inline_asm_elementwise(
        f"""{{ .reg .pred p; setp.ne.b32 p, $9, 0;
        mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;
        @p ld.{SPACE}.v4.b32 {{$0, $1, $2, $3}}, [$8 + {OFFSET}]; }}""",
        OPERANDS, [words[0], words[1], words[2], words[3], address, here.to(gl.int32)],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_word_over(word, pointer, here, OFFSET: gl.constexpr):
    """Return a word of global memory at pointer + OFFSET bytes where `here` says so, `word` elsewhere."""
    return gl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, $1; @p ld.global.b32 $0, [$2 + {OFFSET}]; }}",
        "=&r,r,l,r", [word, pointer, here.to(gl.int32)], dtype=gl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_pair(pointer, here, OFFSET: gl.constexpr, PAST_L1: gl.constexpr = False):
    """Return two fp32 of global memory from pointer + OFFSET bytes where `here` says so, zeros elsewhere.

    PAST_L1: another layer may have left old ones there.
    """
    LOAD: gl.constexpr = "ld.global.cg" if PAST_L1 else "ld.global"
    return gl.inline_asm_elementwise(
        f"""{{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0;
        @p {LOAD}.v2.f32 {{$0, $1}}, [$2 + {OFFSET}]; }}""", "=&f,=&f,l,r", [pointer, here.to(gl.int32)],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def store_text(count, offset):
    """Return PTX that stores one, two or four words, $3 and behind, at $1 + offset where $2 is not 0."""
    words = ", ".join(f"${3 + n}" for n in range(count))
    kind, words = ("b32", words) if count == 1 else (f"v{count}.b32", f"{{{words}}}")
    return f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.{kind} [$1 + {offset}], {words}; mov.b32 $0, 0; }}"


@gluon.jit
def store_words(pointer, words, here, OFFSET: gl.constexpr):
    """Store one, two or four words in global memory at pointer + OFFSET bytes where `here` says so."""
    operands = (pointer, here.to(gl.int32))
    operands += words
    gl.inline_asm_elementwise(
        store_text(len(words), OFFSET), "=r,l,r" + ",r" * len(words), operands, dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def store_shared(address, word, here, OFFSET: gl.constexpr):
    """Store a word in shared memory at address + OFFSET where `here` says so."""
    gl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1 + {OFFSET}], $2; mov.b32 $0, 0; }}", "=r,r,r,r",
        [address, word, here.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_four_floats(address, four, here, OFFSET: gl.constexpr):
    """Store four fp32 in shared memory where `here` says so."""
    gl.inline_asm_elementwise(
        f"""{{ .reg .pred p; setp.ne.b32 p, $6, 0;
        @p st.shared.v4.f32 [$1 + {OFFSET}], {{$2, $3, $4, $5}}; mov.b32 $0, 0; }}""", "=r,r,f,f,f,f,r",
        [address, four[0], four[1], four[2], four[3], here.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
