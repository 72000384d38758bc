"""A stand-in for `fastgen.readback` on a CPU."""

from collections.abc import Iterator

import torch


class OneBehind:
    """Gives what a round did once the next is queued, as on a GPU."""

    lags = True

    def __init__(self, device: torch.device) -> None:
        self.pending: list[tuple[object, object]] = []

    def push(self, result: object, note: object) -> Iterator[tuple[object, object]]:
        self.pending.append((result, note))
        if len(self.pending) > 1:
            yield self.pending.pop(0)

    def waiting(self) -> list[object]:
        return [note for _, note in self.pending]
