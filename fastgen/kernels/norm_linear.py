"""linear(rms_norm(x)) for up to 16 tokens in one launch: the q, k and v projections.

y[t] = (W (g * x[t])) / rms(x[t]) + b, with W [N, K] read once. How: `fastgen.kernels.product`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels import launch
from fastgen.kernels.product import store_rows, stream_product


@torch.library.custom_op("fastgen::norm_linear", mutates_args=())
def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [.., N] in x's dtype for x [.., K], norm [K], weight [N, K], bias [N], all fp16 or all bf16."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    run("norm_linear", x, norm, eps, weight, bias, out)
    return out


@norm_linear.register_fake
def _(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def run(stage: str, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Launch the kernel in a stage's shape; `out` [.., N] may be wider than x (the head's fp32 logits)."""
    n, width = weight.shape
    tokens = x.numel() // width
    shape = launch.choose(weight, stage, tokens)
    options = launch.dependent_launch(x.device)
    grid = (launch.programs(x.device, shape, triton.cdiv(n, shape.rows)),)
    norm_linear_kernel[grid](
        x.contiguous(), norm, weight, bias, out, tokens, n, eps,
        K=width, ROWS=shape.rows, SPLITS=shape.splits, BLOCK=shape.block,
        TOKENS=launch.next_power_of_two(tokens), SCALE_FIRST=x.dtype is torch.float16, PDL=bool(options),
        EARLY=shape.early, STAGES=shape.stages, num_warps=shape.splits, **options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def norm_linear_kernel(
    x, norm, weight, bias, out, tokens, n, eps, K: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, SCALE_FIRST: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], norm [K], weight [n, K], bias [n] or None, out [tokens, n]; any grid."""
    stream_product(
        x, norm, weight, tokens, n, eps, store_rows, (out, bias), K, ROWS, SPLITS, BLOCK, TOKENS,
        PAIRED=False, NORM=True, SCALE_FIRST=SCALE_FIRST, PDL=PDL, EARLY=EARLY, STAGES=STAGES,
    )  # fmt: skip
