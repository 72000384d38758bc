"""`auto` is never much slower than plain decoding, finds what is faster, and notices when the text changes.

Rounds are simulated, so that time is exact: a drafter accepts every draft with a probability that may change on the
way, and a round costs what it is said to.
"""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from fastgen.pace import MODEL_HOPE, NGRAM_HOPE, PLAIN, Acceptance, Arm, LivePace

PLAIN_STEP = 0.010
COSTS = {  # in plain steps: a draft model of 0.12 steps, n-grams for nothing; verifying grows with the width
    PLAIN: 1.0,
    Arm(0, 1): 0.12 + 1.05, Arm(0, 3): 0.36 + 1.1, Arm(0, 7): 0.84 + 1.2,
    Arm(1, 3): 1.12, Arm(1, 7): 1.22, Arm(1, 15): 1.4,
}  # fmt: skip


def simulate(
    accept: Callable[[int, int], float], tokens: int, *, burst: int = 1, seed: int = 0
) -> tuple[float, Counter]:
    """Return the time, in plain steps, that `tokens` tokens took, and how often each arm was chosen.

    `accept(drafter, at)` is the chance of a draft at that place of the text.
    """
    chance, arms = random.Random(seed), Counter()
    pace = LivePace({arm: cost * PLAIN_STEP for arm, cost in COSTS.items()}, {0: MODEL_HOPE, 1: NGRAM_HOPE})
    at, spent = 0, 0.0
    while at < tokens:
        arm = pace.choose()
        count = burst if arm == PLAIN else 1
        if arm != PLAIN:
            while count <= arm.drafts and chance.random() < accept(arm.drafter, at):
                count += 1
        cost = COSTS[arm] * (burst if arm == PLAIN else 1)
        pace.record(arm, cost * PLAIN_STEP * chance.uniform(0.98, 1.02), [count])
        arms[arm] += 1
        at, spent = at + count, spent + cost
    return spent / at * tokens, arms


@pytest.mark.parametrize("tokens", [100, 400, 5000])
@pytest.mark.parametrize("burst", [1, 8])
def test_text_that_nobody_guesses_costs_less_than_three_percent(tokens: int, burst: int) -> None:
    spent, _ = simulate(lambda drafter, at: 0.0, tokens, burst=burst)
    assert spent <= 1.03 * tokens


@pytest.mark.parametrize("seed", range(5))
def test_text_that_turns_against_the_draft_costs_less_than_three_percent(seed: int) -> None:
    """Just as acceptance has made drafting pay, it ends, again and again; what it gained is not counted."""
    spent, _ = simulate(lambda drafter, at: 0.35 * (at // 50 % 2), 2000, seed=seed)
    assert spent <= 1.03 * 2000


@pytest.mark.parametrize("chance", [0.6, 0.8, 0.9, 0.97])
def test_the_best_number_of_drafts_is_found(chance: float) -> None:
    tokens = 3000
    spent, _ = simulate(lambda drafter, at: chance if drafter == 0 else 0.0, tokens)
    best = min(
        cost * (1 - chance) / (1 - chance ** (arm.drafts + 1)) for arm, cost in COSTS.items() if arm.drafter == 0
    )
    assert spent <= 1.06 * best * tokens


def test_ngrams_take_over_where_the_text_repeats_itself() -> None:
    _, arms = simulate(lambda drafter, at: 0.98 if drafter == 1 else 0.5, 2000)
    assert arms[Arm(1, 15)] > 0.5 * arms.total()


def test_a_drafter_that_failed_is_tried_again() -> None:
    spent, _ = simulate(lambda drafter, at: 0.9 if at > 2000 else 0.0, 4000)
    assert spent <= 2000 * 1.03 + 2000 * 0.6


def test_a_trial_waits_until_it_can_be_paid_for() -> None:
    """It may lose two plain steps, of which one and a half are free, and the rest is saved up at 0.015 a token."""
    pace = LivePace({PLAIN: 1.0, Arm(0, 7): 3.0}, {0: MODEL_HOPE})
    for _ in range(30):
        assert pace.choose() == PLAIN
        pace.record(PLAIN, 1.0, [1])
    for _ in range(10):
        pace.record(PLAIN, 1.0, [1])
    assert pace.choose() == Arm(0, 7)


def test_a_plain_step_that_slowed_down_says_so_of_every_arm() -> None:
    """What costs 2.2 steps is no bargain because the machine takes twice as long for one."""
    pace = LivePace({PLAIN: 1.0, Arm(0, 1): 2.2}, {0: MODEL_HOPE})
    for _ in range(200):
        pace.record(PLAIN, 2.0, [1])
    assert pace.choose() == PLAIN


def test_one_wild_timing_is_believed_in_part() -> None:
    pace = LivePace({PLAIN: 1.0, Arm(0, 3): 1.2}, {0: MODEL_HOPE})
    pace.record(Arm(0, 3), 100.0, [4])
    assert pace.choose() == Arm(0, 3)


def test_acceptance_is_counted_by_place() -> None:
    acceptance = Acceptance(7, MODEL_HOPE)
    for _ in range(200):
        acceptance.record(3, 2)  # the first two always stay, the third never does
    assert acceptance.tokens(2) == pytest.approx(3, abs=0.05)
    assert acceptance.tokens(3) == pytest.approx(3, abs=0.1)
    assert acceptance.reached(2) and not acceptance.reached(3)
    acceptance.forget(1000)
    assert not acceptance.reached(0)
