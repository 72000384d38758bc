"""What a step begins with: the embedding's rows of its tokens, and the rotations of their positions.

A launch each. Under programmatic dependent launch `embed`, the last before the layers, is the one kernel of a step
that lets nobody start early. So when a layer's kernels start, everything before them has ended, and what is there
before a step, positions, rotations and the cache's older rows, may be read before they wait.

angle[j] = position * frequency[j] in fp32, as `fastgen.kernels.rope.Rope` has it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgen.kernels import launch

BLOCK = 1024  # values of a row that a program copies


@torch.library.custom_op("fastgen::rotations", mutates_args=())
def rotations(positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Return [B, T, d] fp32, cosines then sines times `factor`, for positions [B, T] int64 and frequencies [d / 2]."""
    half = frequencies.numel()
    out = torch.empty(*positions.shape, 2 * half, dtype=torch.float32, device=positions.device)
    options = launch.dependent_launch(positions.device)
    rotations_kernel[(positions.numel(),)](
        positions.contiguous(), frequencies, out, factor, HALF=half, WIDTH=launch.next_power_of_two(half),
        PDL=bool(options), num_warps=2, **options,
    )  # fmt: skip
    return out


@rotations.register_fake
def _(positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    return frequencies.new_empty(*positions.shape, 2 * frequencies.numel())


@triton.jit
def rotations_kernel(
    positions, frequencies, out, factor, HALF: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid (tokens); out [tokens, 2 HALF]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, j = tl.program_id(0), tl.arange(0, WIDTH)
    frequency = tl.load(frequencies + j, mask=j < HALF, other=0.0)
    angle = tl.load(positions + row).to(tl.float32) * frequency
    tl.store(out + row * 2 * HALF + j, tl.cos(angle) * factor, mask=j < HALF)
    tl.store(out + row * 2 * HALF + HALF + j, tl.sin(angle) * factor, mask=j < HALF)


@torch.library.custom_op("fastgen::embed", mutates_args=())
def embed(tokens: Tensor, weight: Tensor, first: int) -> Tensor:
    """Return [B, T, D] for tokens [B, T] int64 and weight [V, D], the rows of tokens `first` on; what is below 0 counts
    as 0, and tokens without a row give zeros."""
    width = weight.shape[1]
    out = torch.empty(*tokens.shape, width, dtype=weight.dtype, device=weight.device)
    options = launch.dependent_launch(weight.device)
    embed_kernel[(tokens.numel(), triton.cdiv(width, BLOCK))](
        tokens.contiguous(),
        weight,
        out,
        first,
        weight.shape[0],
        width,
        BLOCK=BLOCK,
        PDL=bool(options),
        num_warps=4,
        **options,
    )
    return out


@embed.register_fake
def _(tokens: Tensor, weight: Tensor, first: int) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


@triton.jit(do_not_specialize=["first"])
def embed_kernel(tokens, weight, out, first, size, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (tokens, blocks of a row); weight [size, width]."""
    if PDL:
        gdc_wait()
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.maximum(tl.load(tokens + row), 0) - first
    here = (token >= 0) & (token < size) & (at < width)
    value = tl.load(weight + token * width + at, mask=here, other=0.0)
    tl.store(out + row.to(tl.int64) * width + at, value, mask=at < width)
