"""The stages whose linear has int4 or int8 weights, for up to 16 tokens in one launch each; RMSNorm of several is one
more.

`packed_linear` is norm_linear, linear_add and head: y = W rms_norm(x) + b + r, each part optional. `packed_swiglu` is
norm_swiglu and `packed_greedy_head` the head with its argmax. How: `fastgen.kernels.packed_product`; what `words`,
`scales` and `zeros` hold: `fastgen.kernels.packed`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import launch
from fastgen.kernels.head import pick_token_kernel
from fastgen.kernels.packed import TILE, UNIT
from fastgen.kernels.packed_product import prepare_kernel, stream_product

WARPS = 8
"""Warps that share a row; they are the order of every sum along K."""

REGISTERS = 1 << 16
"""Of a multiprocessor, from sm_80 on."""

SHARED_BYTES = 96 << 10
"""What one token's x may take of shared memory, beside 60 KB for the weights; what is longer is read as
several tokens are."""


class Shape(NamedTuple):
    """Launch shape of `packed_product.stream_product`.

    Attributes:
        tiles, units: tiles of 16 rows, and units of 128 columns a warp, in a stage of the ring.
        stages: depth of the ring.
        per_processor: programs on each multiprocessor.
    """

    tiles: int
    units: int
    stages: int
    per_processor: int


SHAPES = {4: (Shape(1, 2, 3, 3), Shape(2, 1, 3, 2)), 8: (Shape(1, 1, 4, 2), Shape(2, 1, 3, 1))}
"""By bits, for one token and for several; from sweeps on an H200."""


@torch.library.custom_op("fastgen::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scales: Tensor, zeros: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, n: int, wide: bool,
) -> Tensor:  # fmt: skip
    """Return [.., n], in fp32 if `wide`, else in x's dtype, for x [.., K], norm [K], bias [n], residual [.., n]."""
    out = torch.empty(*x.shape[:-1], n, dtype=torch.float32 if wide else x.dtype, device=x.device)
    residual = None if residual is None else residual.contiguous()
    _launch(packed_linear_kernel, x, norm, eps, words, scales, zeros, n, bias=bias, residual=residual, out=out)
    return out


@packed_linear.register_fake
def _(
    x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scales: Tensor, zeros: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, n: int, wide: bool,
) -> Tensor:  # fmt: skip
    return torch.empty(*x.shape[:-1], n, dtype=torch.float32 if wide else x.dtype, device=x.device)


@torch.library.custom_op("fastgen::packed_swiglu", mutates_args=())
def packed_swiglu(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    n: int,
) -> Tensor:  # fmt: skip
    """Return silu(gate) * up [.., n / 2] for x [.., K], norm [K], bias [n]; n is a multiple of 16."""
    assert n % TILE == 0, "gate and up rows meet in a tile"
    out = x.new_empty(*x.shape[:-1], n // 2)
    _launch(packed_swiglu_kernel, x, norm, eps, words, scales, zeros, n, bias=bias, out=out)
    return out


@packed_swiglu.register_fake
def _(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    n: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], n // 2)


@torch.library.custom_op("fastgen::packed_greedy_head", mutates_args=())
def packed_greedy_head(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    n: int,
) -> Tensor:  # fmt: skip
    """Return the tokens [..] int64 of the largest of n logits for x [.., K]; -1 where there is none."""
    tokens, tiles = x.numel() // x.shape[-1], words.shape[0]
    best = torch.empty(tokens, tiles, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, tiles, dtype=torch.int32, device=x.device)
    out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    _launch(packed_best_kernel, x, norm, eps, words, scales, zeros, n, bias=bias, best=best, ids=ids)
    options = launch.dependent_launch(x.device)
    pick_token_kernel[(tokens,)](best, ids, out, tiles, WIDTH=1024, PDL=bool(options), num_warps=4, **options)
    return out


@packed_greedy_head.register_fake
def _(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    n: int,
) -> Tensor:  # fmt: skip
    return torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)


def _launch(
    kernel: Any, x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scales: Tensor, zeros: Tensor | None,
    n: int, **tensors: Tensor | None,
) -> None:  # fmt: skip
    """Run one of the kernels below; `tensors` are its own arguments."""
    width, (tiles, units, planes) = x.shape[-1], words.shape[:3]
    tokens, groups = x.numel() // width, 0 if planes == 2 else scales.shape[2]
    x = x.reshape(tokens, width)
    if width % UNIT:
        x = F.pad(x, (0, units * UNIT - width))
        norm = None if norm is None else F.pad(norm, (0, units * UNIT - width))
    options = launch.dependent_launch(x.device)
    alone = tokens == 1 and 2 * units * UNIT <= SHARED_BYTES
    factors = None
    if norm is not None and not alone:
        scaled, factors = torch.empty_like(x), torch.empty(tokens, dtype=torch.float32, device=x.device)
        prepare_kernel[(tokens,)](
            x, norm, scaled, factors, eps, WIDTH=width, WARPS=WARPS, PDL=bool(options), num_warps=WARPS, **options
        )
        x, norm = scaled, None
    shape = SHAPES[4 * planes][0 if alone else 1]
    registers = {"maxnreg": REGISTERS // (32 * WARPS * shape.per_processor) // 8 * 8} if alone else {}
    grid = (min(triton.cdiv(tiles, shape.tiles), shape.per_processor * launch.processors(x.device)),)
    kernel[grid](
        x.contiguous(), norm, factors, _unsigned(words), _unsigned(scales), None if zeros is None else _unsigned(zeros),
        tokens, n, tiles, eps, **tensors, WIDTH=width, PLANES=planes, SUB=groups,
        SETS=0 if alone else triton.cdiv(tokens, 8), R=shape.tiles, U=shape.units, STAGES=shape.stages, WARPS=WARPS,
        PDL=bool(options), num_warps=WARPS, **options, **registers,
    )  # fmt: skip


def _unsigned(words: Tensor) -> Tensor:
    return words.view(torch.uint32)


@gluon.jit
def packed_linear_kernel(
    x, norm, factors, words, scales, zeros, tokens, n, tiles, eps, bias, residual, out, WIDTH: gl.constexpr,
    PLANES: gl.constexpr, SUB: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr, U: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """bias [n] or None, residual [tokens, n] or None, out [tokens, n]; the rest as `stream_product` has it."""
    stream_product(
        x, norm, factors, (words, scales, zeros), tokens, n, tiles, eps, _load_residual, _store,
        (out, bias, residual), WIDTH, PLANES, SUB, SETS, R, U, STAGES, WARPS, PDL,
    )  # fmt: skip


@gluon.jit
def packed_swiglu_kernel(
    x, norm, factors, words, scales, zeros, tokens, n, tiles, eps, bias, out, WIDTH: gl.constexpr,
    PLANES: gl.constexpr, SUB: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr, U: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """bias [n] or None, out [tokens, n / 2]; the rest as `stream_product` has it."""
    stream_product(
        x, norm, factors, (words, scales, zeros), tokens, n, tiles, eps, _nothing, _gate_and_store, (out, bias),
        WIDTH, PLANES, SUB, SETS, R, U, STAGES, WARPS, PDL,
    )  # fmt: skip


@gluon.jit
def packed_best_kernel(
    x, norm, factors, words, scales, zeros, tokens, n, tiles, eps, bias, best, ids, WIDTH: gl.constexpr,
    PLANES: gl.constexpr, SUB: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr, U: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """bias [n] or None, best and ids [tokens, tiles]; the rest as `stream_product` has it."""
    stream_product(
        x, norm, factors, (words, scales, zeros), tokens, n, tiles, eps, _nothing, _store_best,
        (best, ids, bias, tokens, tiles), WIDTH, PLANES, SUB, SETS, R, U, STAGES, WARPS, PDL,
    )  # fmt: skip


@gluon.jit
def _biased(y, row, here, bias):
    if bias is not None:
        y += gl.load(bias + row, mask=here, other=0.0).to(gl.float32)
    return y


@gluon.jit
def _nothing(row, token, here, n, extra):
    """Load nothing before the sums are made."""
    return 0.0


@gluon.jit
def _load_residual(row, token, here, n, extra):
    """Return the residual [64, 2] fp32, if there is one."""
    residual = extra[2]
    if residual is not None:
        return gl.load(residual + token.to(gl.int64) * n + row, mask=here, other=0.0).to(gl.float32)
    else:
        return 0.0


@gluon.jit
def _store(y, early, tile, row, token, here, n, extra):
    """Store y [64, 2] plus bias and residual."""
    out, bias, residual = extra
    y = _biased(y, row, here, bias)
    if residual is not None:
        y += early
    gl.store(out + token.to(gl.int64) * n + row, y.to(out.dtype.element_ty), mask=here)


@gluon.jit
def _gate_and_store(y, early, tile, row, token, here, n, extra):
    """Store silu(gate) * up of y [64, 2], gate rows in the first half, up rows in the second."""
    out, bias = extra
    gate, up = gl.split(_biased(y, row, here, bias))
    at, _ = gl.split(token.to(gl.int64) * (n // 2) + row)
    here, _ = gl.split(here)
    gl.store(out + at, (gate / (1.0 + gl.exp(-gate)) * up).to(out.dtype.element_ty), mask=here)


@gluon.jit
def _store_best(y, early, tile, row, token, here, n, extra):
    """Store the largest of y [64, 2] and its row for each of the tile's eight tokens; NaN counts as +inf."""
    best, ids, bias, tokens, tiles = extra
    y = _biased(y, row, here, bias)
    y = gl.where(y != y, float("inf"), y)  # noqa: PLR0124
    y = gl.reshape(gl.where(row < n, y, float("-inf")), [8, 8, 2])
    rows = gl.reshape(row, [8, 8, 2])
    top = gl.max(gl.max(y, axis=2), axis=0)
    spread = gl.convert_layout(top, gl.SliceLayout(0, gl.SliceLayout(2, y.type.layout)))[None, :, None]
    winner = gl.min(gl.min(gl.where(y == spread, rows, 0x7FFFFFFF), axis=2), axis=0)
    column = gl.max(gl.max(gl.reshape(token + row * 0, [8, 8, 2]), axis=2), axis=0)
    there = (column < tokens) & (tile < tiles)
    gl.store(best + column * tiles + tile, top, mask=there)
    gl.store(ids + column * tiles + tile, winner, mask=there)
