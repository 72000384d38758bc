"""Writing safetensors files tensor by tensor; the library takes all tensors of a file at once, and copies them.

Format: https://github.com/safetensors/safetensors#format.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint.safetensors_file import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written: what it is, and how to get it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """Return the entry of a tensor that is there."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, entries: Sequence[Entry], written: Callable[[int], None] = lambda count: None
) -> None:
    """Write `entries`, of CPU tensors, in their order; `written` is called with the bytes of each as it is there."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for entry in entries:
            tensor = entry.read()
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), f"{entry.name}: not as announced"
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            written(entry.nbytes)
