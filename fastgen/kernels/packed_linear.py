"""The stages whose linear has int4 or int8 weights, for up to 16 tokens in one launch each; more than four tokens, or
wide ones (`choose`), take one more, which prepares them, and widths that 128 does not divide are padded before.

`packed_linear` is norm_linear, linear_add and head: y = W rms_norm(x) + b + r, each part optional. `packed_swiglu` is
norm_swiglu and `packed_greedy_head` the head with its argmax. How: `fastgen.kernels.packed_product`; what `words` and
`scales` hold: `fastgen.kernels.packed`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import launch
from fastgen.kernels.fixed_point import WARPS, digit_bytes, prepare_kernel, preparing_warps
from fastgen.kernels.head import pick_token_kernel
from fastgen.kernels.packed import TILE, UNIT, Form, form_of
from fastgen.kernels.packed_product import fixed_bytes, slot_bytes, stream_packed

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class Shape(NamedTuple):
    """Launch shape of `packed_product.stream_packed`.

    Attributes:
        tiles: tiles of 16 rows in a slot of the ring.
        memory: shared memory that a program takes, in KiB; what x and the sums leave is the ring's. Where x of several
            tokens is kept, it is all there is.
        per_processor: programs on each multiprocessor.
        registers: a thread may take.
    """

    tiles: int
    memory: int
    per_processor: int
    registers: int


class Choice(NamedTuple):
    """How a product is launched: sets of eight tokens, 0 in the form of one token, and the slots of the ring.

    Attributes:
        early: slots that are asked for before the wait.
        kept: whether x stays in shared memory.
        staged: whether every program makes x's digits, else a launch before it does.
    """

    sets: int
    shape: Shape
    slots: int
    early: int
    kept: bool
    staged: bool


SHAPES = {
    4: (Shape(2, 160, 1, 128), Shape(2, 190, 1, 128), Shape(2, 190, 1, 168)),
    8: (Shape(2, 200, 1, 128), Shape(2, 220, 1, 128), Shape(2, 220, 1, 128)),
}
"""By bits, for one token, for up to 8 and up to 16; from sweeps on an H200."""

BEFORE_WAIT = 32 << 10
"""Bytes of weights that a program asks for before it waits, about; the rest, behind x, shall not delay that."""

EARLY_SHARE = 1 / 4
"""The same where `prepare_kernel` runs meanwhile, as a share of the program's weights. Copies in flight delay that
kernel, and those that begin later are waited for: at 8 tokens of a 7B model in int4 on an H200, wo, 62 KiB a program,
took 5.7 us with the whole ring and 4.9 us with one slot of it, gate/up, 333 KiB, 14.4 and 16.1 us."""

MOST_STAGED, NARROW = 4, 2048
"""Tokens whose digits every program makes, and up to which K half as many: for more, `prepare_kernel` is faster."""


@torch.library.custom_op("fastgen::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, n: int, wide: bool,
) -> Tensor:  # fmt: skip
    """Return [.., n], in fp32 if `wide`, else in x's dtype, for x [.., K], norm [K], bias [n], residual [.., n]."""
    out = torch.empty(*x.shape[:-1], n, dtype=torch.float32 if wide else x.dtype, device=x.device)
    residual = None if residual is None else residual.contiguous()
    launch_packed(packed_linear_kernel, x, norm, eps, words, scales, n, bias=bias, residual=residual, out=out)
    return out


@packed_linear.register_fake
def _(
    x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, n: int, wide: bool,
) -> Tensor:  # fmt: skip
    return torch.empty(*x.shape[:-1], n, dtype=torch.float32 if wide else x.dtype, device=x.device)


@torch.library.custom_op("fastgen::packed_swiglu", mutates_args=())
def packed_swiglu(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, bias: Tensor | None, n: int
) -> Tensor:
    """Return silu(gate) * up [.., n / 2] for x [.., K], norm [K], bias [n]; n is a multiple of 16."""
    assert n % TILE == 0, "gate and up rows meet in a tile"
    out = x.new_empty(*x.shape[:-1], n // 2)
    launch_packed(packed_swiglu_kernel, x, norm, eps, words, scales, n, bias=bias, out=out)
    return out


@packed_swiglu.register_fake
def _(x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n // 2)


@torch.library.custom_op("fastgen::packed_greedy_head", mutates_args=())
def packed_greedy_head(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, bias: Tensor | None, n: int
) -> Tensor:
    """Return the tokens [..] int64 of the largest of n logits for x [.., K]; -1 where there is none."""
    tokens, tiles = x.numel() // x.shape[-1], words.shape[0]
    best = torch.empty(tokens, tiles, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, tiles, dtype=torch.int32, device=x.device)
    out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    launch_packed(packed_best_kernel, x, norm, eps, words, scales, n, bias=bias, best=best, ids=ids)
    options = launch.dependent_launch(x.device)
    pick_token_kernel[(tokens,)](best, ids, out, tiles, WIDTH=1024, PDL=bool(options), num_warps=4, **options)
    return out


@packed_greedy_head.register_fake
def _(x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)


def launch_packed(
    kernel: Any, x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scales: Tensor, n: int,
    *, bias: Tensor | None, more: Mapping[str, Any] = MappingProxyType({}), **of_tokens: Tensor | None,
) -> None:  # fmt: skip
    """Launch a kernel of `stream_packed`, and before it what prepares tokens that are many or wide.

    `of_tokens` have a row a token; a kernel that gets `more` is launched where `is_one_launch` alone.
    """
    width, form = x.shape[-1], form_of(words, scales)
    tiles, units = words.shape[:2]
    tokens, processors = x.numel() // width, launch.processors(x.device)
    x = x.reshape(tokens, width).contiguous()
    sets, shape, slots, early, kept, staged = _chosen(x, words, scales)
    if slots < 2 and sets == 2:  # on a GPU of little shared memory
        assert not more, "who has more to give has asked `is_one_launch`"
        for part in (slice(0, 8), slice(8, tokens)):
            parts: dict[str, Any] = {
                name: None if all_ is None else all_.view(tokens, -1)[part] for name, all_ in of_tokens.items()
            }
            launch_packed(kernel, x[part], norm, eps, words, scales, n, bias=bias, **parts)
        return
    if width % UNIT:  # the norm first: kernels read it before they wait for the one ahead, which pads x
        norm = None if norm is None else F.pad(norm, (0, units * UNIT - width))
        x = F.pad(x, (0, units * UNIT - width))
    options = launch.dependent_launch(x.device)
    given, factors = x, None
    if not staged:
        size = digit_bytes(form.groups, sets) // 4
        given = torch.empty(units * size, dtype=torch.int32, device=x.device)
        factors = torch.empty(2, 8 * sets, WARPS.value, dtype=torch.float32, device=x.device)
        prepare_kernel[(tokens, WARPS.value, 1 if norm is None else 2)](
            x, norm, given, factors, 1 if options else 0, WIDTH=width, GROUPS=form.groups, SETS=sets,
            PDL=bool(options), num_warps=preparing_warps(width), **options,
        )  # fmt: skip
    grid = (min(tiles, shape.per_processor * processors),)
    kernel[grid](
        given, norm, factors, words, scales, tokens, n, tiles, 4 * words.shape[2], eps, bias=bias, **more,
        **of_tokens, WIDTH=width, PLANES=form.planes, GROUPS=form.groups, ZEROS=form.zeros, SETS=sets, R=shape.tiles,
        STAGES=slots, EARLY=early, KEPT=kept, DTYPE=DTYPES[x.dtype], PDL=bool(options), num_warps=WARPS.value,
        maxnreg=shape.registers, **options,
    )  # fmt: skip


def is_one_launch(x: Tensor, words: Tensor, scales: Tensor) -> bool:
    """Whether weights and all tokens of x are multiplied in one launch, not two on a GPU of little shared memory."""
    chosen = _chosen(x, words, scales)
    return chosen.slots >= 2 or chosen.sets < 2


def _chosen(x: Tensor, words: Tensor, scales: Tensor) -> Choice:
    width, processors = x.shape[-1], launch.processors(x.device)
    form, memory = form_of(words, scales), launch.shared_memory(x.device)
    return choose(form, width, x.numel() // width, memory, words.shape[0] / processors)


def choose(form: Form, width: int, tokens: int, memory: int, tiles_each: float) -> Choice:
    """Return how to multiply `tokens` tokens; one whose x leaves no room for a ring is read as several are.

    Args:
        memory: shared memory of a program, in KiB.
        tiles_each: tiles of a multiprocessor.
    """
    alone, *several = SHAPES[4 * form.planes]
    slots = _ring_slots(form, width, 0, alone, memory, kept=True, staged=True)
    if tokens == 1 and slots >= 3:
        return Choice(0, alone, slots, _before_wait(form, 0, alone, slots), kept=True, staged=True)
    sets = triton.cdiv(tokens, 8)
    shape = several[sets - 1]._replace(memory=memory)
    slots = _ring_slots(form, width, sets, shape, memory, kept=True, staged=True)
    most = MOST_STAGED if width > NARROW else MOST_STAGED // 2
    if 1 < tokens <= most and slots >= 3:
        return Choice(sets, shape, slots, _before_wait(form, sets, shape, slots), kept=True, staged=True)
    return _of_prepared(form, width, sets, several[sets - 1], memory, tiles_each)


def _of_prepared(form: Form, width: int, sets: int, shape: Shape, memory: int, tiles_each: float) -> Choice:
    """Return how to multiply tokens that `prepare_kernel` prepares.

    x of more than eight is kept where a program would read it more than twice: through the ring it takes as much of
    what L2 gives as int8 weights, and twice as much as int4's (for fewer tokens, and with fewer slots, it was no faster
    on an H200).
    """
    while shape.tiles > 1 and _ring_slots(form, width, sets, shape, memory, kept=False) < 2:
        shape = shape._replace(tiles=shape.tiles // 2)
    slots = _ring_slots(form, width, sets, shape._replace(memory=memory), memory, kept=True)
    kept = sets == 2 and tiles_each > 2 * shape.tiles and slots >= 3
    if not kept:
        slots = _ring_slots(form, width, sets, shape, memory, kept=False)
    units = triton.cdiv(width, UNIT)
    early = max(1, min(slots - 1, round(EARLY_SHARE * tiles_each * units / (WARPS.value * shape.tiles))))
    if kept:  # `stream_packed` puts a turn's x and weights into one group of copies
        early = min(early, triton.cdiv(units, WARPS.value))
    return Choice(sets, shape, slots, early, kept=kept, staged=False)


def _before_wait(form: Form, sets: int, shape: Shape, slots: int) -> int:
    """Return how many slots of the ring, of which one stays free, hold `BEFORE_WAIT`; x is kept."""
    slot = WARPS.value * slot_bytes(*form, sets, shape.tiles, kept=True)
    return min(slots - 1, max(1, round(BEFORE_WAIT / slot)))


def _ring_slots(
    form: Form, width: int, sets: int, shape: Shape, memory: int, *, kept: bool, staged: bool = False
) -> int:  # fmt: skip
    left = min(shape.memory, memory) * 1024 - fixed_bytes(width, form.groups, sets, shape.tiles, kept, staged)
    return int(left // (WARPS.value * slot_bytes(*form, sets, shape.tiles, kept)))


@gluon.jit
def packed_linear_kernel(
    x, norm, factors, words, scales, tokens, n, tiles, record, eps, bias, residual, out, WIDTH: gl.constexpr,
    PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr, KEPT: gl.constexpr, DTYPE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """bias [n] or None, residual [tokens, n] or None, out [tokens, n]; the rest as `stream_packed` has it."""
    stream_packed(
        x, norm, factors, words, scales, tokens, n, tiles, record, eps, _load_residual, _store, (out, bias, residual),
        WIDTH, PLANES, GROUPS, ZEROS, SETS, R, STAGES, EARLY, KEPT, DTYPE, PDL,
    )  # fmt: skip


@gluon.jit
def packed_swiglu_kernel(
    x, norm, factors, words, scales, tokens, n, tiles, record, eps, bias, out, WIDTH: gl.constexpr,
    PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr, KEPT: gl.constexpr, DTYPE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """bias [n] or None, out [tokens, n / 2]; the rest as `stream_packed` has it."""
    stream_packed(
        x, norm, factors, words, scales, tokens, n, tiles, record, eps, _nothing, _gate_and_store, (out, bias),
        WIDTH, PLANES, GROUPS, ZEROS, SETS, R, STAGES, EARLY, KEPT, DTYPE, PDL,
    )  # fmt: skip


@gluon.jit
def packed_best_kernel(
    x, norm, factors, words, scales, tokens, n, tiles, record, eps, bias, best, ids, WIDTH: gl.constexpr,
    PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr, KEPT: gl.constexpr, DTYPE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """bias [n] or None, best and ids [tokens, tiles]; the rest as `stream_packed` has it."""
    stream_packed(
        x, norm, factors, words, scales, tokens, n, tiles, record, eps, _nothing, _store_best, (best, ids, bias),
        WIDTH, PLANES, GROUPS, ZEROS, SETS, R, STAGES, EARLY, KEPT, DTYPE, PDL,
    )  # fmt: skip


@gluon.jit
def _nothing(row, token, here, n, tiles, extra):
    """Load nothing before the sums are made."""
    return 0.0, 0.0


@gluon.jit
def _load_residual(row, token, here, n, tiles, extra):
    """Return the residual of both rows, if there is one."""
    residual = extra[2]
    if residual is not None:
        return _both(residual + token.to(gl.int64) * n, row, here, n, tiles)
    else:
        return 0.0, 0.0


@gluon.jit
def _both(values, row, here, n, tiles):
    """Load the values of row and of row + 8 tiles as fp32."""
    other = row + 8 * tiles
    return (
        gl.load(values + row, mask=here & (row < n), other=0.0).to(gl.float32),
        gl.load(values + other, mask=here & (other < n), other=0.0).to(gl.float32),
    )


@gluon.jit
def biased_rows(first, second, row, here, n, tiles, bias):
    """Return y plus the bias, if there is one."""
    if bias is not None:
        low, high = _both(bias, row, here, n, tiles)
        return first + low, second + high
    else:
        return first, second


@gluon.jit
def _store(first, second, early, tile, row, token, here, n, tiles, extra):
    """Store y plus bias and residual."""
    out, bias, residual = extra
    first, second = biased_rows(first, second, row, here, n, tiles, bias)
    if residual is not None:
        first, second = first + early[0], second + early[1]
    at, other = out + token.to(gl.int64) * n, row + 8 * tiles
    gl.store(at + row, first.to(out.dtype.element_ty), mask=here & (row < n))
    gl.store(at + other, second.to(out.dtype.element_ty), mask=here & (other < n))


@gluon.jit
def _gate_and_store(first, second, early, tile, row, token, here, n, tiles, extra):
    """Store silu(gate) * up; gate rows are in the first half, up rows in the second."""
    out, bias = extra
    gate, up = biased_rows(first, second, row, here, n, tiles, bias)
    at = out + token.to(gl.int64) * (n // 2) + row
    gl.store(at, (gate / (1.0 + gl.exp(-gate)) * up).to(out.dtype.element_ty), mask=here)


@gluon.jit
def _store_best(first, second, early, tile, row, token, here, n, tiles, extra):
    """Store the largest value of a tile and its row for each token; NaN counts as +inf."""
    best, ids, bias = extra
    first, second = biased_rows(first, second, row, here, n, tiles, bias)
    other = row + 8 * tiles
    first, second = _comparable(first, row < n), _comparable(second, other < n)
    row = gl.where(second > first, other, row)  # the lower one of two that are equal
    TILES: gl.constexpr = first.shape[0] // 8
    y = gl.reshape(gl.maximum(first, second), [TILES, 8])
    top = gl.max(y, axis=1)
    winner = gl.min(gl.where(y == top[:, None], gl.reshape(row, [TILES, 8]), 0x7FFFFFFF), axis=1)
    at = gl.max(gl.reshape(gl.where(here, token * tiles + tile, -1), [TILES, 8]), axis=1)
    gl.store(best + at, top, mask=at >= 0)
    gl.store(ids + at, winner, mask=at >= 0)


@gluon.jit
def _comparable(y, there):
    y = gl.where(y != y, float("inf"), y)  # noqa: PLR0124
    return gl.where(there, y, float("-inf"))
