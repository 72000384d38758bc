"""GGUF files (llama.cpp): header by our own parser, tensors dequantized as they are read.

F32, F16 and BF16 tensors are read as they are; every other type goes through `gguf.quants.dequantize` (the optional
extra `gguf`), whole rows at a time, and counts as float32. Rows are made of whole blocks, so a slice of rows reads
only these. Query and key rows of architecture `llama` stand in the order of interleaved RoPE.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgen.checkpoint.gguf_config import ROPE_FREQS, config_from_gguf
from fastgen.checkpoint.gguf_header import TensorPlace, read_header
from fastgen.checkpoint.lazy import Bounds, Checkpoint, FileTensor, LazyTensor
from fastgen.checkpoint.names import GGUF_LLAMA, GGUF_NEOX, assemble, main_dtype
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile, naming
from fastgen.tokenizer.base import Tokenizer

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # GGML type numbers: F32, F16, BF16
CHUNK_ELEMENTS = 1 << 22  # dequantized at a time; the library needs several arrays of this size


class QuantizedTensor(LazyTensor):
    """A tensor in blocks of a quantized GGML type, float32 once read. Slices of columns read their whole rows."""

    def __init__(self, file: RandomAccessFile, offset: int, shape: Sequence[int], row_bytes: int, kind: Any) -> None:
        super().__init__(shape, torch.float32)
        self.file, self.offset, self.row_bytes, self.kind = file, offset, row_bytes, kind

    def read(self, bounds: Bounds) -> torch.Tensor:
        from gguf.quants import dequantize

        assert len(self.shape) == 2, "quantized tensors are matrices"
        (top, bottom), (left, right) = bounds
        result = torch.empty(bottom - top, right - left)
        step = max(1, CHUNK_ELEMENTS // self.shape[1])
        for row in range(top, bottom, step):
            rows = min(step, bottom - row)
            blocks = self.file.read_tensor(self.offset + row * self.row_bytes, (rows, self.row_bytes), torch.uint8)
            whole = torch.from_numpy(dequantize(blocks.numpy(), self.kind))
            result[row - top : row - top + rows] = whole[:, left:right]
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
    assembled = assemble(config, tensors, scheme, path)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        dtype=main_dtype(assembled.values()),
        tensors=assembled,
        open_tokenizer=lambda: _open_tokenizer(header.metadata, path),
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
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ModelFileError(
            f"{file.path}: tensor {name!r} is quantized, which needs the `gguf` package: pip install 'fastgen[gguf]'"
        ) from error
    if place.type not in list(GGMLQuantizationType):
        raise ModelFileError(f"{file.path}: tensor {name!r} has unknown GGML type {place.type}")
    kind = GGMLQuantizationType(place.type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not _can_dequantize(kind, block_bytes):
        raise ModelFileError(f"{file.path}: tensor {name!r} has GGML type {kind.name}, which is not supported")
    if len(place.shape) != 2 or place.shape[1] % block:
        raise ModelFileError(
            f"{file.path}: tensor {name!r} of shape {list(place.shape)} is no matrix of {kind.name} blocks ({block})"
        )
    row_bytes = place.shape[1] // block * block_bytes
    return QuantizedTensor(file, place.offset, place.shape, row_bytes, kind), place.shape[0] * row_bytes


def _can_dequantize(kind: Any, block_bytes: int) -> bool:
    from gguf.quants import dequantize

    try:
        dequantize(torch.zeros(1, block_bytes, dtype=torch.uint8).numpy(), kind)
    except NotImplementedError:
        return False
    return True


def _open_tokenizer(metadata: Mapping[str, object], path: Path) -> Tokenizer:
    from fastgen.tokenizer.gguf_vocabulary import gguf_tokenizer

    return gguf_tokenizer(metadata, path)
