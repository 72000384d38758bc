"""residual + the sum of the ranks' linear(x), for up to 16 tokens: `linear_add` where each rank has a part of K.

The product sends every row to all ranks as soon as it is through with it, from its own epilogue; a second kernel waits
for the others' rows and adds them up, see `fastgen.kernels.exchange`. So numbers travel while the product goes on, and
no program holds its shared memory until they have come. How the products work: `fastgen.kernels.product`, and for int4
and int8 weights `fastgen.kernels.packed_product`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import launch
from fastgen.kernels.exchange import Exchange, exchange
from fastgen.kernels.packed_linear import biased_rows, is_one_launch, launch_packed, packed_linear
from fastgen.kernels.packed_product import stream_packed
from fastgen.kernels.post import addresses, coming_call, post
from fastgen.kernels.product import biased, stream_product


@torch.library.custom_op("fastgen::linear_sum_add", mutates_args=())
def linear_sum_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Return [.., N] for this rank's x [.., K], weight [N, K], bias [N], and the residual [.., N] that all have.

    x, weight and bias are all fp16 or all bf16; the result has the residual's dtype. All ranks of `exchange` call it
    together; a residual has at most `exchange.CAPACITY` numbers.
    """
    shared, out = _linked(x.device), _empty(residual)
    n, width = weight.shape
    tokens = x.numel() // width
    launched = launch.choose(weight, "linear_add", tokens, rows=n)
    linear_post_kernel[launched.grid](
        x.contiguous(), weight, bias, shared.boxes, shared.calls, launched.claims, tokens, n, launched.own, shared.rank,
        K=width, WORLD=shared.world, **launched.options,
    )  # fmt: skip
    shared.receive(residual, out)
    return out


@linear_sum_add.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return _empty(residual)


@torch.library.custom_op("fastgen::packed_sum_add", mutates_args=())
def packed_sum_add(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Return the same as `linear_sum_add` of int4 or int8 weights that `fastgen.kernels.packed` holds."""
    shared, out, n = _linked(x.device), _empty(residual), residual.shape[-1]
    if not is_one_launch(x, words, scales):  # the numbers of the second would go where those of the first belong
        return shared.sum(packed_linear(x, None, 0.0, words, scales, bias, None, n, True), residual)
    launch_packed(
        packed_post_kernel, x, None, 0.0, words, scales, n, bias=bias,
        more={"boxes": shared.boxes, "calls": shared.calls, "rank": shared.rank, "WORLD": shared.world},
    )  # fmt: skip
    shared.receive(residual, out)
    return out


@packed_sum_add.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return _empty(residual)


def _linked(device: torch.device) -> Exchange:
    shared = exchange(device)
    assert shared, "these GPUs cannot reach each other"
    return shared


def _empty(residual: Tensor) -> Tensor:
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


@gluon.jit(do_not_specialize=["tokens", "n", "own", "rank"])
def linear_post_kernel(
    x, weight, bias, boxes, calls, claims, tokens, n, own, rank, K: gl.constexpr, WORLD: gl.constexpr, R: gl.constexpr,
    SETS: gl.constexpr, DEPTH: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [n, K], bias [n] or None; boxes and calls: see `exchange_kernel`; any grid."""
    stream_product(
        x, None, weight, claims, tokens, n, own, 0.0, _load_call, _post, (bias, calls, rank, addresses(boxes, WORLD)),
        K, R, SETS, DEPTH, PAIRED=False, PDL=PDL, WARPS=WARPS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["rank"])
def packed_post_kernel(
    x, norm, factors, words, scales, tokens, n, tiles, record, eps, bias, boxes, calls, rank, WORLD: gl.constexpr,
    WIDTH: gl.constexpr, PLANES: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr, SETS: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr, KEPT: gl.constexpr, DTYPE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """bias [n] or None, boxes and calls as `exchange_kernel` has them; the rest as `stream_packed` has it."""
    stream_packed(
        x, norm, factors, words, scales, tokens, n, tiles, record, eps, _load_calls, _post_both,
        (bias, calls, rank, addresses(boxes, WORLD)), WIDTH, PLANES, GROUPS, ZEROS, SETS, R, STAGES, EARLY, KEPT, DTYPE,
        PDL,
    )  # fmt: skip


@gluon.jit
def _load_call(row, token, here, n, extra):
    """Load the call that y [64, 2] belongs to."""
    return coming_call(extra[1], token * n + row, here)


@gluon.jit
def _post(y, call, tile, row, token, here, n, extra):
    """Send y [64, 2] plus bias."""
    bias, _, rank, theirs = extra
    post(biased(y, row, here, bias), call, token * n + row, here, rank, theirs)


@gluon.jit
def _load_calls(row, token, here, n, tiles, extra):
    """Load the calls that both rows belong to."""
    at, other = token * n + row, 8 * tiles
    first = coming_call(extra[1], at, here & (row < n))
    return first, coming_call(extra[1], at + other, here & (row + other < n))


@gluon.jit
def _post_both(first, second, early, tile, row, token, here, n, tiles, extra):
    """Send both rows plus bias."""
    bias, _, rank, theirs = extra
    first, second = biased_rows(first, second, row, here, n, tiles, bias)
    at, other = token * n + row, 8 * tiles
    post(first, early[0], at, here & (row < n), rank, theirs)
    post(second, early[1], at + other, here & (row + other < n), rank, theirs)
