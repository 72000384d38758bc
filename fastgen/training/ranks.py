"""The processes of a training run: one, or as many as torchrun started, each with its share of every batch.

Where many fail, one of them says why: the first.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from fastgen.errors import FastgenError, NetworkError, RankLostError
from tp.dist import choose_device
from tp.place import Place, check_meeting_place, place_from_environment

FAILURES = "fastgen/failures"  # the store's count of processes that have failed
LINGER = 1.0  # seconds; torchrun ends all processes once it sees the first one gone
LOST = re.compile("by peer|[Tt]imed out|NCCL communicator was aborted|remote process exited")  # gloo's and NCCL's words


@dataclass(frozen=True)
class Ranks(Place):
    """This process's place, and what training does with the others."""

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
    def watched(self) -> Iterator[None]:
        """Raise `RankLostError` where PyTorch reports that another process no longer answers."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not LOST.search(str(error)):
                raise
            raise RankLostError(f"process {self.rank}: another process of the run is gone: {error!s:.200}") from error


@contextmanager
def joined_ranks(device: str | None) -> Iterator[tuple[Ranks, str | None]]:
    """Yield this process's place and its device, in a process group for as long as the block lasts.

    Started by torchrun, every process of a machine takes a GPU of its own. Of the `FastgenError`s that the block
    raises, the first process's is raised; the others end silently, with their error's exit status.

    Raises:
        UsageError: the environment is not one that torchrun makes, or there are too few GPUs.
        NetworkError: the processes do not find each other.
    """
    ranks = Ranks(**vars(place_from_environment()))
    if ranks.world == 1:
        yield ranks, device
        return
    store = _meet()
    try:
        with told_once(store):
            device = choose_device(device, ranks)
            dist.init_process_group(
                "nccl" if device.startswith("cuda") else "gloo", store=dist.PrefixStore("group", store),
                rank=ranks.rank, world_size=ranks.world,
            )  # fmt: skip
            yield ranks, device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet() -> dist.Store:
    """Return the store that all processes share."""
    check_meeting_place()
    try:
        store, _, _ = next(iter(dist.rendezvous("env://")))
    except dist.DistError as error:
        raise NetworkError(f"the processes of the run do not find each other: {error!s:.200}") from error
    return store


@contextmanager
def told_once(store: dist.Store) -> Iterator[None]:
    """Let the `FastgenError` of the first process that fails through; others end silently, with their status."""
    try:
        yield
    except FastgenError as error:
        if not _is_first(store):
            time.sleep(LINGER)
            raise SystemExit(error.exit_status) from error
        raise


def _is_first(store: dist.Store) -> bool:
    """Return whether no other process has failed before this one."""
    try:
        return store.add(FAILURES, 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return False
