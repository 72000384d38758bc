"""The final norm and the LM head for up to 16 tokens: fp32 logits, or only the token of the largest.

`head` is `norm_linear` with an fp32 output. `greedy_head` stores no logits: every block of rows gives its largest
logit and that token's id, and a second small kernel takes the best of the blocks, the lowest id where they tie.
As in `fastgen.sampling`, logits that name no token (a NaN or +inf among them, or all -inf) give -1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from fastgen.kernels import launch, norm_linear
from fastgen.kernels.product import stream_product


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
    shape = launch.choose(weight, "head", tokens)
    options = launch.dependent_launch(x.device)
    blocks = triton.cdiv(n, shape.rows)
    best = torch.empty(tokens, blocks, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, blocks, dtype=torch.int32, device=x.device)
    out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    greedy_head_kernel[(launch.programs(x.device, shape, blocks),)](
        x.contiguous(), norm, weight, bias, best, ids, tokens, n, eps,
        K=width, ROWS=shape.rows, SPLITS=shape.splits, BLOCK=shape.block,
        TOKENS=launch.next_power_of_two(tokens), SCALE_FIRST=x.dtype is torch.float16, PDL=bool(options),
        EARLY=shape.early, STAGES=shape.stages, num_warps=shape.splits, **options,
    )  # fmt: skip
    pick_token_kernel[(tokens,)](best, ids, out, blocks, WIDTH=1024, PDL=bool(options), num_warps=4, **options)
    return out


@greedy_head.register_fake
def _(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)


@triton.jit(do_not_specialize=["tokens"])
def greedy_head_kernel(
    x, norm, weight, bias, best, ids, tokens, n, eps, K: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, SCALE_FIRST: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], norm [K], weight [n, K], bias [n] or None, best and ids [tokens, blocks]; any grid."""
    stream_product(
        x, norm, weight, tokens, n, eps, _store_best, (best, ids, bias), K, ROWS, SPLITS, BLOCK, TOKENS,
        PAIRED=False, NORM=True, SCALE_FIRST=SCALE_FIRST, PDL=PDL, EARLY=EARLY, STAGES=STAGES,
    )  # fmt: skip


@triton.jit
def _store_best(y, block, column, tokens, n, extra):
    """Store the largest of y [ROWS, COLUMNS] and its row for every token; NaN counts as +inf."""
    best, ids, bias = extra
    rows = block * y.shape[0] + tl.arange(0, y.shape[0])
    if bias is not None:
        y += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    y = tl.where(y != y, float("inf"), y)  # noqa: PLR0124
    y = tl.where((rows < n)[:, None], y, float("-inf"))
    top, index = tl.max(y, axis=0, return_indices=True)
    at = column * tl.cdiv(n, y.shape[0]) + block
    tl.store(best + at, top, mask=column < tokens)
    tl.store(ids + at, block * y.shape[0] + index, mask=column < tokens)


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
