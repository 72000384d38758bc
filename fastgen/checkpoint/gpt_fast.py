"""gpt-fast's `.pth` files, one way: `model.pth`, `model_int8.pth`, `model_int4.gN.pth`, beside their `config.json`.

Names are Meta's, with wq, wk and wv in one `wqkv`, query and key rows in the order of interleaved RoPE
(https://github.com/pytorch-labs/gpt-fast, scripts/convert_hf_checkpoint.py, quantize.py). What a linear is, its tensors
say, not the file's name:

    int8    weight int8 [out, in], scales [out]                       w = q * scale, which is ours
    int4    weight int32 [out/8, in/(16 t), 32, t/2] for t of 2, 4, 8, scales_and_zeros [groups, out, 2]
                                                                      w = (q - 8) * scale + zero

The int4 words are tiles for tensor cores (PyTorch, aten/src/ATen/native/cuda/int4mm.cu), and their zeros are floats,
which no form of ours has: they are dequantized while they are read. `in` may be padded; the rest is dropped.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint.integers import SCALE_DTYPES, IntegerMatrix, StoredLinear
from fastgen.checkpoint.lazy import Bounds, Computed, LazyTensor
from fastgen.checkpoint.names import META, linear_shapes, part_rows
from fastgen.config import ModelConfig
from fastgen.errors import ModelFileError
from quantize.format import INT8

FUSED = "attention.wqkv"
PARTS = ("attention.wq", "attention.wk", "attention.wv")
TILE_ROWS, TILE_COLUMNS = 8, 16
INNER_TILES = (2, 4, 8)


def is_gpt_fast(tensors: Mapping[str, LazyTensor]) -> bool:
    """Return whether these are the tensors of a gpt-fast file."""
    return f"layers.0.{FUSED}.weight" in tensors


def gpt_fast_linears(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], source: Path
) -> tuple[dict[str, LazyTensor], dict[str, StoredLinear], tuple[str, ...]]:
    """Return the tensors by Meta's names, the linears that are int8 among them, and a line on int4 ones, if any.

    Raises `ModelFileError` for tensors whose shapes cannot be.
    """
    split = _split(config, tensors)
    shapes = linear_shapes(config, META)
    int4 = [name for name in shapes if f"{name}.scales_and_zeros" in split]
    for name in int4:
        pair = split.pop(f"{name}.scales_and_zeros")
        split[f"{name}.weight"] = _int4_weight(split.get(f"{name}.weight"), pair, shapes[name], f"{source}: {name}")
    stored = {
        name: StoredLinear(
            leaves={"weight": (shapes[name], (torch.int8,)), "scales": ((shapes[name][0],), SCALE_DTYPES)},
            format=INT8,
            kind="gpt-fast int8",
            view=_int8_view,
        )
        for name in shapes
        if f"{name}.scales" in split
    }
    found = f"dequantized while loading, since no form of ours fits: {len(int4)} linears of gpt-fast int4"
    return split, stored, (found,) if int4 else ()


def _split(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return `tensors` with every fused projection taken apart."""
    split = {}
    for name, tensor in tensors.items():
        prefix, fused, leaf = name.partition(f"{FUSED}.")
        if not fused:
            split[name] = tensor
            continue
        first = 0
        for part, rows in zip(PARTS, part_rows(config, "wqkv"), strict=True):
            split[f"{prefix}{part}.{leaf}"] = _rows(tensor, first, rows, leaf)
            first += rows
    return split


def _rows(tensor: LazyTensor, first: int, rows: int, leaf: str) -> LazyTensor:
    """Return `rows` of the outputs from `first` on: of int4 weights whole tiles, of their scales dimension 1."""
    axis, unit = int(leaf == "scales_and_zeros"), TILE_ROWS if len(tensor.shape) == 4 else 1
    if len(tensor.shape) <= axis or first + rows > tensor.shape[axis] * unit:
        return tensor  # does not fit, as is told later
    start, count = first // unit, -(-rows // unit)
    shape = (*tensor.shape[:axis], count, *tensor.shape[axis + 1 :])
    if axis:
        return Computed(shape, tensor.dtype, lambda at: tensor[:][:, start : start + count][_slices(at)])

    def compute(bounds: Bounds) -> Tensor:
        (top, bottom), *rest = bounds
        return tensor.read(((start + top, start + bottom), *rest))

    return Computed(shape, tensor.dtype, compute)


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(*bound) for bound in bounds)


def _int8_view(parts: Mapping[str, LazyTensor]) -> IntegerMatrix:
    scales = parts["scales"]
    column = Computed((scales.shape[0], 1), scales.dtype, lambda at: scales[slice(*at[0])][:, None][:, slice(*at[1])])
    return IntegerMatrix(q=parts["weight"], scale=column, zero=None, group_size=parts["weight"].shape[1])


def _int4_weight(tiles: LazyTensor | None, pair: LazyTensor, shape: tuple[int, int], place: str) -> LazyTensor:
    """Return the weights [out, in] fp32 of tiled words and their scales and zeros."""
    rows, columns = shape
    if tiles is None or not _are_int4(tiles, pair, rows, columns):
        found = "nothing" if tiles is None else list(tiles.shape)
        raise ModelFileError(
            f"{place}: weight is {found} and scales_and_zeros {list(pair.shape)}, which are no int4 tiles and scales "
            f"of {rows} rows and {columns} columns"
        )
    group, words = _padded(tiles) // pair.shape[0], tiles

    def compute(bounds: Bounds) -> Tensor:
        (top, bottom), (left, right) = bounds
        first = top // TILE_ROWS
        q = untiled(words[first : -(-bottom // TILE_ROWS)])[top - first * TILE_ROWS : bottom - first * TILE_ROWS]
        columns_of = torch.arange(left, right) // group
        scale, zero = pair[:][:, top:bottom].float()[columns_of].unbind(2)
        return (q[:, left:right].float() - 8) * scale.T + zero.T

    return Computed(shape, torch.float32, compute)


def _padded(tiles: LazyTensor) -> int:
    return tiles.shape[1] * tiles.shape[3] * 2 * TILE_COLUMNS


def _are_int4(tiles: LazyTensor, pair: LazyTensor, rows: int, columns: int) -> bool:
    """Return whether these are the words and the scales of so many rows and columns, perhaps padded."""
    return (
        len(tiles.shape) == 4
        and tiles.dtype == torch.int32
        and (tiles.shape[0] * TILE_ROWS, tiles.shape[2]) == (rows, 32)
        and 2 * tiles.shape[3] in INNER_TILES
        and columns <= _padded(tiles)
        and len(pair.shape) == 3
        and pair.dtype in SCALE_DTYPES
        and pair.shape[0] > 0
        and pair.shape[1:] == (rows, 2)
        and _padded(tiles) % pair.shape[0] == 0
    )


def untiled(tiles: Tensor) -> Tensor:
    """Return q uint8 [8 n, 32 k j] in 0 .. 15 of int32 tiles [n, k, 32, j].

    Lane 4r + c of a tile holds row r; in its word j, the nibble 4 odd + 2 second + upper is column
    32 j + 16 second + 8 upper + 2 c + odd.
    """
    n, k, _, words = tiles.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (tiles[..., None] >> shifts & 15).to(torch.uint8).view(n, k, 8, 4, words, 2, 2, 2)
    # from [tile, k, row, c, word, odd, second, upper] to [tile, row, k, word, second, upper, c, odd]
    return nibbles.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * n, 32 * k * words)
