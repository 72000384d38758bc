"""Joining the ranks, and what they do together: whose GPU is whose, who waits how long, and what a sum leaves alone."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist

import tp.dist
from fastgen.errors import RankLostError, UsageError
from tests.torchrun import ENVIRONMENT, PORT
from tp.dist import Ranks, choose_device, join
from tp.place import Place
from tp.watch import JOIN, Watch, process_watch


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with two GPUs; which of them were made current."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_rank_takes_the_gpu_of_its_place_on_its_machine(device: str | None, current: list[int]) -> None:
    assert choose_device(device, Place(rank=3, world=4, local=1)) == "cuda:1"
    assert current == [1]


def test_ranks_on_cpus_choose_no_gpu(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", Place(rank=1, world=2, local=1)) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None, Place(rank=1, world=2, local=1)) == "cpu"
    assert current == []


def test_more_ranks_than_gpus_and_a_gpu_for_all_are_refused(current: list[int]) -> None:
    with pytest.raises(UsageError, match="started 3 processes or more on a machine with 2 GPU"):
        choose_device(None, Place(rank=2, world=3, local=2))
    with pytest.raises(UsageError, match="--device cuda:0: under torchrun every process has a GPU of its own"):
        choose_device("cuda:0", Place(rank=0, world=2, local=0))
    assert current == []


def test_ranks_whose_agent_died_before_they_could_notice_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    names = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    watch = Watch()
    watch.place = Place(rank=1, world=2, local=1)
    monkeypatch.setattr(tp.dist, "process_watch", lambda: watch)
    with pytest.raises(RankLostError, match=f"torchrun's agent died, or cannot be reached at 127.0.0.1:{port}: "):
        join.__wrapped__("cpu", 60.0)


def test_a_process_whose_parent_died_as_it_started_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp.watch.place_from_environment", lambda: Place(rank=0, world=2))
    watch = Watch()
    monkeypatch.setattr(sys, "platform", "elsewhere")  # where no signal could be asked for either
    monkeypatch.setattr(os, "getppid", lambda: watch._parent + 1)
    with pytest.raises(RankLostError, match="torchrun's agent died as its processes started"):
        watch.begin(silence=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_never_come_says_so(rank: int) -> None:
    places = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    command = [sys.executable, "-c", "from tp.dist import join; join('cpu', 2.0)"]
    done = subprocess.run(
        command, env=ENVIRONMENT | places | master, capture_output=True, text=True, check=False, timeout=100
    )
    assert f"RankLostError: rank {rank} of 2: the others did not join within 2 s: " in done.stderr


ENVIRONMENTS = {
    "no RANK and no MASTER_ADDR and no MASTER_PORT\nStart with torchrun, or unset WORLD_SIZE": {},
    "WORLD_SIZE=2, but no MASTER_ADDR\n": {"RANK": "0", "MASTER_PORT": PORT},
    "MASTER_PORT=abc: expected what torchrun sets, a port from 1 to 65535": {"MASTER_PORT": "abc"},
    "MASTER_PORT=0: ": {"MASTER_PORT": "0"},
    "MASTER_PORT=65536: ": {"MASTER_PORT": "65536"},
}


@pytest.mark.parametrize("message", ENVIRONMENTS)
def test_an_environment_that_torchrun_does_not_make_is_refused(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ENVIRONMENTS[message]
    if set(given) == {"MASTER_PORT"}:
        given = given | {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    watch = Watch()
    watch.place = Place(rank=0, world=2, local=0)
    monkeypatch.setattr("tp.dist.process_watch", lambda: watch)
    with pytest.raises(UsageError, match=message):
        join.__wrapped__("cpu", 2.0)


def test_what_is_true_of_one_rank_is_true_of_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    ranks, phases = Ranks(Place(rank=0, world=2)), []

    def gather(x: torch.Tensor, other: int) -> torch.Tensor:
        phases.append(process_watch()._phase)
        return torch.stack((x, torch.full_like(x, other)))

    for other in (0, 5):
        monkeypatch.setattr(ranks, "gather", partial(gather, other=other))
        assert ranks.largest(3) == max(3, other) and ranks.largest(7) == 7
        assert ranks.any(False) == bool(other) and ranks.any(True)
    assert phases == [JOIN] * 8 and process_watch()._phase != JOIN, "who does not come is missed there"


def test_ranks_wait_for_each_other_and_one_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(dist, "barrier", lambda: waited.append(1))
    for world in (1, 2):
        Ranks(Place(rank=0, world=world, local=0)).wait()
    assert len(waited) == 1


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(Place(rank=0, world=1, local=0))
    dist.destroy_process_group()


def test_sums_and_gatherings_leave_what_they_are_given_alone(alone: Ranks) -> None:
    part, residual = torch.randn(3, 4).T, torch.randn(4, 3, dtype=torch.bfloat16)
    given = part.clone(), residual.clone()
    total, added, gathered = alone.sum(part), alone.sum_add(part, residual), alone.gather(part)
    for found in (total, added, gathered):
        found.zero_()
    assert torch.equal(part, given[0]) and torch.equal(residual, given[1])


def test_a_sum_on_top_of_a_residual_has_its_dtype(alone: Ranks) -> None:
    part, residual = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.bfloat16)
    found = alone.sum_add(part, residual)
    assert found.dtype == torch.bfloat16 and torch.equal(found, residual + part.bfloat16())


def test_what_is_gathered_may_have_any_strides(alone: Ranks) -> None:
    part = torch.arange(6).view(2, 3)
    assert torch.equal(alone.gather(part.T), part.T[None])
