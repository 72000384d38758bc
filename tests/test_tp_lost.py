"""A rank that dies, stalls or fails takes all others with it, in time, with one message; nothing is left behind."""

import signal
import time
from pathlib import Path

import pytest

from tests.losses import COUNTS, ENDLESS, SECONDS, Disturbance, disturbances, lose
from tests.torchrun import torchrun


def test_a_rank_that_is_killed_ends_all(tmp_path: Path) -> None:
    lose(tmp_path, Disturbance("kill", world=3, rank=1, phase="decode", seconds=0.3))


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    lose(tmp_path, Disturbance("fail", world=3, rank=2, phase="decode", seconds=0.3))


def test_an_agent_that_is_killed_leaves_no_rank(tmp_path: Path) -> None:
    lose(tmp_path, Disturbance("agent", world=2, rank=0, phase="decode", seconds=0.3))


@pytest.mark.long
def test_a_rank_that_is_killed_before_it_has_met_the_others_ends_all(tmp_path: Path) -> None:
    with torchrun(tmp_path, 2, *ENDLESS) as run:
        run.wait_for_ranks(2)
        time.sleep(1.5)
        run.remember()
        run.ranks()[1].kill()
        run.gone_within(SECONDS)
        assert len(run.told()) <= 1


def test_a_rank_that_fails_to_load_ends_all_and_says_why(tmp_path: Path) -> None:
    with torchrun(tmp_path, 2, *ENDLESS, module="tests.failing_rank") as run:
        run.wait_for("fastgen: ")
        run.remember()
        run.gone_within(SECONDS, agents=False)
        assert len(run.told()) == 1 and "rank 1 of 2 failed in load: /not/there: " in run.told()[0], run.message()


def test_ctrl_c_keeps_the_text_and_leaves_no_process(tmp_path: Path) -> None:
    with torchrun(tmp_path, 2, *ENDLESS) as run:
        run.wait_for("there was")
        run.remember()
        for process in [*run.ranks().values(), *run.agents]:  # as a terminal does
            process.send_signal(signal.SIGINT)
        run.gone_within(SECONDS, agents=False)
        run.gone_within(30)
        assert "decode  " in run.message(), "the metrics are told"
        assert not run.told() and "there was" in run.message()


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", COUNTS)
def test_ranks_and_agents_lost_in_every_phase(kind: str, tmp_path: Path) -> None:
    chosen = [disturbance for disturbance in disturbances() if disturbance.kind == kind]
    for number, disturbance in enumerate(chosen):
        folder = tmp_path / str(number)
        folder.mkdir()
        lose(folder, disturbance)
