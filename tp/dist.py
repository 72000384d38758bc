"""Joining the processes that torchrun started: the watch first, then the device, then the process group.

    ranks, device = join(device, timeout=60)     # before anything is loaded; later calls give the same
    total = ranks.sum(partial)

Without torchrun there is one rank, and nothing is joined. Collectives are custom ops, so that compiled steps hold them;
on a CPU they go through gloo, on GPUs through NCCL or, where they are small, `fastgen.kernels.exchange`, which products
of linked ranks also use by themselves (`fastgen.kernels.linear_sum`). Every rank gets the same bits: gloo and NCCL form
each sum in one place.
"""

import atexit
import contextlib
import functools
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.errors import RankLostError, UsageError
from tp.place import Place, check_meeting_place
from tp.watch import process_watch

if TYPE_CHECKING:
    from fastgen.kernels.exchange import Exchange

BACKEND_TIMEOUT = timedelta(days=7)
"""Of gloo and NCCL: it is the watch that knows whether a rank works or stalls."""


class Ranks:
    """The processes of a run and what they do together: sums, and looking at each other's values."""

    def __init__(self, place: Place, *, linked: bool = False) -> None:
        """`linked`: small sums go through `fastgen.kernels.exchange`."""
        self.place, self.linked = place, linked

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.place.rank

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self.place.world

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.place.leads

    def at(self, phase: str) -> None:
        """Tell the watch that this rank has come on; see `Watch.at`."""
        process_watch().at(phase)

    def share(self, value: Any) -> Any:
        """Return rank 0's value, anything that JSON holds, on every rank."""
        return process_watch().share(value)

    def check_interrupt(self) -> None:
        """Raise KeyboardInterrupt on all ranks, once Ctrl-C was pressed; see `Watch.check_interrupt`."""
        process_watch().check_interrupt()

    def any(self, value: bool) -> bool:
        """Return whether it is true of any rank."""
        return bool(self.largest(int(value)))

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' values, which come here together: one that never comes is missed."""
        if self.world == 1:
            return value
        device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
        with self.waiting():
            return int(self.gather(torch.tensor([value], device=device)).max())

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Wait for the others inside, outside of any step; see `Watch.waiting`."""
        return process_watch().waiting()

    def wait(self) -> None:
        """Return when all have come here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's x [..], of a floating dtype: the same bits on all."""
        return torch.ops.fastgen.rank_sum(x)

    def sum_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the residual [..] plus the sum of every rank's x [..], in the residual's dtype."""
        return torch.ops.fastgen.rank_sum_add(x, residual)

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x [..], of any dtype: [world, ..]."""
        return torch.ops.fastgen.rank_gather(x, self.world)


EXCHANGED_BYTES = 1 << 20
"""Up to here latency counts, not bandwidth: 16 tokens of a model 16384 wide, in fp32."""

SINGLE = Ranks(Place())
"""One process, which needs no others."""


@torch.library.custom_op("fastgen::rank_sum", mutates_args=())
def _rank_sum(x: Tensor) -> Tensor:
    small = _exchange_for(x)
    if small:
        return small.sum(x, None)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@_rank_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("fastgen::rank_sum_add", mutates_args=())
def _rank_sum_add(x: Tensor, residual: Tensor) -> Tensor:
    small = _exchange_for(x)
    if small:
        return small.sum(x, residual)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return residual + total.to(residual.dtype)


@_rank_sum_add.register_fake
def _(x: Tensor, residual: Tensor) -> Tensor:
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


@torch.library.custom_op("fastgen::rank_gather", mutates_args=())
def _rank_gather(x: Tensor, world: int) -> Tensor:
    small = _exchange_for(x)
    if small and x.element_size() % 4 == 0:
        return small.gather(x)
    gathered = torch.empty(world, *x.shape, dtype=x.dtype, device=x.device)
    dist.all_gather(list(gathered.unbind()), x.contiguous())
    return gathered


@_rank_gather.register_fake
def _(x: Tensor, world: int) -> Tensor:
    return torch.empty(world, *x.shape, dtype=x.dtype, device=x.device)


def _exchange_for(x: Tensor) -> "Exchange | None":
    """Return what exchanges so few numbers at once over the GPUs of one host, None where NCCL or gloo does."""
    if not x.is_cuda or x.numel() * max(4, x.element_size()) > EXCHANGED_BYTES:
        return None
    from fastgen.kernels.exchange import exchange  # noqa: PLC0415  (Triton, which CPU builds of torch lack)

    return exchange(x.device)


@functools.cache
def join(device: str | None = None, timeout: float = 60.0) -> tuple[Ranks, str | None]:
    """Return this process's ranks and the device that it computes on, after joining those that torchrun started.

    Raises:
        UsageError: more processes than this machine has GPUs, a device that is a single one's, or an environment that
            is not torchrun's.
        RankLostError: torchrun's agent died, or the others did not come within `timeout` seconds.
    """
    watch = process_watch()
    if watch.place.world == 1:
        watch.begin(silence=False)  # a command has done so already
    if watch.place.world == 1:
        return SINGLE, device
    check_meeting_place()
    host, interface = _address()
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    limit = timedelta(seconds=timeout)
    _check_agent(timeout)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        exchange = functools.partial(_exchange, dist.PrefixStore("fastgen", store), watch.place)
        watch.connect(exchange, host, timeout)
    except (dist.DistError, TimeoutError, ConnectionError) as error:
        raise RankLostError(
            f"rank {watch.place.rank} of {watch.place.world}: the others did not join within {timeout:.0f} s: "
            f"{str(error).splitlines()[0]}"
        ) from error
    device = choose_device(device, watch.place)  # now that a rank which has none can say so
    on_gpu = device.startswith("cuda")
    with watch.waiting():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=BACKEND_TIMEOUT,
            device_id=torch.device(device) if on_gpu else None,
        )  # fmt: skip
        linked = _exchange_for(torch.zeros(1, device=device)) is not None
    atexit.register(_part)
    return Ranks(watch.place, linked=linked), device


def choose_device(device: str | None, place: Place) -> str:
    """Return the device of one of several processes, and make it current: on GPUs, every process has its own."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        return device
    count = torch.cuda.device_count()
    if device != "cuda":
        raise UsageError(f"--device {device}: under torchrun every process has a GPU of its own; say cuda, or nothing")
    if place.local >= count:
        raise UsageError(
            f"torchrun started {place.local + 1} processes or more on a machine with {count} GPU(s)\n"
            "Start one process a GPU, or use --device cpu"
        )
    torch.cuda.set_device(place.local)
    return f"cuda:{place.local}"


def _check_agent(timeout: float) -> None:
    """Raise `RankLostError` where torchrun's agent, at which the ranks are to meet, has died or cannot be reached.

    Before a process runs any Python it cannot follow its agent into death; joining would wait for all of `timeout`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.create_connection((address, int(port)), timeout).close()
    except OSError as error:
        raise RankLostError(f"torchrun's agent died, or cannot be reached at {address}:{port}: {error}") from error


def _exchange(store: dist.Store, place: Place, value: str) -> Sequence[str]:
    """Return every rank's value."""
    store.set(str(place.rank), value)
    return [store.get(str(rank)).decode() for rank in range(place.world)]


def _address() -> tuple[str, str | None]:
    """Return this machine's address on the way to rank 0's, and the name of the network interface that has it."""
    master = os.environ["MASTER_ADDR"]
    try:
        family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            address = probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"MASTER_ADDR {master}: cannot be reached: {error.strerror}") from error
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return address, name
    return address, None


def _part() -> None:
    """Leave the process group as the process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
