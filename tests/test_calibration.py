"""What `auto` is told that rounds take: rehearsals before the first text, then what the device waits too."""

import itertools
from dataclasses import replace

import pytest
import torch

from fastgen.engine import Engine
from fastgen.graphs import Burst
from fastgen.load import LoadedModel
from fastgen.pace import PLAIN, Arm, LivePace, Rehearsal
from fastgen.readback import Mark, Readback
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from tests.models import random_model
from tests.readbacks import OneBehind
from tests.test_engine import text_of
from tests.test_speculative import CAPACITY, GREEDY, texts

PROMPT = text_of(3, 1)


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return random_model()


def test_a_plain_step_is_priced_by_its_share_of_a_burst(target: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SpeculativeEngine(target, Speculation(draft=random_model()), max_seq_len=CAPACITY)
    engine._rounds.burst = Burst(8, 1)
    monkeypatch.setattr(engine, "_time_round", lambda arm, options: 8.0 if arm == PLAIN else 1.5)
    monkeypatch.setattr(engine, "_time_showing", lambda width: width / 100)
    with torch.inference_mode():
        engine._calibrate(GREEDY)
    assert engine.pace._seconds == {PLAIN: 1.0} | dict.fromkeys(engine.arms, 1.5)
    assert engine.pace._burst == 8
    assert engine.pace._showing == engine._showing == {16: 0.16, 128: 1.28}


def test_bursts_are_rehearsed_though_a_text_is_to_be_short(
    target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context too."""
    engine, asked = SpeculativeEngine(target, Speculation(draft="ngram"), max_seq_len=24), []
    launch = engine._launch
    monkeypatch.setattr(engine, "_launch", lambda *arguments: asked.append(arguments[2]) or launch(*arguments))
    with torch.inference_mode():
        engine._time_round(PLAIN, replace(GREEDY, max_new_tokens=1))
    assert asked and min(asked) >= 8


def test_a_warm_up_launches_every_arm_and_both_kinds_of_plain_rounds(
    target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, launched = SpeculativeEngine(target, Speculation(draft="ngram"), max_seq_len=CAPACITY), set()
    engine._rounds.burst = Burst(8, 1)
    monkeypatch.setattr(
        engine, "_launch", lambda arm, filled, left, options: launched.add((arm, engine._rounds.burst.steps(left)))
    )
    jobs = [job for job in engine._warm_jobs(GREEDY) if getattr(job, "func", None) == engine._warm_arm]
    with torch.inference_mode():
        for job in jobs:
            job()
    assert {steps for arm, steps in launched if arm == PLAIN} == {1, 8}
    assert {arm for arm, _ in launched} == {PLAIN, *engine.arms}


def test_a_warm_up_measures_before_the_first_text_compiled_or_not(
    target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SpeculativeEngine(target, Speculation(draft="ngram"), max_seq_len=CAPACITY)
    SpeculativeEngine(target, Speculation(draft="ngram"), max_seq_len=32)  # which takes the cache
    engine.warm_up(GREEDY)
    assert isinstance(engine.pace, LivePace)
    monkeypatch.setattr(engine, "_time_round", None)
    engine.generate([text_of(5)], GREEDY)


def test_an_interrupted_rehearsal_is_made_anew(target: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat goes on after Ctrl-C, and is not to keep to the round that was being timed."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    engine = SpeculativeEngine(target, Speculation(draft="ngram"), max_seq_len=CAPACITY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_launch", interrupted)
        engine.generate([PROMPT], GREEDY)
    assert texts(engine, [PROMPT], GREEDY) == texts(Engine(target, max_seq_len=CAPACITY), [PROMPT], GREEDY)
    assert isinstance(engine.pace, LivePace)


@pytest.mark.parametrize(("readback", "ticks"), [(OneBehind, 3), (Readback, 2)])
def test_what_a_device_waited_for_a_round_is_counted_to_the_one_before(
    target: LoadedModel, readback: type, ticks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round has three marks, its start, drafts and end: it lasts until the next one starts, or else to its end."""
    clock = itertools.count()
    engine = SpeculativeEngine(target, Speculation(draft="self:1", count=3), max_seq_len=CAPACITY)
    engine.pace = pace = Rehearsal(Arm(0, 3))
    monkeypatch.setattr("fastgen.speculative.mark", lambda device: Mark(float(next(clock)), None))
    monkeypatch.setattr("fastgen.speculative.Readback", readback)
    expected = texts(Engine(target, max_seq_len=CAPACITY), [PROMPT], GREEDY)
    assert texts(engine, [PROMPT], GREEDY) == expected
    assert set(pace.seconds) == {ticks} and len(pace.seconds) > 2
    before = next(clock)
    next(engine.tokens([PROMPT], GREEDY, samples=[0]))
    begun = (next(clock) - before - 1) // 3
    assert begun == (1 if readback is OneBehind else 0), "a device has a round to do while the first token is read"
