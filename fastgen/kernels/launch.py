"""How the kernels are launched: programmatic dependent launch, and a small table of shapes by GPU.

Nothing is tuned at run time. `choose` looks a shape up by the GPU's name and falls back to one that fits the shared
memory of every GPU from sm_80 on. The reduction (SPLITS x BLOCK) belongs to the stage, not to the number of tokens:
that is what keeps verified tokens equal to decoded ones.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TOKENS = 16
"""Tokens (texts x new tokens) that the kernels take at once; more is a matter for tensor-core matmuls."""

MAX_CELLS = 1 << 14


class Shape(NamedTuple):
    """Launch shape of `product.stream_product`.

    Attributes:
        rows: rows of the weight in a block.
        stages: depth of the pipeline of copies; shared memory holds stages - 1 tiles of the weight or more.
        per_processor: programs on each multiprocessor.
        early: copy the first weights before waiting for the kernel ahead; else activations are pipelined too.
    """

    rows: int
    stages: int
    per_processor: int
    early: bool


SPLITS, BLOCK = 4, 128
"""Warps that share a tile of K, and what each takes of it: the order of every sum along K."""

DEFAULT = (Shape(16, 4, 2, True), Shape(16, 4, 2, True), Shape(16, 3, 2, False))
"""For 1 and 2, up to 8, and up to 16 tokens, on GPUs that nobody has tuned for."""

SHAPES: dict[str, dict[str, tuple[Shape, Shape, Shape]]] = {
    "NVIDIA H200": {
        "norm": (Shape(16, 6, 2, True), Shape(64, 3, 1, False), Shape(64, 3, 1, False)),
        "plain": (Shape(16, 6, 2, True), Shape(32, 4, 2, False), Shape(32, 4, 1, False)),
    },
}
"""Shapes by GPU and by whether the input is normalized."""


def choose(device: torch.device, kind: str, tokens: int) -> Shape:
    """Return the shape for `tokens` tokens; `kind` is "norm" or "plain"."""
    shapes = SHAPES.get(_name(device), {}).get(kind, DEFAULT)
    return shapes[0 if tokens <= 2 else 1 if tokens <= 8 else 2]


def programs(device: torch.device, shape: Shape, blocks: int) -> int:
    """Return the size of the grid for `blocks` row blocks."""
    return min(blocks, shape.per_processor * _processors(device))


def block_size(width: int) -> int:
    """Return what a warp takes of a tile of K, less than BLOCK where the input is narrow."""
    return max(16, min(BLOCK, next_power_of_two(width) // SPLITS))


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Return Triton's launch options for programmatic dependent launch, {} before sm_90."""
    return {"launch_pdl": True} if _capability(device) >= (9, 0) else {}


def split_count(kv_heads: int) -> int:
    """Return into how many shares a text's cache is cut, a power of two: about 256 programs for one text."""
    return max(1, next_power_of_two(256 // kv_heads + 1) // 2)


@functools.cache
def workspace(device: torch.device) -> Tensor:
    """Return the device's tickets, int32 zeros; whoever takes tickets leaves zeros behind.

    One text of kernels at a time may use them: launches on two streams of a device must not overlap. It must exist
    before a CUDA graph is captured (`fused.prepare`).
    """
    return torch.zeros(MAX_CELLS, dtype=torch.int32, device=device)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
