"""`auto` is never much slower than plain decoding, finds what is faster, and notices when the text changes.

Rounds are simulated (`tests.simulated_rounds`), so that time is exact: machines of several kinds, prices that were
measured wrong, noisy timings, drafters that are right always, never, or now and then.
"""

from collections.abc import Callable

import pytest

from fastgen.pace import CERTAIN, MODEL_HOPE, PLAIN, Arm, LivePace, Spent, cheapest_chunks
from fastgen.prospect import LONGEST_REST, SHORTEST_REST, Acceptance, Prospect
from tests.simulated_rounds import MACHINES, Text, best_speed, simulate

BOUND = 0.97
"""The least speed of `auto`, as a share of plain decoding's."""

PRICES: dict[str, Callable[[Arm], float]] = {
    "right": lambda arm: 1.0,
    "rounds thought dear": lambda arm: 1.0 if arm == PLAIN else 1.4,
    "rounds thought cheap": lambda arm: 1.0 if arm == PLAIN else 0.7,
    "plain thought dear": lambda arm: 1.15 if arm == PLAIN else 1.0,
    "many drafts thought dear": lambda arm: 2.0 if arm.drafts > 3 else 1.0,
}
TEXTS: dict[str, Text] = {
    "nobody guesses": lambda drafter, at: 0.0,
    "guessed seldom": lambda drafter, at: 0.3,
    "guessed by half": lambda drafter, at: 0.5 if drafter == 0 else 0.1,
    "turning every 20 tokens": lambda drafter, at: at // 20 % 2,
    "turning every 50 tokens": lambda drafter, at: 0.35 * (at // 50 % 2),
    "turning every 200 tokens": lambda drafter, at: 0.95 * (at // 200 % 2),
    "guessed well": lambda drafter, at: 0.9 if drafter == 0 else 0.2,
}


@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("machine", MACHINES)
def test_no_text_is_slower_than_plain_decoding_by_more_than_three_percent(machine: str, prices: str) -> None:
    """Every text for itself, several of 200 tokens in one engine or a long one, whatever was measured beforehand."""
    for name, text in TEXTS.items():
        for lengths, noise in (([200] * 4, 0.1), ([1500], 0.02)):
            run = simulate(machine, text, lengths, price=PRICES[prices], noise=noise, spikes=noise / 40)
            assert min(run.speeds) >= BOUND, (name, lengths)


def test_a_drafter_that_cannot_pay_is_left_alone() -> None:
    """Though all of its drafts stayed: it drafts as slowly as the target decodes."""
    run = simulate("slow draft", lambda drafter, at: 1.0 if drafter == 0 else 0.0, [5000])
    assert run.speeds[0] > 0.99
    assert sum(count for arm, count in run.arms.items() if arm.drafts) < 40


@pytest.mark.parametrize(
    ("machine", "chance", "least"),
    [("7B", 0.5, 0.95), ("7B", 0.8, 0.95), ("7B", 0.97, 0.97), ("7B int4", 0.8, 0.93), ("7B int4", 0.97, 0.97),
     ("CPU", 0.8, 0.9), ("CPU", 0.97, 0.97), ("tiny", 0.95, 0.93)],
)  # fmt: skip
def test_the_best_number_of_drafts_is_found(machine: str, chance: float, least: float) -> None:
    run = simulate(machine, lambda drafter, at: chance if drafter == 0 else 0.0, [3000])
    assert run.speeds[0] >= least * best_speed(machine, {0: chance, 1: 0.0})


@pytest.mark.parametrize("prices", ["rounds thought dear", "many drafts thought dear"])
def test_an_arm_that_was_thought_too_dear_is_found_all_the_same(prices: str) -> None:
    run = simulate("7B int4", lambda drafter, at: 0.95 if drafter == 0 else 0.0, [3000], price=PRICES[prices])
    assert run.speeds[0] >= 0.85 * best_speed("7B int4", {0: 0.95, 1: 0.0})


def test_ngrams_take_over_where_the_text_repeats_itself() -> None:
    run = simulate("7B", lambda drafter, at: 0.98 if drafter == 1 else 0.5, [2000])
    assert run.arms[Arm(1, 15)] > 0.5 * run.arms.total()


@pytest.mark.parametrize("machine", ["7B", "7B int4"])
def test_a_drafter_that_failed_is_tried_again_and_seldomer_each_time(machine: str) -> None:
    def text(drafter: int, at: int) -> float:
        return 0.9 if drafter == 0 and at > 2000 else 0.0

    trials = [simulate(machine, text, [tokens]).arms for tokens in (500, 1000, 2000)]
    first, second, third = (sum(count for arm, count in arms.items() if arm.drafts) for arms in trials)
    assert second - first < first and third - second < 1.5 * first
    late = simulate(machine, text, [2000, 2000])
    assert late.speeds[1] > 1.5


def test_a_round_is_begun_only_if_all_that_are_under_way_can_be_paid_for() -> None:
    """Two plain steps may be lost from the start; a round of 2.5 loses 1.5 if nothing of it stays."""
    pace = LivePace({PLAIN: 1.0, Arm(0, 3): 2.5}, {0: MODEL_HOPE})
    assert pace.choose([]) == Arm(0, 3)
    pace.queue(Arm(0, 3), [])
    assert pace.choose([]) == PLAIN
    pace.record(Arm(0, 3), Spent(2.5), [4])
    assert pace.choose([]) == Arm(0, 3)
    pace.queue(Arm(0, 3), [])
    assert pace.choose([]) == Arm(0, 3), "what it gained can be spent"
    pace.begin()
    assert pace.choose([]) == Arm(0, 3), "rounds of another text are no more under way"
    pace.queue(Arm(0, 3), [])
    assert pace.choose([]) == PLAIN, "nor are its gains there"


def test_showing_a_draft_what_it_missed_counts() -> None:
    """As a part of what a round may lose, and in the choice, where it is shared by the rounds that follow."""
    costs, showing = {PLAIN: 1.0, Arm(0, 3): 1.4, Arm(1, 3): 1.9}, {16: 0.5, 128: 1.7}
    pace = LivePace(costs, {0: MODEL_HOPE, 1: MODEL_HOPE}, showing)
    assert pace.choose([]) == pace.choose([16]) == Arm(0, 3)
    assert pace.choose([128]) == Arm(1, 3), "0.4 + 1.7 are more than may be lost; the other drafter has missed nothing"
    close = LivePace(costs | {Arm(1, 3): 1.45}, {0: MODEL_HOPE, 1: MODEL_HOPE}, showing)
    assert (close.choose([]), close.choose([16])) == (Arm(0, 3), Arm(1, 3)), "1.4 + 0.5 / 4 are more than 1.45"
    for _ in range(300):
        pace.queue(Arm(0, 3), [16])
        pace.record(Arm(0, 3), Spent(1.4 + 1.2, 1.2, [16]), [4])
    assert pace._showing == {16: pytest.approx(1.2, rel=0.01), 128: 1.7}
    assert pace._seconds[Arm(0, 3)] == pytest.approx(1.4)


def test_what_was_missed_is_shown_in_the_cheapest_chunks() -> None:
    seconds = {1024: 10.0, 128: 1.3, 16: 0.5}
    assert cheapest_chunks(7, 7, 4096, seconds) == []
    assert cheapest_chunks(7, 20, 4096, seconds) == [(7, 16)]
    assert cheapest_chunks(7, 257, 4096, seconds) == [(7, 128), (135, 128)], "padded, where that is cheaper"
    assert cheapest_chunks(7, 190, 200, seconds)[1:] == [(place, 16) for place in (135, 151, 167, 183)], "if it fits"


def test_what_a_round_took_is_lost_though_it_was_thought_cheap() -> None:
    pace = LivePace({PLAIN: 1.0, Arm(0, 3): 1.1}, {0: MODEL_HOPE})
    pace.queue(Arm(0, 3), [])
    pace.record(Arm(0, 3), Spent(2.4), [1])
    assert pace._budget == pytest.approx(2.0 + 0.015 - 1.4)


def test_a_plain_step_that_slowed_down_says_so_of_every_arm() -> None:
    """What costs 2.2 steps is no bargain because the machine takes twice as long for one."""
    pace = LivePace({PLAIN: 1.0, Arm(0, 1): 2.2}, {0: MODEL_HOPE})
    for _ in range(200):
        pace.queue(PLAIN, [])
        pace.record(PLAIN, Spent(2.0), [1])
    assert pace._seconds[Arm(0, 1)] == pytest.approx(2 * 2.2, rel=0.01)


def test_single_steps_at_the_end_of_a_text_say_nothing_of_a_burst() -> None:
    pace = LivePace({PLAIN: 1.0, Arm(0, 1): 1.2}, {0: MODEL_HOPE}, burst=8)
    for seconds, tokens in ((1.4, 1), (8.0, 8), (8.0, 8), (1.4, 1), (1.4, 1)):
        pace.queue(PLAIN, [])
        pace.record(PLAIN, Spent(seconds), [tokens])
    assert pace._seconds == {PLAIN: 1.0, Arm(0, 1): 1.2}


@pytest.mark.parametrize("machine", ["7B int4", "dear single steps"])
def test_short_texts_behind_a_long_one_are_drafted_too(machine: str) -> None:
    """Their plain steps are single ones, which say nothing of a burst; who waits for a timing would stay plain."""
    speeds = simulate(machine, lambda drafter, at: 0.45 if drafter == 0 else 0.0, [200] + [7] * 400).speeds[-200:]
    assert sum(speeds) / len(speeds) > 1.1


def test_one_wild_timing_is_believed_in_part() -> None:
    pace = LivePace({PLAIN: 1.0, Arm(0, 3): 1.2}, {0: MODEL_HOPE})
    for seconds in (1.2, 1.2, 1.2, 1.2, 100.0):
        pace.queue(Arm(0, 3), [])
        pace.record(Arm(0, 3), Spent(seconds), [4])
    assert pace.choose([]) == Arm(0, 3)
    assert pace._seconds[Arm(0, 3)] == pytest.approx(1.2 * (1 + (1.5 - 1) / 7))


def test_plain_steps_are_timed_again_unless_drafting_is_clearly_faster() -> None:
    for cost, is_clear in ((1.7, False), (1.1, True)):
        pace, arms = LivePace({PLAIN: 1.0, Arm(0, 1): cost}, {0: 0.97}), []
        for _ in range(300):
            arms.append(pace.choose([]))
            pace.queue(arms[-1], [])
            pace.record(arms[-1], Spent(1.0 if arms[-1] == PLAIN else cost), [1 if arms[-1] == PLAIN else 2])
        assert arms.count(PLAIN) == (0 if is_clear else 2), cost


def test_no_round_that_was_timed_is_cheaper_than_a_plain_step() -> None:
    """A step that seems dearer than rounds was measured wrong; else drafts would seem to pay though none stays."""
    pace = LivePace({PLAIN: 1.5, Arm(0, 3): 1.1}, {0: 0.0})
    assert pace._step == 1.5
    for _ in range(CERTAIN):
        pace.queue(Arm(0, 3), [])
        pace.record(Arm(0, 3), Spent(1.1), [1])
    assert pace._step == pytest.approx(1.1)
    assert pace.choose([]) == PLAIN


def test_acceptance_is_counted_by_place() -> None:
    acceptance = Acceptance(7, MODEL_HOPE)
    for _ in range(200):
        acceptance.record(3, 2)  # the first two always stay, the third never does
    assert acceptance.tokens(2) == pytest.approx(3, abs=0.05)
    assert acceptance.tokens(3) == pytest.approx(3, abs=0.1)
    assert acceptance.reached(2) and not acceptance.reached(3)
    acceptance.forget(1000)
    assert not acceptance.reached(0)
    assert acceptance.tokens(1) == pytest.approx(1 + MODEL_HOPE, abs=0.01)


def rest_of(prospect: Prospect) -> int:
    """Send it to rest and return for how many tokens."""
    prospect.send_to_rest()
    tokens = 0
    while prospect.resting:
        prospect.pass_by(1)
        tokens += 1
    return tokens


def test_rests_are_paid_for_by_plain_decoding_and_grow_while_trials_fail() -> None:
    prospect = Prospect(7, MODEL_HOPE)
    rests = []
    for _ in range(6):
        prospect.record(3, [1], -0.5)
        rests.append(rest_of(prospect))
    assert rests == pytest.approx([50, 100, 200, 400, LONGEST_REST, LONGEST_REST], abs=1)
    assert prospect.acceptance.tokens(1) == 1 + MODEL_HOPE, "it is hoped for anew"
    prospect.record(3, [4], 2.0)
    assert rest_of(prospect) == SHORTEST_REST, "one that has gained did not fail"
    prospect.record(3, [1], -3.0)
    assert rest_of(prospect) == pytest.approx(100, abs=1), "of which 2 were gained before"
    prospect.record(3, [1], -9.0)
    assert rest_of(prospect) == pytest.approx(900, abs=1), "what was lost is paid for in any case"
