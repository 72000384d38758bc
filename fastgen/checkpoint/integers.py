"""Quantized matrices of any tool in one view, and what becomes of them: our layout where it fits, else plain weights.

    w[o, i] = (q[o, i] - zero[o, g]) * scale[o, g],    g = i // group_size, unless `group_of` says otherwise

A reader (`compressed_tensors`, `gptq`, `awq`, `gpt_fast`) says what tensors a linear has on disk, which of our formats
keeps its integers as they are, and how to view them. Groups that none of ours has take a narrower one with the scale
repeated; whatever else does not fit (other orders, 8 bits in groups) is dequantized while it is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.checkpoint.lazy import Bounds, Computed, LazyTensor
from fastgen.errors import ModelFileError
from quantize import int4, int8
from quantize.format import GROUP_SIZES, INT8, WeightFormat

Leaves = Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
"""Shape and possible dtypes of tensors, by the last part of their names."""

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK_ELEMENTS = 1 << 22  # dequantized at a time


@dataclass(frozen=True, kw_only=True)
class IntegerMatrix:
    """A quantized matrix [out, in]; zero is at the middle of the range of both q and zero: -8 .. 7, or -128 .. 127."""

    q: LazyTensor  # int8 [out, in]
    scale: LazyTensor  # float [out, groups]
    zero: LazyTensor | None  # int8 [out, groups]; None: 0 everywhere
    group_size: int
    group_of: Tensor | None = None  # int64 [in]: the group of every column, where they do not follow each other
    packed: LazyTensor | None = None  # q packed as in `quantize.int4`, where the file has that


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
    """A linear as a file has it.

    `leaves` are the tensors that stand for its weight, `format` is ours that keeps the integers, None if there is none,
    `kind` says in a word or two what it is, and `view` makes the matrix of the tensors by their leaves.
    """

    leaves: Leaves
    format: WeightFormat | None
    kind: str
    view: Callable[[Mapping[str, LazyTensor]], IntegerMatrix]


def fitting_format(
    *, bits: int, columns: int, group_size: int, symmetric: bool, in_order: bool = True
) -> WeightFormat | None:
    """Return our format that keeps the integers of such a matrix, None if there is none."""
    one_group = group_size >= columns
    if not (one_group or in_order):
        return None
    if bits == INT8.bits:
        return INT8 if one_group and symmetric else None
    size = columns if one_group else group_size
    fitting = [ours for ours in GROUP_SIZES if size % ours == 0 and columns % ours == 0]
    if bits != 4 or not fitting:
        return None
    return WeightFormat(bits=4, group_size=max(fitting), symmetric=symmetric)


def in_memory(matrix: IntegerMatrix, weight_format: WeightFormat) -> dict[str, LazyTensor]:
    """Return the tensors of the quantized linear (`quantize.int8`, `quantize.int4`), integers unchanged."""
    if weight_format == INT8:
        return {"weight": matrix.q, "weight_scale": matrix.scale}
    assert weight_format.group_size is not None, "int4 weights have groups"
    rows, columns = matrix.q.shape
    groups, times = weight_format.groups(columns), matrix.group_size // weight_format.group_size
    packed = matrix.packed or Computed((rows, columns // int4.PER_WORD), torch.int32, lambda at: _pack(matrix.q, at))
    tensors = {"weight_packed": packed, "weight_scale": _repeated(matrix.scale, groups, times)}
    return tensors if matrix.zero is None else tensors | {"weight_zero_point": _repeated(matrix.zero, groups, times)}


def dequantized(matrix: IntegerMatrix) -> LazyTensor:
    """Return the weights [out, in], fp32, computed as they are read."""
    return Computed(matrix.q.shape, torch.float32, lambda bounds: _dequantize(matrix, bounds))


def columns_out_of_order(
    index: LazyTensor, columns: int, group_size: int, name: str, *, unset: int | None = None
) -> Tensor | None:
    """Return the group of every column by a file's index, None where they stand in order, or one is `unset`.

    An index that is not int32 [columns] counts as in order: whoever checks shapes tells. Raises `ModelFileError` for
    groups that there are not; `name` is the linear's.
    """
    if index.shape != (columns,) or index.dtype != torch.int32:
        return None
    group_of = index[:].long()
    if unset is not None and unset in group_of:
        return None
    groups = -(-columns // group_size)
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise ModelFileError(f"{name}: its columns are of groups {group_of.min()} to {group_of.max()}, of {groups}")
    return None if torch.equal(group_of, torch.arange(columns) // group_size) else group_of


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the values int8 [n, 32 / bits * m] in int32 words [n, m], low bits first, less half their range."""
    if bits == INT8.bits:
        return int8.unpack(words, words.shape[1] * 4)
    return int4.unpack(words).to(torch.int8)


def transposed(matrix: LazyTensor) -> LazyTensor:
    """Return a lazy [n, m] of a lazy [m, n]."""
    m, n = matrix.shape
    return Computed((n, m), matrix.dtype, lambda at: turned(matrix[slice(*at[1]), slice(*at[0])]))


def turned(matrix: Tensor) -> Tensor:
    """Return a transposed copy; `.T.contiguous()` of one row or column would keep strides that no view can take."""
    return matrix.T.clone(memory_format=torch.contiguous_format)


def _pack(q: LazyTensor, bounds: Bounds) -> Tensor:
    rows, (left, right) = bounds
    return int4.pack(q.read((rows, (left * int4.PER_WORD, right * int4.PER_WORD))))


def _repeated(values: LazyTensor, groups: int, times: int) -> LazyTensor:
    """Return values of `groups` groups, `times` for each that the file has; its last one may be narrower."""
    rows = values.shape[0]
    if times == 1:
        return values

    def compute(bounds: Bounds) -> Tensor:
        (top, bottom), (left, right) = bounds
        first = left // times
        wide = values[top:bottom, first : -(-right // times)].repeat_interleave(times, 1)
        return wide[:, left - first * times : right - first * times].contiguous()

    return Computed((rows, groups), values.dtype, compute)


def _dequantize(matrix: IntegerMatrix, bounds: Bounds) -> Tensor:
    (top, bottom), (left, right) = bounds
    group = torch.arange(left, right) // matrix.group_size if matrix.group_of is None else matrix.group_of[left:right]
    result = torch.empty(bottom - top, right - left)
    step = max(1, CHUNK_ELEMENTS // matrix.q.shape[1])
    for row in range(top, bottom, step):
        rows = slice(row, min(row + step, bottom))
        weight = matrix.q[rows, left:right].float()
        if matrix.zero is not None:
            weight -= matrix.zero[rows].float()[:, group]
        result[row - top : rows.stop - top] = weight * matrix.scale[rows].float()[:, group]
    return result
