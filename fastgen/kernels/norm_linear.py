"""linear(rms_norm(x)) for up to 16 tokens in one launch: the q, k and v projections.

y[t] = (W (g * x[t])) / rms(x[t]) + b, with W [N, K] read once. How: `fastgen.kernels.product`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import launch
from fastgen.kernels.product import nothing, store_rows, stream_product


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
    launched = launch.choose(weight, stage, tokens, rows=n)
    norm_linear_kernel[launched.grid](
        x.contiguous(), norm, weight, bias, out, launched.claims, tokens, n, launched.own, eps, K=width,
        **launched.options,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "n", "own"])
def norm_linear_kernel(
    x, norm, weight, bias, out, claims, tokens, n, own, eps, K: gl.constexpr, R: gl.constexpr, SETS: gl.constexpr,
    DEPTH: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x [tokens, K], norm [K], weight [n, K], bias [n] or None, out [tokens, n]; any grid."""
    stream_product(
        x, norm, weight, claims, tokens, n, own, eps, nothing, store_rows, (out, bias), K, R, SETS, DEPTH,
        PAIRED=False, PDL=PDL, WARPS=WARPS,
    )  # fmt: skip
