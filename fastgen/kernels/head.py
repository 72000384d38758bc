"""The final norm and the LM head for up to 16 tokens: fp32 logits, or only the token of the largest.

`head` is `norm_linear` with an fp32 output. `greedy_head` stores no logits: every tile of rows gives its largest
logit and that token's id, and a second small kernel takes the best of the tiles, the lowest id where they tie.
As in `fastgen.sampling`, logits that name no token (a NaN or +inf among them, or all -inf) give -1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from fastgen.kernels import launch, norm_linear
from fastgen.kernels.product import biased, nothing, stream_product

REGISTERS = 128
"""Of a thread of the greedy head, for two programs on a multiprocessor; ptxas would take 155 for 16 tokens."""


@torch.library.custom_op("fastgen::head", mutates_args=())
def head(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return logits [.., V] fp32 for x [.., D], norm [D], weight [V, D], bias [V], all fp16 or all bf16."""
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32, device=x.device)
    norm_linear.run("head", x, norm, eps, weight, bias, out)
    return out


@head.register_fake
def _(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32, device=x.device)


@torch.library.custom_op("fastgen::greedy_head", mutates_args=())
def greedy_head(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the tokens [..] int64 of the largest logits for x [.., D]; -1 where there is none."""
    n, width = weight.shape
    tokens = x.numel() // width
    launched = launch.choose(weight, "head", tokens, rows=n)
    tiles = launched.tiles
    best = torch.empty(tokens, tiles, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, tiles, dtype=torch.int32, device=x.device)
    out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    greedy_head_kernel[launched.grid](
        x.contiguous(), norm, weight, bias, best, ids, launched.claims, tokens, n, launched.own, tiles, eps, K=width,
        maxnreg=REGISTERS, **launched.options,
    )  # fmt: skip
    dependent = launch.dependent_launch(x.device)
    pick_token_kernel[(tokens,)](best, ids, out, tiles, WIDTH=1024, PDL=bool(dependent), num_warps=4, **dependent)
    return out


@greedy_head.register_fake
def _(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)


@gluon.jit(do_not_specialize=["tokens", "n", "own", "tiles"])
def greedy_head_kernel(
    x, norm, weight, bias, best, ids, claims, tokens, n, own, tiles, eps, K: gl.constexpr, R: gl.constexpr,
    SETS: gl.constexpr, DEPTH: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x [tokens, K], norm [K], weight [n, K], bias [n] or None, best and ids [tokens, tiles]; any grid."""
    stream_product(
        x, norm, weight, claims, tokens, n, own, eps, nothing, _store_best, (best, ids, bias, tokens, tiles), K, R,
        SETS, DEPTH, PAIRED=False, PDL=PDL, WARPS=WARPS,
    )  # fmt: skip


@gluon.jit
def _store_best(y, early, tile, row, token, here, n, extra):
    """Store the largest of y [64, 2] and its row for each of the tile's eight tokens; NaN counts as +inf."""
    best, ids, bias, tokens, tiles = extra
    y = biased(y, row, here, bias)
    y = gl.where(y != y, float("inf"), y)  # noqa: PLR0124
    y = gl.reshape(gl.where(here, y, float("-inf")), [8, 8, 2])
    rows = gl.reshape(row, [8, 8, 2])
    top = gl.max(gl.max(y, axis=2), axis=0)
    spread = gl.convert_layout(top, gl.SliceLayout(0, gl.SliceLayout(2, y.type.layout)))[None, :, None]
    winner = gl.min(gl.min(gl.where(y == spread, rows, 0x7FFFFFFF), axis=2), axis=0)
    column = gl.max(gl.max(gl.reshape(token + row * 0, [8, 8, 2]), axis=2), axis=0)
    gl.store(best + column * tiles + tile, top, mask=column < tokens)
    gl.store(ids + column * tiles + tile, winner, mask=column < tokens)


@triton.jit
def pick_token_kernel(best, ids, out, blocks, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """Grid (tokens); best and ids [tokens, blocks], out [tokens]."""
    if PDL:
        gdc_wait()
        # The next kernel may read positions before it waits, and a position follows from a token: no early start.
    row = tl.program_id(0) * blocks
    lane = tl.arange(0, WIDTH)
    top = tl.full([WIDTH], float("-inf"), tl.float32)
    token = tl.zeros([WIDTH], tl.int32)
    for start in range(0, blocks, WIDTH):
        here = start + lane < blocks
        value = tl.load(best + row + start + lane, mask=here, other=float("-inf"))
        name = tl.load(ids + row + start + lane, mask=here, other=0)
        token = tl.where((value > top) | ((value == top) & (name < token)), name, token)
        top = tl.maximum(top, value)
    most = tl.max(top, axis=0)
    winner = tl.min(tl.where(top == most, token, 0x7FFFFFFF), axis=0)
    invalid = (most == float("inf")) | (most == float("-inf"))
    tl.store(out + tl.program_id(0), tl.where(invalid, -1, winner).to(tl.int64))
