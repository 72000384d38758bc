"""GGUF files (llama.cpp): header by our own parser, tensors dequantized as they are read.

F32, F16 and BF16 tensors are read as they are; every other type goes through `gguf.quants.dequantize` (the optional
extra `gguf`), and counts as float32. Rows are made of whole blocks, so slices read only the blocks that they touch.
Query and key rows of architecture `llama` stand in the order of interleaved RoPE.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from fastgen.checkpoint.gguf_config import ROPE_FREQS, config_from_gguf
from fastgen.checkpoint.gguf_header import TensorPlace, read_header
from fastgen.checkpoint.lazy import Bounds, Checkpoint, FileTensor, LazyTensor
from fastgen.checkpoint.names import GGUF_LLAMA, GGUF_NEOX, assemble, main_dtype
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile, naming
from fastgen.tokenizer.gguf_vocabulary import tokenizer_from_gguf

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # GGML type numbers: F32, F16, BF16
CHUNK_ELEMENTS = 1 << 22  # dequantized at a time; the library needs several arrays of this size


class QuantizedTensor(LazyTensor):
    """A matrix in blocks of a quantized GGML type, float32 once read: `block` weights of a row each."""

    def __init__(
        self,
        file: RandomAccessFile,
        offset: int,
        shape: tuple[int, ...],
        row_bytes: int,
        block: int,
        dequantize: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        super().__init__(shape, torch.float32)
        self.blocks = FileTensor(file, offset, (shape[0], row_bytes), torch.uint8)
        self.block, self.block_bytes = block, row_bytes * block // shape[1]
        self.dequantize = dequantize

    def read(self, bounds: Bounds) -> torch.Tensor:
        (top, bottom), (left, right) = bounds
        result = torch.empty(bottom - top, right - left)
        first, last = left // self.block, -(-right // self.block)
        step = max(1, CHUNK_ELEMENTS // self.shape[1])
        for row in range(top, bottom, step):
            rows = min(step, bottom - row)
            blocks = self.blocks[row : row + rows, first * self.block_bytes : last * self.block_bytes]
            with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
                whole = torch.from_numpy(self.dequantize(blocks.numpy()))
            start = first * self.block
            result[row - top : row - top + rows] = whole[:, left - start : right - start]
        return result


def open_gguf(path: Path) -> Checkpoint:
    """Open the GGUF file `path`. Raises `ModelFileError` for damage and for whatever is not supported, by name."""
    file = RandomAccessFile(path)
    header = read_header(file)
    tensors = _tensors(file, header.tensors)
    with naming(path):
        config = config_from_gguf(header.metadata, tensors)
    scheme = GGUF_LLAMA if header.metadata["general.architecture"] == "llama" else GGUF_NEOX
    tensors.pop(ROPE_FREQS, None)  # already in the config
    dequantized = any(isinstance(tensor, QuantizedTensor) for tensor in tensors.values())
    assembled = assemble(config, tensors, scheme, path)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        dtype=main_dtype(assembled.values()),
        tensors=assembled,
        open_tokenizer=lambda: tokenizer_from_gguf(header.metadata, path),
        dequantized=dequantized,
    )


def _tensors(file: RandomAccessFile, places: Mapping[str, TensorPlace]) -> dict[str, LazyTensor]:
    """Return the tensors, unread, once all lie within the file and apart from each other."""
    tensors: dict[str, LazyTensor] = {}
    ends: list[tuple[int, int, str]] = []
    for name, place in places.items():
        if place.type in PLAIN:
            tensors[name] = FileTensor(file, place.offset, place.shape, PLAIN[place.type])
            size = tensors[name].nbytes
        else:
            tensors[name], size = _quantized(file, name, place)
        ends.append((place.offset, place.offset + size, name))
    previous = 0
    for start, end, name in sorted(ends):
        if start < previous or end > file.size:
            raise ModelFileError(
                f"{file.path}: tensor {name!r} takes bytes {start} to {end} of a file of {file.size}, the one before "
                f"it ends at {previous}: the file is truncated or damaged; fetch it again"
            )
        previous = end
    return tensors


def _quantized(file: RandomAccessFile, name: str, place: TensorPlace) -> tuple[QuantizedTensor, int]:
    """Return the tensor at `place`, and its size in bytes."""
    gguf = _library(file.path)
    if place.type not in list(gguf.GGMLQuantizationType):
        raise ModelFileError(f"{file.path}: tensor {name!r} has unknown GGML type {place.type}")
    kind = gguf.GGMLQuantizationType(place.type)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    dequantize = partial(gguf.quants.dequantize, qtype=kind)
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8))
    except NotImplementedError as error:
        raise ModelFileError(f"{file.path}: tensor {name!r} has GGML type {kind.name}: not supported") from error
    if len(place.shape) != 2 or place.shape[1] % block:
        raise ModelFileError(
            f"{file.path}: tensor {name!r} of shape {list(place.shape)} is no matrix of {kind.name} blocks of {block}"
        )
    row_bytes = place.shape[1] // block * block_bytes
    return QuantizedTensor(file, place.offset, place.shape, row_bytes, block, dequantize), place.shape[0] * row_bytes


def _library(path: Path) -> ModuleType:
    """Return the `gguf` package, an optional extra that only quantized files need."""
    try:
        import gguf.quants  # noqa: PLC0415
    except ImportError as error:
        raise ModelFileError(f"{path}: is quantized; to read it: pip install 'fastgen[gguf]'") from error
    return gguf
