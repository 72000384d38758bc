"""How many tokens to draft, and by whom: fixed, or chosen before every round by what rounds cost and give.

The choice of `LivePace` is the arm (a drafter and a number of drafts, plain decoding among them) that should give the
most tokens a second. Costs are measured beforehand and followed as rounds are timed, acceptance is counted for every
drafter and place (`fastgen.prospect`). A drafter is tried with the fewest drafts that could pay, and with more once
the last of these is reached; one that does not pay rests, longer and longer. What an arm costs is doubted the longer
it was not timed, so one that was thought too dear is tried some day.

What trials may cost is bounded: time lost against plain decoding, less what was gained before, stays within `SHARE` of
all the time that plain decoding would have taken. A round may only be begun if the budget covers its whole loss, should
every draft be refused, on top of those under way, whose results are not known yet; and a draft model's round after
plain ones costs, besides its own time, that of showing the draft what it has missed. So `auto` is never slower by more
than a few percent, however adversarial the text.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from fastgen.prospect import Prospect

SHARE = 0.015
"""Time that trials may lose, as a share of plain decoding's; rests see to it that they lose less."""

FREE_LOSS, MOST_GAIN = 2.0, 10.0
"""In plain steps: what trials may lose from the start and have left for a new text, and what gains can be spent on them
within a text."""

MODEL_HOPE, NGRAM_HOPE = 0.8, 0.3
"""Acceptance of a drafter that nothing is known of."""

STAY = 4
"""Rounds that a draft model is expected to go on for, and so to share what showing it the text costs."""

FOLLOWING, OUTLIER, DISASTER = 0.05, 1.5, 3.0
"""Weight of a new timing in a cost (the first ones weigh more), and how far from it, as a factor, a timing is still
believed; how far it is counted as a loss."""

CLEAR, STALE = 1.25, 256.0
"""How much faster than plain decoding an arm must seem that goes on for long without a timing of plain steps, and for
how many tokens others do."""

WORTH = 1.02
"""How much faster than plain decoding a drafter must seem to be tried."""

CERTAIN = 3
"""Timings after which an arm's cost is no guess."""

DOUBT, DOUBTING, SLOWLY_DOUBTING = 0.8, 64, 1024
"""What is believed of an arm's cost after how many tokens without a timing: while it is a guess, and later."""


class Arm(NamedTuple):
    """A drafter, by its place in a list, and how many tokens it drafts; 0 tokens are plain decoding."""

    drafter: int
    drafts: int


PLAIN = Arm(0, 0)


class Spent(NamedTuple):
    """What a round took, in seconds: all of it, and thereof showing a draft model the chunks of text (by their widths)
    that it had missed."""

    seconds: float
    showing: float = 0.0
    missed: Sequence[int] = ()


def cheapest_chunks(start: int, end: int, limit: int, seconds: Mapping[int, float]) -> list[tuple[int, int]]:
    """Return chunks (start, width) that cover the places start .. end - 1, none of which reaches behind `limit`.

    `seconds` says what a chunk costs by its width; the last one may be padded, and a wide padded one may be cheaper
    than several narrow ones.
    """
    found = []
    while start < end:
        fitting = [width for width in seconds if start + width <= limit]
        width = min(fitting, key=lambda width: seconds[width] / min(width, end - start))
        found.append((start, width))
        start += width
    return found


class Pace(Protocol):
    """Chooses arms; `arms` are all that it may choose."""

    arms: Sequence[Arm]

    def begin(self) -> None:
        """Know that a new text begins; rounds that were under way are not recorded any more."""
        ...

    def choose(self, missed: Sequence[int]) -> Arm:
        """Return what to do next; before it drafts, a draft model would have to be shown chunks of these widths."""
        ...

    def queue(self, arm: Arm, missed: Sequence[int]) -> None:
        """Know that a round was begun; rounds are recorded in the same order."""
        ...

    def record(self, arm: Arm, spent: Spent, tokens: Sequence[int]) -> None:
        """Learn from a round that took so long and gave each row so many tokens."""
        ...


class FixedPace:
    """The same arm always."""

    def __init__(self, arm: Arm) -> None:
        self.arms: Sequence[Arm] = (arm,)

    def begin(self) -> None:
        """Nothing changes."""

    def choose(self, missed: Sequence[int]) -> Arm:
        """Return the arm."""
        return self.arms[0]

    def queue(self, arm: Arm, missed: Sequence[int]) -> None:
        """Know nothing."""

    def record(self, arm: Arm, spent: Spent, tokens: Sequence[int]) -> None:
        """Learn nothing."""


class Rehearsal(FixedPace):
    """The same arm, for finding out what its rounds take."""

    def __init__(self, arm: Arm) -> None:
        super().__init__(arm)
        self.seconds: list[float] = []

    def record(self, arm: Arm, spent: Spent, tokens: Sequence[int]) -> None:
        """Keep what a round took."""
        self.seconds.append(spent.seconds)


class LivePace:
    """Chooses the arm that is fastest now; see the module's docstring."""

    def __init__(
        self, seconds: Mapping[Arm, float], hopes: Mapping[int, float], showing: Mapping[int, float] | None = None,
        *, burst: int = 1,
    ) -> None:  # fmt: skip
        """`seconds` are the measured costs of a round of every arm, for `PLAIN` of one step of its round's `burst`;
        `hopes` what to expect of every drafter; `showing` what showing the first drafter a chunk of the text costs, by
        its width."""
        assert PLAIN in seconds, "plain decoding is always a choice"
        self.arms: Sequence[Arm] = tuple(seconds)
        self._seconds, self._showing = dict(seconds), dict(showing or {})
        self._step = self._seconds[PLAIN]  # as measured, but no round that was timed since is cheaper
        self._timings = dict.fromkeys(self.arms, 0)
        self._burst = burst  # steps of a plain round, but at the end of a text
        self._tokens = 0.0  # that a row got so far
        self._timed = dict.fromkeys(self.arms, 0.0)  # when, in these tokens
        drafting = sorted(arm for arm in self.arms if arm != PLAIN)
        self._arms_of = {drafter: [arm for arm in drafting if arm.drafter == drafter] for drafter in hopes}
        self._fewer = {more: arm for arms in self._arms_of.values() for arm, more in pairwise(arms)}
        self._prospects = {
            drafter: Prospect(self._arms_of[drafter][-1].drafts, hope) for drafter, hope in hopes.items()
        }
        self._budget = FREE_LOSS  # in plain steps
        self._queued: deque[float] = deque()  # what each round that is under way may lose of it

    def begin(self) -> None:
        """Know that a new text begins."""
        self._queued.clear()
        self._budget = min(self._budget, FREE_LOSS)

    def choose(self, missed: Sequence[int]) -> Arm:
        """Return what to do next."""
        rates = {arm: self._rate(arm, missed) for arm in self.arms if self._is_open(arm, missed)}
        arm = max(rates, key=rates.__getitem__)
        is_clear = rates[arm] > CLEAR * rates[PLAIN]
        return arm if is_clear or self._tokens - self._timed[PLAIN] < STALE else PLAIN

    def queue(self, arm: Arm, missed: Sequence[int]) -> None:
        """Know that a round was begun."""
        self._queued.append(self._risk(arm, missed))

    def record(self, arm: Arm, spent: Spent, tokens: Sequence[int]) -> None:
        """Learn from a round that took so long and gave each row so many tokens; a plain one may hold several steps."""
        mean = sum(tokens) / len(tokens)
        self._queued.popleft()
        for prospect in self._prospects.values():
            prospect.pass_by(mean)
        self._tokens += mean
        self._budget = min(self._budget + SHARE * mean, MOST_GAIN)
        round_seconds = spent.seconds - spent.showing
        if arm == PLAIN and mean < self._burst:  # at the end of a text, whose single steps take longer
            self._timed[PLAIN] = self._tokens  # and no other is to be made because this one says nothing
        elif arm == PLAIN:
            self._time(arm, round_seconds / mean)
        else:
            self._learn_showing(spent)
            # An interruption of the machine's is the draft's fault in part only.
            believed = min(round_seconds, DISASTER * self._seconds[arm]) + self._showing_cost(arm, spent.missed)
            self._time(arm, round_seconds)
            gain = mean - believed / self._step
            self._budget = min(self._budget + gain, MOST_GAIN)
            self._prospects[arm.drafter].record(arm.drafts, tokens, gain)
        for drafter, prospect in self._prospects.items():
            if not prospect.resting and not self._is_promising(drafter):
                prospect.send_to_rest()

    def _is_open(self, arm: Arm, missed: Sequence[int]) -> bool:
        """Return whether an arm may be chosen: it can be paid for, and fewer drafts, if they pay, were not too many."""
        if arm == PLAIN:
            return True
        prospect = self._prospects[arm.drafter]
        if prospect.resting or self._risk(arm, missed) > self._budget - sum(self._queued):
            return False
        fewer = self._fewer.get(arm)
        if fewer is None or prospect.acceptance.reached(fewer.drafts - 1):
            return True
        return self._rate(fewer) <= self._rate(PLAIN)

    def _is_promising(self, drafter: int) -> bool:
        """Return whether some number of a drafter's drafts should be faster than plain decoding.

        Costs are doubted before a trial only: drafts that are refused are not worth finding out what they cost.
        """
        doubting = not self._prospects[drafter].acceptance.reached(0)
        worth = WORTH * self._rate(PLAIN)
        return any(self._rate(arm, doubting=doubting) > worth for arm in self._arms_of[drafter])

    def _risk(self, arm: Arm, missed: Sequence[int]) -> float:
        """Return the plain steps that are lost if all drafts are refused."""
        if arm == PLAIN:
            return 0.0
        cost = self._seconds[arm] + self._showing_cost(arm, missed)
        return cost / self._step - 1

    def _rate(self, arm: Arm, missed: Sequence[int] = (), *, doubting: bool = True) -> float:
        """Return the tokens a second that the arm should give."""
        if arm == PLAIN:
            return 1 / self._step
        certain, untimed = self._timings[arm] >= CERTAIN, self._tokens - self._timed[arm]
        doubt = DOUBT ** (untimed / (SLOWLY_DOUBTING if certain else DOUBTING)) if doubting else 1.0
        seconds = max(self._seconds[arm] * doubt, self._step) + self._showing_cost(arm, missed) / STAY
        return self._prospects[arm.drafter].acceptance.tokens(arm.drafts) / seconds

    def _showing_cost(self, arm: Arm, missed: Sequence[int]) -> float:
        """Return the seconds that showing the arm's drafter chunks of these widths takes."""
        return 0.0 if arm == PLAIN or arm.drafter else sum(self._showing.get(width, 0.0) for width in missed)

    def _time(self, arm: Arm, seconds: float) -> None:
        """Let an arm's cost follow a timing; a plain step that got slower or faster says the same of every arm."""
        self._timings[arm] += 1
        self._timed[arm] = self._tokens
        weight = max(FOLLOWING, 1 / (self._timings[arm] + 2))
        believed = min(max(seconds / self._seconds[arm], 1 / OUTLIER), OUTLIER)
        for other in self.arms if arm == PLAIN else (arm,):
            self._seconds[other] *= 1 + weight * (believed - 1)
        self._step = min(self._seconds[arm] for arm in self.arms if arm == PLAIN or self._timings[arm] >= CERTAIN)

    def _learn_showing(self, spent: Spent) -> None:
        expected = sum(self._showing.get(width, 0.0) for width in spent.missed)
        if expected:
            believed = min(max(spent.showing / expected, 1 / OUTLIER), OUTLIER)
            for width in set(spent.missed):
                self._showing[width] *= 1 + FOLLOWING * (believed - 1)
