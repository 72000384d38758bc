"""How the kernels are launched: programmatic dependent launch, and a small table of shapes by GPU.

Nothing is tuned at run time. `choose` looks a shape up by the GPU's name and falls back to one that fits the shared
memory of every GPU from sm_80 on. The reduction (SPLITS x BLOCK) belongs to the stage, not to the number of tokens:
that is what keeps verified tokens equal to decoded ones.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

MAX_TOKENS = 16
"""Tokens (texts x new tokens) that the kernels take at once; more is a matter for tensor-core matmuls."""

MAX_CELLS = 1 << 14


class Shape(NamedTuple):
    """Launch shape of `product.stream_product`.

    Attributes:
        splits: warps that share a tile of K; with `block` it is the order of every sum along K.
        block: what each warp takes of a tile, less where the input is narrow.
        rows: rows of the weight in a block.
        stages: depth of the pipeline of copies; shared memory holds stages - 1 tiles of the weight or more.
        per_processor: programs on each multiprocessor.
        early: copy the first weights before waiting for the kernel ahead; else activations are pipelined too.
    """

    splits: int
    block: int
    rows: int
    stages: int
    per_processor: int
    early: bool


DEFAULT = (Shape(4, 128, 16, 4, 2, True), Shape(4, 128, 16, 4, 2, True), Shape(4, 128, 16, 3, 2, False))
"""For 1, up to 8, and up to 16 tokens, on GPUs that nobody has tuned for."""

TABLE = Path(__file__).with_name("shapes.json")
"""The shapes that `scripts/tune` found, by GPU and stage; three each, as in `DEFAULT`."""


def choose(weight: Tensor, stage: str, tokens: int) -> Shape:
    """Return the shape in which a stage multiplies weights [n, width] with `tokens` tokens."""
    shapes = table().get(_name(weight.device), {}).get(stage, DEFAULT)
    shape = fitted(shapes[column(tokens)], weight.shape[1])
    # fp16 normalizes ahead of the product, which takes shared memory for 16 tokens.
    halved = weight.dtype is torch.float16 and tokens > 8 and stage != "linear_add"
    return shape._replace(rows=max(16, shape.rows // 2), stages=min(shape.stages, 3)) if halved else shape


def column(tokens: int) -> int:
    """Return which of a stage's three shapes is for so many tokens."""
    return 0 if tokens == 1 else 1 if tokens <= 8 else 2


def fitted(shape: Shape, width: int) -> Shape:
    """Return the shape with a block that is no wider than the input."""
    return shape._replace(block=max(16, min(shape.block, next_power_of_two(width) // shape.splits)))


@functools.cache
def table() -> dict[str, dict[str, tuple[Shape, ...]]]:
    """Return the committed shapes."""
    stored = json.loads(TABLE.read_text())
    return {
        gpu: {stage: tuple(Shape(*row) for row in rows) for stage, rows in stages.items()}
        for gpu, stages in stored.items()
    }


def device_name() -> str:
    """Return the name under which this machine's GPU stands in the table."""
    return _name(torch.device("cuda"))


def programs(device: torch.device, shape: Shape, blocks: int) -> int:
    """Return the size of the grid for `blocks` row blocks."""
    return min(blocks, shape.per_processor * processors(device))


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
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return how much shared memory a program can have on a GPU, in KiB."""
    if device.type != "cuda":
        return 227
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"]) // 1024


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
