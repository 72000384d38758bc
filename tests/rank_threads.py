"""Ranks as threads of one process: what several processes compute, without starting any."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tp.dist import Ranks
from tp.place import Place

Result = TypeVar("Result")


class Meeting:
    """Where `world` threads bring a value each and take all of them away."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.brought: list[Any] = [None] * world

    def bring(self, rank: int, value: Any) -> list[Any]:
        self.brought[rank] = value
        self.barrier.wait()
        every = list(self.brought)
        self.barrier.wait()
        return every

    def exchange(self, rank: int, x: Tensor) -> Tensor:
        return torch.stack(self.bring(rank, x))


class ThreadRanks(Ranks):
    """One thread's view of the others."""

    def __init__(self, place: Place, meeting: Meeting) -> None:
        super().__init__(place)
        self.meeting = meeting

    def sum(self, x: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, x).sum(0)

    def sum_add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.sum(x)

    def gather(self, x: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, x)

    def largest(self, value: int) -> int:
        return max(self.meeting.bring(self.rank, value))

    def share(self, value: Any) -> Any:
        return self.meeting.bring(self.rank, value)[0]


def on_ranks(world: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """Return what `work` gives on each of `world` ranks."""
    meeting = Meeting(world)
    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(work, ThreadRanks(Place(rank, world, rank), meeting)) for rank in range(world)]
        return [future.result() for future in futures]
