"""residual + linear(x) for up to 16 tokens in one launch: the output and the down projection.

y[t] = r[t] + W x[t] + b, with W [N, K] read once and one rounding at the end. How: `fastgen.kernels.product`. Where
several ranks have a part of K each, `partial_linear` gives their parts of the sum, not rounded at all.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import launch
from fastgen.kernels.product import biased, stream_product


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
    launched = launch.choose(weight, "linear_add", tokens, rows=n)
    linear_add_kernel[launched.grid](
        x.contiguous(), weight, bias, residual, out, launched.claims, tokens, n, launched.own, K=width,
        **launched.options,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "n", "own"])
def linear_add_kernel(
    x, weight, bias, residual, out, claims, tokens, n, own, K: gl.constexpr, R: gl.constexpr, SETS: gl.constexpr,
    DEPTH: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [n, K], bias [n] or None, residual [tokens, n] or None, out [tokens, n]; any grid."""
    stream_product(
        x, None, weight, claims, tokens, n, own, 0.0, _load_residual, _add_and_store, (out, bias, residual), K, R, SETS,
        DEPTH, PAIRED=False, PDL=PDL, WARPS=WARPS,
    )  # fmt: skip


@gluon.jit
def _load_residual(row, token, here, n, extra):
    """Return the residual [64, 2] as fp32, or 0."""
    residual = extra[2]
    if residual is not None:
        return gl.load(residual + token.to(gl.int64) * n + row, mask=here, other=0.0).to(gl.float32)
    else:
        return 0.0


@gluon.jit
def _add_and_store(y, residual, tile, row, token, here, n, extra):
    """Store y [64, 2] plus bias and residual."""
    out, bias, _ = extra
    y = biased(y, row, here, bias) + residual
    gl.store(out + token.to(gl.int64) * n + row, y.to(out.dtype.element_ty), mask=here)
