"""The safetensors container: header checks of our own, then positioned reads.

The format (https://github.com/safetensors/safetensors#format): a little-endian u64 N, N bytes of JSON that give
every tensor's dtype, shape and [begin, end) in the data, then the data, without holes and to the file's end.
The library's `safe_open` checks the same, but maps the file, and a file truncated under its map kills the process
with SIGBUS; hence our own reader.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch

from fastgen.checkpoint.lazy import FileTensor
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile
from fastgen.json_file import MAX_JSON, parse_json

FORMAT_LIMIT = 100_000_000  # bytes of a header that the format allows; we take `MAX_JSON`
MAX_SIZE = 2**48  # elements in a dimension and in a tensor: beyond any file, below any overflow

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def looks_like_safetensors(start: bytes) -> bool:
    """Return whether a file's first nine bytes can begin a safetensors file."""
    return len(start) >= 9 and int.from_bytes(start[:8], "little") <= FORMAT_LIMIT and start[8:9] == b"{"


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of the safetensors file `path`, unread. Raises `ModelFileError` for any damage."""
    file = RandomAccessFile(path)
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_JSON or 8 + length > file.size:
        raise ModelFileError(
            f"{path}: the header claims {length} bytes in a file of {file.size}, expected at most {MAX_JSON}: "
            "not a safetensors file, or damaged; fetch it again"
        )
    header = parse_json(file.read(8, length), path, strict=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError(f"{path}: __metadata__ in its header is no map of texts: damaged; fetch it again")
    tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
    _check_coverage(file, 8 + length, tensors)
    return tensors


def _tensor(file: RandomAccessFile, data: int, name: str, entry: object) -> FileTensor:
    place = f"{file.path}: tensor {name!r:.100}"
    fields = entry if isinstance(entry, Mapping) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelFileError(f"{place} has dtype {dtype!r:.100}, known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ModelFileError(f"{place} has shape {shape!r:.100} and data_offsets {offsets!r:.100}")
    size = DTYPES[dtype].itemsize
    for dimension in shape:
        size *= dimension
        if size > MAX_SIZE:
            raise ModelFileError(f"{place} has shape {shape!r:.100}, larger than any file")
    begin, end = offsets
    if end - begin != size:
        raise ModelFileError(f"{place} ({dtype} {shape!r:.100}) takes {size} bytes, but data_offsets are {offsets}")
    return FileTensor(file, data + begin, shape, DTYPES[dtype])


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)


def _check_coverage(file: RandomAccessFile, data: int, tensors: Mapping[str, FileTensor]) -> None:
    """Check that the tensors lie one behind the other, from the start of the data to the end of the file."""
    position = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            kind = "overlaps the one before it" if tensor.offset < position else "leaves a hole before it"
            raise ModelFileError(f"{file.path}: tensor {name!r:.100} {kind}: the file is damaged; fetch it again")
        position += tensor.nbytes
    if position != file.size:
        raise ModelFileError(
            f"{file.path}: the file has {file.size} bytes, its header describes {position}: "
            "it is truncated or damaged; fetch it again"
        )
