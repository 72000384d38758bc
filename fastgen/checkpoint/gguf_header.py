"""GGUF's header: metadata and tensor places, parsed under bounds of our own.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Every count and
length comes from the file and is checked against what the file can hold before anything is read or allocated: the
`gguf` library (0.19) loops for minutes on crafted files of 57 bytes, and maps what it reads.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile

MAGIC = b"GGUF"
MAX_HEADER = 32_000_000  # bytes; a vocabulary of 262,144 tokens with its merges takes about 10 million
MAX_ITEMS = 1 << 20  # of all arrays; such a vocabulary has as many as that: texts, types, and merges or scores
MAX_ENTRIES = 1 << 15  # metadata fields, and tensors; the largest Llama has 1,138
MAX_NAME = 256  # bytes of a key or of a tensor's name, of which GGML takes 63
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**48
WINDOW = 1 << 20  # bytes read at a time

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: `shape` row-major (the file stores it reversed), `type` GGML's number of its format."""

    shape: tuple[int, ...]
    type: int
    offset: int  # in the file


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself. Arrays among the metadata are lists; tensors stand in the file's order."""

    metadata: dict[str, object]
    tensors: dict[str, TensorPlace]


def read_header(file: RandomAccessFile) -> Header:
    """Parse the header of a GGUF file. Raises `ModelFileError` with the field at fault and its place."""
    cursor = _Cursor(file)
    if cursor.take(4, "the magic number") != MAGIC:
        raise ModelFileError(f"{file.path}: does not begin with {MAGIC.decode()}: not a GGUF file")
    version = cursor.u32("the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian" if swapped in (2, 3) else f"version {version}"
        raise ModelFileError(f"{file.path}: {what} GGUF is not supported, only little-endian versions 2 and 3")
    tensor_count = cursor.count("the number of tensors", 24, MAX_ENTRIES)
    field_count = cursor.count("the number of metadata fields", 13, MAX_ENTRIES)
    metadata: dict[str, object] = {}
    for _ in range(field_count):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise ModelFileError(f"{file.path}: metadata field {key!r} occurs twice")
        metadata[key] = cursor.value(key)
    places = {}
    for _ in range(tensor_count):
        name = cursor.name("a tensor's name")
        if name in places:
            raise ModelFileError(f"{file.path}: tensor {name!r} occurs twice")
        places[name] = _place(cursor, name)
    alignment = _alignment(metadata, file.path)
    data = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, place in places.items():
        if place.offset % alignment:
            raise ModelFileError(f"{file.path}: tensor {name!r} starts at {place.offset}, no multiple of {alignment}")
        tensors[name] = TensorPlace(place.shape, place.type, data + place.offset)
    return Header(metadata, tensors)


def _place(cursor: "_Cursor", name: str) -> TensorPlace:
    """Read a tensor's entry; its offset is relative to the data, which start behind the header."""
    dimensions = cursor.u32(f"the number of dimensions of {name}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ModelFileError(f"{cursor.path}: tensor {name!r} has {dimensions} dimensions, expected 1 to 4")
    shape = tuple(cursor.u64(f"the shape of {name}") for _ in range(dimensions))[::-1]
    elements = 1
    for size in shape:
        elements *= size
        if not 0 < elements <= MAX_ELEMENTS:
            raise ModelFileError(f"{cursor.path}: tensor {name!r} has shape {list(shape)}")
    return TensorPlace(shape, cursor.u32(f"the type of {name}"), cursor.u64(f"the offset of {name}"))


def _alignment(metadata: dict[str, object], path: Path) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
        raise ModelFileError(f"{path}: general.alignment is {alignment!r}, expected a power of two")
    return alignment


class _Cursor:
    """Reads a header front to back, through a window on the file, and never beyond the file or `MAX_HEADER`."""

    def __init__(self, file: RandomAccessFile) -> None:
        self.path = file.path
        self._file = file
        self._end = min(file.size, MAX_HEADER)
        self._window = b""
        self._start = 0  # of the window in the file
        self._position = 0  # in the window
        self._items_left = MAX_ITEMS

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._start + self._position

    def take(self, count: int, what: str) -> bytes:
        """Return the next `count` bytes, which hold `what`."""
        stop = self._position + count
        if stop > len(self._window):
            self._start += self._position
            if self._start + count > self._end:
                raise ModelFileError(
                    f"{self.path}: {what} at offset {self._start} would take {count} bytes, where the header can "
                    f"have {self._end - self._start}: the file is truncated or damaged; fetch it again"
                )
            self._window = bytes(self._file.read(self._start, min(max(count, WINDOW), self._end - self._start)))
            self._position, stop = 0, count
        taken = self._window[self._position : stop]
        self._position = stop
        return taken

    def u32(self, what: str) -> int:
        return int(U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(U64.unpack(self.take(8, what))[0])

    def count(self, what: str, size: int, limit: int) -> int:
        """Return a count of items, at most `limit`, that take at least `size` bytes each and must fit into the file."""
        count = self.u64(what)
        if count > limit or count * size > self._end - self.offset:
            raise ModelFileError(
                f"{self.path}: {what} is {count}, more than the file can hold or a header has: truncated or damaged; "
                "fetch it again"
            )
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{self.path}: {what} before offset {self.offset} is not UTF-8: {error}") from error

    def name(self, what: str) -> str:
        """Return a string that is short enough to be a name."""
        name = self.string(what)
        if len(name) > MAX_NAME:
            raise ModelFileError(f"{self.path}: {what} before offset {self.offset} has {len(name)} characters")
        return name

    def value(self, key: str) -> object:
        """Return the metadata value of `key`, whose type stands before it."""
        kind = self.u32(f"the type of {key}")
        if kind != ARRAY:
            return self._reader(kind, key)()
        kind = self.u32(f"the type of the items of {key}")
        size = struct.calcsize(SCALARS[kind]) if kind in SCALARS else U64.size
        count = self.count(f"the length of {key}", size, self._items_left)
        self._items_left -= count
        if kind in SCALARS:
            return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size, key)))
        read = self._reader(kind, key)
        return [read() for _ in range(count)]

    def _reader(self, kind: int, key: str) -> Callable[[], object]:
        if kind == STRING:
            return lambda: self.string(key)
        if kind not in SCALARS:
            # Nested arrays included: the format has them, no writer and no other reader does.
            raise ModelFileError(f"{self.path}: metadata field {key!r} has values of unknown type {kind}")
        layout = struct.Struct(f"<{SCALARS[kind]}")
        return lambda: layout.unpack(self.take(layout.size, key))[0]
