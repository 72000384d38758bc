"""silu(gate) * up of [gate, up] = linear(rms_norm(x)) for up to 16 tokens in one launch.

A block holds some gate rows and the up rows that belong to them, so that gate and up never leave the
multiprocessor. SwiGLU: arXiv 2002.05202. How: `fastgen.kernels.product`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels import launch
from fastgen.kernels.product import stream_product


@torch.library.custom_op("fastgen::norm_swiglu", mutates_args=())
def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [.., F] for x [.., K], norm [K], weight [2F, K] (gate rows, then up rows), bias [2F]."""
    n, width = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty(*x.shape[:-1], n)
    tokens = x.numel() // width
    shape = launch.choose(weight, "norm_swiglu", tokens)
    options = launch.dependent_launch(x.device)
    grid = (launch.programs(x.device, shape, triton.cdiv(n, shape.rows // 2)),)
    norm_swiglu_kernel[grid](
        x.contiguous(), norm, weight, bias, out, tokens, n, eps,
        K=width, ROWS=shape.rows, SPLITS=shape.splits, BLOCK=shape.block,
        TOKENS=launch.next_power_of_two(tokens), SCALE_FIRST=x.dtype is torch.float16, PDL=bool(options),
        EARLY=shape.early, STAGES=shape.stages, num_warps=shape.splits, **options,
    )  # fmt: skip
    return out


@norm_swiglu.register_fake
def _(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@triton.jit(do_not_specialize=["tokens"])
def norm_swiglu_kernel(
    x, norm, weight, bias, out, tokens, n, eps, K: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, SCALE_FIRST: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], norm [K], weight [2n, K], bias [2n] or None, out [tokens, n]; any grid."""
    stream_product(
        x, norm, weight, tokens, n, eps, _gate_and_store, (out, bias), K, ROWS, SPLITS, BLOCK, TOKENS,
        PAIRED=True, NORM=True, SCALE_FIRST=SCALE_FIRST, PDL=PDL, EARLY=EARLY, STAGES=STAGES,
    )  # fmt: skip


@triton.jit
def _gate_and_store(y, block, column, tokens, n, extra):
    """Store silu(gate) * up of y [ROWS, COLUMNS], gate rows in the first half, up rows in the second."""
    out, bias = extra
    SPAN: tl.constexpr = y.shape[0] // 2
    rows = block * SPAN + tl.arange(0, SPAN)
    gate, up = tl.split(tl.permute(tl.reshape(y, [2, SPAN, y.shape[1]]), (1, 2, 0)))
    if bias is not None:
        gate += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + n + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    here = (rows < n)[:, None] & (column < tokens)[None, :]
    at = column[None, :].to(tl.int64) * n + rows[:, None]
    tl.store(out + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=here)
