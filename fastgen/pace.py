"""How many tokens to draft, and by whom: fixed, or chosen before every round by what rounds cost and give.

The choice of `LivePace` is the arm (a drafter and a number of drafts, plain decoding among them) that should give the
most tokens a second. Costs are measured beforehand and followed as rounds are timed; acceptance is counted for every
drafter and place, and forgotten with time, so that a drafter that failed is tried again: with the fewest drafts that
could pay, and with more once the last of these is reached. What such trials may cost is bounded: time lost against
plain decoding, less what was gained before, stays within `SHARE` of all the time that plain decoding would have taken.
So it is never slower by more than a few percent, however adversarial the text.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

SHARE = 0.015
"""Time that trials may lose, as a share of plain decoding's."""

FREE_LOSS, MOST_GAIN = 1.5, 10.0
"""In plain steps: what trials may lose from the start, and what gains can be spent on them later."""

MEMORY = 0.985
"""What a count is still worth one token later: half after 46 tokens."""

MODEL_HOPE, NGRAM_HOPE = 0.8, 0.5
"""Acceptance of a drafter that nothing is known of."""

HOPE_WEIGHT, PLACE_WEIGHT = 2.0, 2.0
"""As how many drafts a hope counts, and as how many the drafter's overall acceptance counts at a single place."""

LATELY = 0.5
"""A count that stands for once within the time in which it halves."""

FOLLOWING, OUTLIER = 0.1, 3.0
"""Weight of a new timing in a cost, and how far from it, as a factor, a timing is still believed."""


class Arm(NamedTuple):
    """A drafter, by its place in a list, and how many tokens it drafts; 0 tokens are plain decoding."""

    drafter: int
    drafts: int


PLAIN = Arm(0, 0)


class Pace(Protocol):
    """Chooses arms; `arms` are all that it may choose."""

    arms: Sequence[Arm]

    def choose(self) -> Arm:
        """Return what to do next."""
        ...

    def record(self, arm: Arm, seconds: float, tokens: Sequence[int]) -> None:
        """Learn from a round that took so long and gave each row so many tokens."""
        ...


class FixedPace:
    """The same arm always."""

    def __init__(self, arm: Arm) -> None:
        self.arms: Sequence[Arm] = (arm,)

    def choose(self) -> Arm:
        """Return the arm."""
        return self.arms[0]

    def record(self, arm: Arm, seconds: float, tokens: Sequence[int]) -> None:
        """Learn nothing."""


class Acceptance:
    """What is known of one drafter: at every place, how often a draft was accepted once those before it were."""

    def __init__(self, places: int, hope: float) -> None:
        self._hope = hope
        self._tried, self._kept = [0.0] * places, [0.0] * places

    def forget(self, tokens: float) -> None:
        """Let the counts fade by so many tokens."""
        fade = MEMORY**tokens
        self._tried = [count * fade for count in self._tried]
        self._kept = [count * fade for count in self._kept]

    def record(self, drafted: int, accepted: int) -> None:
        """Count a round in which `accepted` of `drafted` tokens stayed."""
        for place in range(min(accepted + 1, drafted)):
            self._tried[place] += 1
            self._kept[place] += place < accepted

    def reached(self, place: int) -> bool:
        """Return whether drafts got as far as this place, 0 the first, lately."""
        return self._tried[place] > LATELY

    def tokens(self, drafted: int) -> float:
        """Return how many tokens a round of so many drafts should give."""
        overall = (sum(self._kept) + self._hope * HOPE_WEIGHT) / (sum(self._tried) + HOPE_WEIGHT)
        expected, reached = 1.0, 1.0
        for place in range(drafted):
            reached *= (self._kept[place] + overall * PLACE_WEIGHT) / (self._tried[place] + PLACE_WEIGHT)
            expected += reached
        return expected


class LivePace:
    """Chooses the arm that is fastest now; see the module's docstring."""

    def __init__(self, seconds: Mapping[Arm, float], hopes: Mapping[int, float]) -> None:
        """`seconds` are the measured costs of a round of every arm, of a step for `PLAIN`; `hopes` what to expect of
        every drafter."""
        assert PLAIN in seconds, "plain decoding is always a choice"
        self.arms: Sequence[Arm] = tuple(seconds)
        self._seconds = dict(seconds)
        most = max(arm.drafts for arm in self.arms)
        self._acceptance = {drafter: Acceptance(most, hope) for drafter, hope in hopes.items()}
        self._budget = FREE_LOSS  # in plain steps

    def choose(self) -> Arm:
        """Return what to do next."""
        return max((arm for arm in self.arms if self._is_open(arm)), key=self._rate)

    def _is_open(self, arm: Arm) -> bool:
        """Return whether an arm may be chosen: it can be paid for, and fewer drafts, if they pay, were not too many."""
        if arm == PLAIN:
            return True
        if self._seconds[arm] / self._seconds[PLAIN] - 1 > self._budget:
            return False
        fewer = max(
            (other for other in self.arms if PLAIN != other < arm and other.drafter == arm.drafter), default=None
        )
        pays = fewer is not None and self._rate(fewer) > self._rate(PLAIN)
        return fewer is None or not pays or self._acceptance[arm.drafter].reached(fewer.drafts - 1)

    def record(self, arm: Arm, seconds: float, tokens: Sequence[int]) -> None:
        """Learn from a round that took so long and gave each row so many tokens; a plain one may hold several steps."""
        mean = sum(tokens) / len(tokens)
        for acceptance in self._acceptance.values():
            acceptance.forget(mean)
        self._time(arm, seconds / (mean if arm == PLAIN else 1.0))
        self._budget = min(self._budget + SHARE * mean, MOST_GAIN)
        if arm != PLAIN:
            # At the cost that is believed: an interruption of the machine's is not the draft's fault.
            self._budget = min(self._budget + mean - self._seconds[arm] / self._seconds[PLAIN], MOST_GAIN)
            for count in tokens:
                self._acceptance[arm.drafter].record(arm.drafts, count - 1)

    def _time(self, arm: Arm, seconds: float) -> None:
        """Let an arm's cost follow a timing; a plain step that got slower or faster says the same of every arm."""
        believed = min(max(seconds / self._seconds[arm], 1 / OUTLIER), OUTLIER)
        for other in self.arms if arm == PLAIN else (arm,):
            self._seconds[other] *= 1 + FOLLOWING * (believed - 1)

    def _rate(self, arm: Arm) -> float:
        """Return the tokens a second that the arm should give."""
        return self._acceptance[arm.drafter].tokens(arm.drafts) / self._seconds[arm]
