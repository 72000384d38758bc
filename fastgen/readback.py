"""Results on their way to the host: at once on a CPU; on a GPU one launch behind the device, which so never waits."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

HOST_LAG = 1  # results that are queued on a GPU before the oldest is read

Result = TypeVar("Result")
Note = TypeVar("Note")


class Readback(Generic[Result, Note]):
    """A queue of named tuples of tensors, each with a note of the host's own."""

    def __init__(self, device: torch.device) -> None:
        self.lags = device.type == "cuda"  # whether results come behind their time
        self._pending: deque[tuple[Result, Note, torch.cuda.Event]] = deque()

    def push(self, result: Result, note: Note) -> Iterator[tuple[Result, Note]]:
        """Queue a result and yield those that are due, on the host."""
        if not self.lags:
            yield result, note
            return
        tensors: Any = result
        host = type(tensors)(*(None if tensor is None else _to_pinned(tensor) for tensor in tensors))
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, note, event))
        if len(self._pending) > HOST_LAG:
            oldest, its_note, copied = self._pending.popleft()
            copied.synchronize()
            yield oldest, its_note

    def waiting(self) -> list[Note]:
        """Return the notes of what has not been yielded yet."""
        return [note for _, note, _ in self._pending]


class Mark(NamedTuple):
    """A moment: of the device where it is a GPU, else of the host."""

    host: float
    device: torch.cuda.Event | None

    def until(self, later: "Mark") -> float:
        """Return the seconds to a later moment; waits for a device that has not passed it."""
        if self.device is None or later.device is None:
            return later.host - self.host
        later.device.synchronize()
        return self.device.elapsed_time(later.device) / 1e3


def mark(device: torch.device) -> Mark:
    """Return the moment at which the device will have done all that it was given; waits for nothing."""
    if device.type != "cuda":
        return Mark(time.perf_counter(), None)
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return Mark(0.0, event)


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
