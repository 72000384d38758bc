"""Lazy, sliceable tensors, and what every checkpoint format gives.

A `LazyTensor` knows its shape and dtype; `tensor[:]`, `tensor[a:b]` and `tensor[:, a:b]` read just these elements.
Nothing else is read, so a tensor-parallel rank touches only its own slices, and host memory stays near one tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch

from fastgen.config import ModelConfig
from fastgen.files import RandomAccessFile
from fastgen.tokenizer.base import Tokenizer
from quantize.format import WeightFormat

Bounds = tuple[tuple[int, int], ...]
"""For every dimension the first index and the one behind the last."""


class LazyTensor(ABC):
    """A tensor that is read when it is indexed. Index with slices of step 1; trailing dimensions may be left out."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, once read."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        slices = index if isinstance(index, tuple) else (index,)
        assert len(slices) <= len(self.shape), f"{len(slices)} slices for a tensor of {len(self.shape)} dimensions"
        bounds = []
        for dimension, size in enumerate(self.shape):
            start, stop, step = (slices[dimension] if dimension < len(slices) else slice(None)).indices(size)
            assert step == 1, f"slices of lazy tensors have step 1, not {step}"
            bounds.append((start, max(start, stop)))
        return self.read(tuple(bounds))

    @abstractmethod
    def read(self, bounds: Bounds) -> torch.Tensor:
        """Return a fresh tensor with the elements within `bounds`."""


class FileTensor(LazyTensor):
    """A row-major tensor at an offset of a file."""

    def __init__(self, file: RandomAccessFile, offset: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.file, self.offset = file, offset

    def read(self, bounds: Bounds) -> torch.Tensor:
        if len(self.shape) < 2:
            start, stop = bounds[0] if bounds else (0, 1)
            return self._rows(start, (stop - start,) if bounds else ())
        (top, bottom), *inner = bounds
        if all(bound == (0, size) for bound, size in zip(inner, self.shape[1:], strict=True)):
            return self._rows(top, (bottom - top, *self.shape[1:]))
        assert len(self.shape) == 2, "columns can be sliced in matrices only"
        (left, right), (_, width) = inner[0], self.shape
        rows = torch.empty(bottom - top, right - left, dtype=self.dtype)
        for row in range(top, bottom):  # a system call a row: a rank's columns cost their own bytes, not the file's
            start = self.offset + (row * width + left) * self.dtype.itemsize
            rows[row - top] = self.file.read_tensor(start, (right - left,), self.dtype)
        return rows

    def _rows(self, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        stride = self.dtype.itemsize
        for size in self.shape[1:]:
            stride *= size
        return self.file.read_tensor(self.offset + first * stride, shape, self.dtype)


class Concat(LazyTensor):
    """Tensors one behind the other along a dimension: wqkv is q, k and v; w_gate_up is gate and up.

    Parts of several dtypes are read in the one that holds the values of all.
    """

    def __init__(self, parts: Sequence[LazyTensor], dimension: int = 0) -> None:
        shape = list(parts[0].shape)
        shape[dimension] = sum(part.shape[dimension] for part in parts)
        super().__init__(shape, reduce(torch.promote_types, (part.dtype for part in parts)))
        rests = {part.shape[:dimension] + part.shape[dimension + 1 :] for part in parts}
        assert len(rests) == 1, "parts that differ in another dimension"
        self.parts, self.dimension = tuple(parts), dimension

    def read(self, bounds: Bounds) -> torch.Tensor:
        before, (start, stop), after = bounds[: self.dimension], bounds[self.dimension], bounds[self.dimension + 1 :]
        pieces, first = [], 0
        for part in self.parts:
            size = part.shape[self.dimension]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                pieces.append(part.read((*before, (low, high), *after)).to(self.dtype))
            first += size
        return torch.cat(pieces, self.dimension) if pieces else self.parts[0].read((*before, (0, 0), *after))


class Computed(LazyTensor):
    """A tensor that `compute` makes, for given bounds, of what other lazy tensors read."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, compute: Callable[[Bounds], torch.Tensor]) -> None:
        super().__init__(shape, dtype)
        self.compute = compute

    def read(self, bounds: Bounds) -> torch.Tensor:
        return self.compute(bounds)


class HalfSplit(LazyTensor):
    """Query or key rows stored for interleaved RoPE (pairs 2j, 2j+1), read in the half-split order (j, j + d/2)."""

    def __init__(self, source: LazyTensor, head_dim: int) -> None:
        super().__init__(source.shape, source.dtype)
        self.source, self.head_dim = source, head_dim

    def read(self, bounds: Bounds) -> torch.Tensor:
        (start, stop), *inner = bounds
        d = self.head_dim
        first, last = start // d * d, -(-stop // d) * d
        rows = self.source.read(((first, last), *inner))
        halves = rows.view((last - first) // d, d // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        return halves[start - first : stop - first]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: what the model is, its tensors by our names, and how to get its tokenizer."""

    path: Path
    format: str
    config: ModelConfig
    dtype: torch.dtype  # that most of the weights are read in (dequantized ones count as float32)
    tensors: Mapping[str, LazyTensor]
    open_tokenizer: Callable[[], Tokenizer]
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)  # of the linears that it holds quantized
    dequantized: bool = False  # whether weights are, while they are read: no dtype is that of what is stored
    notes: tuple[str, ...] = ()  # what its user should know, a line each
