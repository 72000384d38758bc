"""A rank that dies, stalls or fails takes all others with it, in time, with one message; nothing is left behind."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.torchrun import ENDLESS, Run, suspend, torchrun

SECONDS = 5.0
TIMEOUT = 8.0  # less, and ranks that start on a busy machine count as stalled


def one_message(run: Run, text: str) -> None:
    lines = [line for line in run.message().splitlines() if "fastgen: " in line]
    assert len(lines) == 1 and text in lines[0], f"{lines}\n{run.message()}"


def begun(run: Run) -> None:
    """Wait until the text comes."""
    run.wait_for("load ")
    run.wait_for("there was")


def check_kill(folder: Path, world: int, victim: int, wait: float | None, *flags: str) -> None:
    """Kill a rank while the text comes, or `wait` seconds after it has started."""
    with torchrun(folder, world, *ENDLESS, *flags) as run:
        if wait is None:
            begun(run)
        else:
            while len(run.ranks()) < world:
                time.sleep(0.01)
            time.sleep(wait)
        run.remember()
        run.ranks()[victim].kill()
        run.gone_within(SECONDS)
        if wait is None:
            one_message(run, f"rank {victim} of {world} died in decode")
        else:
            assert run.message().count("fastgen: rank") <= 1


def check_stall(folder: Path, world: int, victim: int) -> None:
    with torchrun(folder, world, *ENDLESS, "--timeout", str(TIMEOUT)) as run:
        begun(run)
        run.remember()
        suspend(run.ranks()[victim])
        run.gone_within(TIMEOUT + SECONDS)
        one_message(run, f"rank {victim} of {world} has not ")


def check_agent(folder: Path, world: int, wait: float | None) -> None:
    with torchrun(folder, world, *ENDLESS) as run:
        if wait is None:
            begun(run)
        else:
            while len(run.ranks()) < world:
                time.sleep(0.01)
            time.sleep(wait)
        run.remember()
        run.agents[0].kill()
        run.gone_within(SECONDS)
        if wait is None:
            one_message(run, "torchrun's agent died in decode")


def test_a_rank_that_is_killed_ends_all(tmp_path: Path) -> None:
    check_kill(tmp_path, 3, 1, None)


@pytest.mark.long
def test_rank_0_that_is_killed_ends_all(tmp_path: Path) -> None:
    check_kill(tmp_path, 2, 0, None)


@pytest.mark.long
def test_a_rank_that_is_killed_while_it_starts_ends_all(tmp_path: Path) -> None:
    check_kill(tmp_path, 2, 1, 1.5)


def test_a_rank_that_stalls_ends_all(tmp_path: Path) -> None:
    check_stall(tmp_path, 2, 1)


def test_a_rank_that_fails_to_load_ends_all_and_says_why(tmp_path: Path) -> None:
    with torchrun(tmp_path, 2, *ENDLESS, module="tests.failing_rank") as run:
        run.wait_for("fastgen: ")
        run.remember()
        run.gone_within(SECONDS, agents=False)
        one_message(run, "rank 1 of 2 failed in load: /not/there: ")


def test_an_agent_that_is_killed_leaves_no_rank(tmp_path: Path) -> None:
    check_agent(tmp_path, 2, None)


def test_ctrl_c_keeps_the_text_and_leaves_no_process(tmp_path: Path) -> None:
    with torchrun(tmp_path, 2, *ENDLESS) as run:
        begun(run)
        run.remember()
        for process in [*run.ranks().values(), *run.agents]:  # as a terminal does
            process.send_signal(signal.SIGINT)
        run.gone_within(SECONDS, agents=False)
        run.gone_within(30)
        assert "decode  " in run.message(), "the metrics are told"
        assert "fastgen: " not in run.message() and "there was" in run.message()


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_ranks_killed_at_any_time(tmp_path: Path) -> None:
    chance = random.Random(0)
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        world = chance.choice((2, 3))
        check_kill(folder, world, chance.randrange(world), None if number % 2 else chance.uniform(0, 6))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_stalls(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        check_stall(folder, 2, number % 2)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_agents_killed_at_any_time(tmp_path: Path) -> None:
    chance = random.Random(0)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        check_agent(folder, 2, None if number % 2 else chance.uniform(0, 6))
