"""silu(gate) * up of [gate, up] = linear(rms_norm(x)) for up to 16 tokens in one launch.

A tile holds some gate rows and the up rows that belong to them, so that gate and up never leave the
multiprocessor. SwiGLU: arXiv 2002.05202. How: `fastgen.kernels.product`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import launch
from fastgen.kernels.product import biased, nothing, stream_product


@torch.library.custom_op("fastgen::norm_swiglu", mutates_args=())
def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [.., F] for x [.., K], norm [K], weight [2F, K] (gate rows, then up rows), bias [2F]."""
    n, width = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty(*x.shape[:-1], n)
    tokens = x.numel() // width
    launched = launch.choose(weight, "norm_swiglu", tokens, rows=n)
    norm_swiglu_kernel[launched.grid](
        x.contiguous(), norm, weight, bias, out, launched.claims, tokens, n, launched.own, eps, K=width,
        **launched.options,
    )  # fmt: skip
    return out


@norm_swiglu.register_fake
def _(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@gluon.jit(do_not_specialize=["tokens", "n", "own"])
def norm_swiglu_kernel(
    x, norm, weight, bias, out, claims, tokens, n, own, eps, K: gl.constexpr, R: gl.constexpr, SETS: gl.constexpr,
    DEPTH: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x [tokens, K], norm [K], weight [2n, K], bias [2n] or None, out [tokens, n]; any grid."""
    stream_product(
        x, norm, weight, claims, tokens, n, own, eps, nothing, _gate_and_store, (out, bias), K, R, SETS, DEPTH,
        PAIRED=True, PDL=PDL, WARPS=WARPS,
    )  # fmt: skip


@gluon.jit
def _gate_and_store(y, early, tile, row, token, here, n, extra):
    """Store silu(gate) * up of y [64, 2], gate rows first, up rows second."""
    out, bias = extra
    gate, up = gl.split(y)
    row, _ = gl.split(row)
    here, _ = gl.split(here)
    at, _ = gl.split(token.to(gl.int64) * n + gl.zeros_like(y).to(gl.int64))
    gate, up = biased(gate, row, here, bias), biased(up, row + n, here, bias)
    gl.store(out + at + row, (gate / (1.0 + gl.exp(-gate)) * up).to(out.dtype.element_ty), mask=here)
