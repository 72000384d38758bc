"""residual + linear(x) for up to 16 tokens in one launch: the output and the down projection.

y[t] = r[t] + W x[t] + b, with W [N, K] read once and one rounding at the end. How: `fastgen.kernels.product`. Where
several ranks have a part of K each, `partial_linear` gives their parts of the sum, not rounded at all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels import launch
from fastgen.kernels.product import stream_product


@torch.library.custom_op("fastgen::linear_add", mutates_args=())
def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Return [.., N] for x [.., K], weight [N, K], bias [N], residual [.., N], all fp16 or all bf16."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _run(x, weight, bias, residual.contiguous(), out)
    return out


@linear_add.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


@torch.library.custom_op("fastgen::partial_linear", mutates_args=())
def partial_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [.., N] fp32 for x [.., K], weight [N, K], bias [N], all fp16 or all bf16."""
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32, device=x.device)
    _run(x, weight, bias, None, out)
    return out


@partial_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32, device=x.device)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    n, width = weight.shape
    tokens = x.numel() // width
    shape = launch.choose(weight, "linear_add", tokens)
    options = launch.dependent_launch(x.device)
    grid = (launch.programs(x.device, shape, triton.cdiv(n, shape.rows)),)
    linear_add_kernel[grid](
        x.contiguous(), weight, bias, residual, out, tokens, n,
        K=width, ROWS=shape.rows, SPLITS=shape.splits, BLOCK=shape.block,
        TOKENS=launch.next_power_of_two(tokens), PDL=bool(options), EARLY=shape.early, STAGES=shape.stages,
        num_warps=shape.splits, **options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def linear_add_kernel(
    x, weight, bias, residual, out, tokens, n, K: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [n, K], bias [n] or None, residual [tokens, n] or None, out [tokens, n]; any grid."""
    stream_product(
        x, None, weight, tokens, n, 0.0, _add_and_store, (out, bias, residual), K, ROWS, SPLITS, BLOCK, TOKENS,
        PAIRED=False, NORM=False, SCALE_FIRST=False, PDL=PDL, EARLY=EARLY, STAGES=STAGES,
    )  # fmt: skip


@triton.jit
def _add_and_store(y, block, column, tokens, n, extra):
    """Store y [ROWS, COLUMNS] plus bias and residual, where there are any."""
    out, bias, residual = extra
    rows = block * y.shape[0] + tl.arange(0, y.shape[0])
    if bias is not None:
        y += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    here = (rows < n)[:, None] & (column < tokens)[None, :]
    at = column[None, :].to(tl.int64) * n + rows[:, None]
    if residual is not None:
        y += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=here)
