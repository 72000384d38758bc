"""The processes of a training run: one, or as many as torchrun started, each with its share of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world`, number `local` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints and saves."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined_ranks(device: str | None) -> Iterator[tuple[Ranks, str | None]]:
    """Yield this process's place and its device, in a process group for as long as the block lasts.

    Started by torchrun, every process of a machine takes a GPU of its own. Raises `UsageError` where they are too few.
    """
    try:
        ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in
                        (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))))  # fmt: skip
    except ValueError as error:
        raise UsageError(f"the environment's RANK, WORLD_SIZE or LOCAL_RANK is no number: {error}") from error
    if ranks.world == 1:
        yield ranks, device
        return
    use_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if use_gpu:
        if ranks.local >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started process {ranks.local + 1} on a machine with {torch.cuda.device_count()} GPU(s)\n"
                "Start one process a GPU, or train with --device cpu"
            )
        device = f"cuda:{ranks.local}"
        torch.cuda.set_device(ranks.local)
    dist.init_process_group("nccl" if use_gpu else "gloo")
    try:
        yield ranks, device
    finally:
        dist.destroy_process_group()
