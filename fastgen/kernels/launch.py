"""How the kernels are launched: programmatic dependent launch, and a small table of shapes by GPU.

Nothing is tuned at run time. `choose` looks a shape up by the GPU's name and falls back to one for all; either is made
to fit the GPU's shared memory. The order of the sums does not depend on the shape (`product.WARPS`): that is what keeps
verified tokens equal to decoded ones.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from fastgen.kernels import product

MAX_TOKENS = 16
"""Tokens (texts x new tokens) that the kernels take at once; more is a matter for tensor-core matmuls."""

MAX_COLUMNS = 1 << 16
"""Columns of a linear that the kernels take: of packed weights, a program has a warp for each 2,048 at times."""

MAX_CELLS = 1 << 14
"""Counters that `attend` has for its cells: a text, a key head, and a group of that head's rows."""


class Shape(NamedTuple):
    """Launch shape of `product.stream_product`.

    Attributes:
        per_processor: programs on each multiprocessor.
        tiles: tiles of 16 rows in a block.
        depth: units of each warp's ring, fewer where shared memory is short. Where rings leave room for more programs
            than `per_processor`, some multiprocessors get more than others.
        claimed: percent of the rows that programs claim when they are through with their own, 0 to share out all.
    """

    per_processor: int
    tiles: int
    depth: int
    claimed: int


DEFAULT = (Shape(2, 1, 5, 0),) * 3
"""For 1, up to 8, and up to 16 tokens, on GPUs that nobody has tuned for. A ring so deep leaves no room for others."""

TABLE = Path(__file__).with_name("shapes.json")
"""The shapes that `scripts/tune` found, by GPU and stage; three each, as in `DEFAULT`."""


class Launch(NamedTuple):
    """A shape on a GPU: the grid, who takes which rows, and the kernel's compile-time arguments.

    Attributes:
        own: rows that are shared out evenly; the others are claimed.
        claims: the counter of the claims, None where there are none.
        tiles: how many tiles all programs together finish, of 16 rows of the weight or of fewer.
    """

    grid: tuple[int]
    own: int
    claims: Tensor | None
    tiles: int
    options: dict[str, Any]


def choose(weight: Tensor, stage: str, tokens: int, *, rows: int) -> Launch:
    """Return how a stage multiplies weights whose output has `rows` rows with `tokens` tokens."""
    shapes = table().get(_name(weight.device), {}).get(stage, DEFAULT)
    return fitted(shapes[column(tokens)], weight, tokens, rows)


def fitted(shape: Shape, weight: Tensor, tokens: int, rows: int) -> Launch:
    """Return the launch of a shape, its ring as deep as shared memory allows; weight has `rows` rows or twice as many.

    Claims need a program to have blocks of its own for all that its ring holds and one more; small weights are shared
    out whole.
    """
    height, width = weight.shape
    sets = 0 if tokens == 1 else triton.cdiv(tokens, 8)
    units = triton.cdiv(width, product.WIDE)
    a_unit = product.WARPS * shape.tiles * product.LINES * 512
    beside = product.WARPS * shape.tiles * max(1, sets) * 512 + 2560
    if not sets:
        beside += triton.cdiv(units, 4) * product.WARPS * 512
    depth = max(1, min(shape.depth, (processor_memory(weight.device) // shape.per_processor - beside) // a_unit))
    programs = min(triton.cdiv(height, 16 * shape.tiles), shape.per_processor * processors(weight.device))
    span = 16 * shape.tiles * rows // height
    depth = min(depth, triton.cdiv(triton.cdiv(rows, programs), span) * units)
    kept = rows * (100 - shape.claimed) // 100 // programs // span * span
    claimed = shape.claimed > 0 and kept > product.blocks_ahead(depth, units) * span
    own = kept * programs if claimed else rows
    claims = workspace(weight.device)[MAX_CELLS:] if claimed else None
    blocks = programs * triton.cdiv(triton.cdiv(own, programs), span) + triton.cdiv(rows - own, span)
    dependent = dependent_launch(weight.device)
    options = {"R": shape.tiles, "SETS": sets, "DEPTH": depth, "PDL": bool(dependent), "WARPS": product.WARPS}
    options |= {"num_warps": product.WARPS} | dependent
    return Launch((programs,), own, claims, blocks * shape.tiles, options)


def column(tokens: int) -> int:
    """Return which of a stage's three shapes is for so many tokens."""
    return 0 if tokens == 1 else 1 if tokens <= 8 else 2


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


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Return Triton's launch options for programmatic dependent launch, {} before sm_90."""
    return {"launch_pdl": True} if _capability(device) >= (9, 0) else {}


def split_count(kv_heads: int) -> int:
    """Return into how many shares a text's cache is cut, a power of two: about 128 programs for one text.

    At least two: where shares are never added up, Triton does not declare the memory that `attend` addresses.
    """
    return max(2, next_power_of_two(128 // kv_heads + 1) // 2)


@functools.cache
def workspace(device: torch.device) -> Tensor:
    """Return the device's tickets, int32 zeros, and behind them a counter of claims; users leave zeros behind.

    One text of kernels at a time may use them: launches on two streams of a device must not overlap. It must exist
    before a CUDA graph is captured (`fused.prepare`).
    """
    return torch.zeros(MAX_CELLS + 4, dtype=torch.int32, device=device)


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
def processor_memory(device: torch.device) -> int:
    """Return the bytes of shared memory of a multiprocessor; CUDA keeps 1 KiB for each program."""
    if device.type != "cuda":
        return 160 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
