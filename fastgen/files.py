"""Reading files whose size and content nobody vouches for.

Weights are read with `pread` into memory of our own, never through a memory map: a file that is truncated while
it is mapped kills the process with SIGBUS, a short read is an error that we can name. Peak memory while loading
is then one tensor, and the page cache still serves the second load.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastgen.errors import ModelFileError

CHUNK = 1 << 30  # Linux transfers at most 2 GiB a call


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` in front of a `ModelFileError` about values that were read out of it, unless it stands there."""
    try:
        yield
    except ModelFileError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ModelFileError(f"{path}: {error}") from error


class RandomAccessFile:
    """A regular file open for positioned reads; raises `ModelFileError` where it ends too early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK, opening a FIFO would wait for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ModelFileError(f"{path}: cannot be opened: {reason}") from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            self._descriptor = -1
            raise ModelFileError(f"{path}: not a regular file")
        self.size = status.st_size

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, count: int) -> bytearray:
        """Return `count` bytes from `offset`."""
        buffer = bytearray(self._checked(offset, count))
        self._fill(offset, memoryview(buffer))
        return buffer

    def read_tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a fresh CPU tensor of `shape` and `dtype`, filled with the bytes from `offset`."""
        count = dtype.itemsize
        for size in shape:
            count *= size
        self._checked(offset, count)
        tensor = torch.empty(shape, dtype=dtype)
        if count:
            self._fill(offset, memoryview(tensor.view(-1).view(torch.uint8).numpy().data))
        return tensor

    def _checked(self, offset: int, count: int) -> int:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ModelFileError(
                f"{self.path}: {count} bytes are expected at offset {offset}, the file ends at {self.size}: "
                "it is truncated or damaged; fetch it again"
            )
        return count

    def _fill(self, offset: int, view: memoryview) -> None:
        while view:
            try:
                got = os.preadv(self._descriptor, [view[:CHUNK]], offset)
            except OSError as error:
                raise ModelFileError(f"{self.path}: reading failed at offset {offset}: {error.strerror}") from error
            if not got:
                raise ModelFileError(f"{self.path}: ended at offset {offset} while it was read; fetch it again")
            offset += got
            view = view[got:]
