"""A read-only pass over memory in Triton: the yardstick of every speed on a GPU.

Each program adds up its part, with 16-byte loads and enough of them in flight to saturate the memory, and writes one
number. `fastgen.kernels.bandwidth` times it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Elements a program adds at a time; 32 KB in flight a program, measured best of 2048 to 16384 on an H200."""


@triton.jit
def _read_sum_kernel(data, out, size, programs, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(program * BLOCK, size, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(data + at, mask=at < size, other=0.0)
    tl.store(out + program, tl.sum(total))


def read_sum(data: Tensor, out: Tensor) -> None:
    """Add up fp32 `data` [N] into `out` [programs] fp32, one partial sum a program, both on one GPU."""
    assert data.dtype == out.dtype == torch.float32, "the yardstick reads fp32"
    _read_sum_kernel[(out.numel(),)](data, out, data.numel(), out.numel(), BLOCK=BLOCK, num_warps=8)
