"""PyTorch's own files (`.bin`, `.pth`): the tensors' places from the pickle, their bytes by positioned reads.

Such a file is a zip archive: `data.pkl`, which says what the tensors are, and one stored (uncompressed) record for
each storage. The pickle is read with `weights_only=True`, which admits nothing but tensors and containers, and onto
the meta device, for which PyTorch 2.11 and newer read no storage but note where it lies (`_checkpoint_offset`).
That place is believed only where the archive's own directory has a record of just that size; then it is read like
any other file, without a memory map. In archives of a newer kind PyTorch would work the places out from the order and
the sizes of the storages, not look up the records by their names; it is not let see which kind it reads.
"""

import io
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastgen.checkpoint.lazy import Bounds, FileTensor, LazyTensor
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

END = struct.Struct("<4s8xI6x")  # of a zip archive: signature, ..., size of the directory
LOCATOR, END64 = struct.Struct("<4s4xQ4x"), struct.Struct("<4s36xQ8x")  # in front of it, where the archive has them
UNKNOWN = 0xFFFFFFFF  # a size that `END64` tells
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: signature, ..., lengths of the name and the extra field
UTF8_FLAG = 0x800  # of a zip record: how its name is spelled
KNOWN_FLAGS = UTF8_FLAG | 0x8  # and that sizes follow the bytes; the others are of encryption and patches
KIND = b"/.format_version"
FOLDER = 0x10  # of a zip record's attributes: PyTorch reads nothing of such a one, and says nothing
MAX_PICKLE = MAX_DIRECTORY = 1 << 20  # bytes; either describes 3,000 tensors, a hostile pickle takes a second

# What PyTorch's unpickler was seen to raise for damaged archives; all of it means the same to the user.
LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    OSError,
    MemoryError,
    struct.error,
)


def looks_like_torch(start: bytes) -> bool:
    """Return whether a file's first bytes are those of a zip archive or of a bare pickle."""
    return start.startswith((b"PK\3\4", b"\x80\x02"))


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of the PyTorch file `path`, unread. Raises `ModelFileError`; executes nothing."""
    file = RandomAccessFile(path)
    if file.read(0, min(2, file.size)) == b"\x80\x02":
        raise ModelFileError(
            f"{path}: a PyTorch file in the form of before version 1.6; load it with torch.load and save it again"
        )
    records, directory = _records(file)
    state = _load(file, directory)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ModelFileError(f"{path}: holds a {type(state).__name__} where a dict of tensors by name is expected")
    return {name: _lazy(file, records, name, value) for name, value in state.items()}


class StridedTensor(LazyTensor):
    """A tensor whose elements do not lie row by row: a transposed view, say. Reads from the first to the last element
    of a slice."""

    def __init__(
        self,
        file: RandomAccessFile,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(shape, dtype)
        self.file, self.offset, self.strides = file, offset, tuple(strides)

    def read(self, bounds: Bounds) -> torch.Tensor:
        shape = [stop - start for start, stop in bounds]
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype)
        first = sum(start * stride for (start, _), stride in zip(bounds, self.strides, strict=True))
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        elements = self.file.read_tensor(self.offset + first * self.dtype.itemsize, (span,), self.dtype)
        return elements.as_strided(shape, self.strides).clone(memory_format=torch.contiguous_format)


def _records(file: RandomAccessFile) -> tuple[dict[int, int], range]:
    """Return the size of every record of the archive by the offset of its bytes, and where its directory lies."""
    _check_directory(file)
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries, directory = archive.infolist(), range(archive.start_dir, file.size)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise ModelFileError(f"{file.path}: damaged or truncated zip archive: {error}; fetch it again") from error
    records = {}
    for entry in entries:
        name, place = entry.filename.rpartition("/")[2], f"{file.path}: record {entry.filename!r:.100}"
        if name == "constants.pkl":
            raise ModelFileError(f"{file.path}: a TorchScript program, not a checkpoint; save its state_dict instead")
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & ~KNOWN_FLAGS
        if plain and (entry.compress_size != entry.file_size or entry.external_attr & FOLDER):
            raise ModelFileError(f"{place} is of two sizes, or a folder: damaged; fetch the file again")
        if not plain or (name == "data.pkl" and entry.file_size > MAX_PICKLE):
            raise ModelFileError(f"{place} is compressed, encrypted or too large; save the file again with torch.save")
        spelled = entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF8_FLAG else "cp437", "replace")
        header = file.read(entry.header_offset, LOCAL_HEADER.size + len(spelled))
        signature, *lengths = LOCAL_HEADER.unpack_from(header)
        # PyTorch looks records up by name; a directory that calls them otherwise than they do themselves is damaged.
        if signature != b"PK\3\4" or lengths[0] != len(spelled) or header[LOCAL_HEADER.size :] != spelled:
            raise ModelFileError(f"{place} is damaged; fetch the file again")
        offset = entry.header_offset + LOCAL_HEADER.size + sum(lengths)
        if name == "byteorder" and file.read(offset, min(entry.file_size, 6)) != b"little":
            raise ModelFileError(f"{place} is not 'little'; save the file again on a little-endian machine")
        records[offset] = entry.file_size
    return records, directory


def _check_directory(file: RandomAccessFile) -> None:
    """Raise for a directory that is longer than any of a checkpoint, before somebody reads it as a whole.

    Python and PyTorch believe different ones of the two sizes that large archives give, and Python looks for the second
    in front of its locator, wherever that points.
    """
    start = max(file.size - END.size, 0)
    signature, size = END.unpack(file.read(start, END.size))
    sizes = [] if size == UNKNOWN else [size]
    if start >= LOCATOR.size:
        mark, place = LOCATOR.unpack(file.read(start - LOCATOR.size, LOCATOR.size))
        if mark == b"PK\6\7":
            in_front = place == start - LOCATOR.size - END64.size
            sizes.append(END64.unpack(file.read(place, END64.size))[1] if in_front else UNKNOWN)
    if signature != b"PK\5\6" or not sizes or max(sizes) > MAX_DIRECTORY:
        raise ModelFileError(f"{file.path}: damaged or truncated zip archive: no directory at its end; fetch it again")


class _ByName(io.FileIO):
    """An archive in whose directory the record `KIND` has another name."""

    def __init__(self, path: Path, directory: bytes, start: int) -> None:
        super().__init__(path)
        self._places = [start + found.end() - 1 for found in re.finditer(re.escape(KIND), directory)]

    def readinto(self, buffer: "Buffer", /) -> int:
        start, view = self.tell(), memoryview(buffer)
        count = super().readinto(view) or 0
        for place in self._places:
            if start <= place < start + count:
                view[place - start] = ord("_")
        return count

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        data = bytearray(max(rest if size is None or size < 0 else min(size, rest), 0))
        return bytes(data[: self.readinto(data)])


def _load(file: RandomAccessFile, directory: range) -> object:
    path, names = file.path, bytes(file.read(directory.start, len(directory)))
    try:
        with _ByName(path, names, directory.start) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle: whatever matters in it is an error
            return torch.load(stream, map_location="meta", weights_only=True)
    except LOAD_ERRORS as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        problem = (
            f"its pickle asks for {refused[1]}, which tensors do not need; nothing was executed"
            if refused
            else f"its pickle is damaged ({type(error).__name__}); fetch it again"
        )
        raise ModelFileError(f"{path}: {problem}") from error


def _lazy(file: RandomAccessFile, records: Mapping[int, int], name: str, value: object) -> LazyTensor:
    place = f"{file.path}: {name!r:.100}"
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
        raise ModelFileError(f"{place} is a {type(value).__name__} where a dense tensor is expected")
    storage = value.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None or records.get(start) != storage.nbytes():
        raise ModelFileError(f"{place} has no record of {storage.nbytes()} bytes: damaged, or packed by another tool")
    offset = start + value.storage_offset() * value.dtype.itemsize
    if value.is_contiguous():
        return FileTensor(file, offset, value.shape, value.dtype)
    return StridedTensor(file, offset, value.shape, value.stride(), value.dtype)
