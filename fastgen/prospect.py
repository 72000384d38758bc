"""What is known of a drafter: how often its drafts stay, and whether it is worth another trial.

Acceptance is counted by place and forgotten with time, down to a hope that every drafter begins with. A drafter that
does not pay rests for so long that what its trial lost is a small share of the time, and while its trials go on
failing twice as long each time, up to a limit. Behind the rest it is hoped for anew.
"""

from collections.abc import Sequence

MEMORY = 0.99
"""What a count is still worth one token later: half after 69 tokens."""

HOPE_WEIGHT, PLACE_WEIGHT = 2.0, 2.0
"""As how many drafts a hope counts, and as how many the drafter's overall acceptance counts at a single place."""

LATELY = 0.5
"""A count that stands for once within the time in which it halves."""

REST_SHARE = 0.01
"""What a trial lost, as a share of the plain decoding that follows."""

SHORTEST_REST, LONGEST_REST = 32.0, 512.0
"""Tokens that a drafter rests at least, and up to which a rest doubles."""

MOST_CREDIT = 4.0
"""Plain steps that a drafter can be ahead, and so lose again without having failed."""


class Acceptance:
    """At every place, how often a draft was accepted once those before it were."""

    def __init__(self, places: int, hope: float) -> None:
        self._hope = hope
        self._tried, self._kept = [0.0] * places, [0.0] * places
        self._passed = 0.0  # tokens for which the counts are still to fade
        self._expected: list[float] = []  # by the number of drafts; empty where it is to be computed anew

    def forget(self, tokens: float) -> None:
        """Let the counts fade by so many tokens."""
        self._passed += tokens
        self._expected = []

    def record(self, drafted: int, accepted: int) -> None:
        """Count a round in which `accepted` of `drafted` tokens stayed."""
        self._fade()
        for place in range(min(accepted + 1, drafted)):
            self._tried[place] += 1
            self._kept[place] += place < accepted
        self._expected = []

    def reached(self, place: int) -> bool:
        """Return whether drafts got as far as this place, 0 the first, lately."""
        self._fade()
        return self._tried[place] > LATELY

    def tokens(self, drafted: int) -> float:
        """Return how many tokens a round of so many drafts should give."""
        if not self._expected:
            self._fade()
            self._expected = self._expect()
        return self._expected[drafted]

    def _fade(self) -> None:
        if self._passed:
            fade, self._passed = MEMORY**self._passed, 0.0
            self._tried = [count * fade for count in self._tried]
            self._kept = [count * fade for count in self._kept]

    def _expect(self) -> list[float]:
        overall = (sum(self._kept) + self._hope * HOPE_WEIGHT) / (sum(self._tried) + HOPE_WEIGHT)
        expected, reached = [1.0], 1.0
        for kept, tried in zip(self._kept, self._tried, strict=True):
            reached *= (kept + overall * PLACE_WEIGHT) / (tried + PLACE_WEIGHT)
            expected.append(expected[-1] + reached)
        return expected


class Prospect:
    """A drafter's acceptance, its account in plain steps, and its rest."""

    def __init__(self, places: int, hope: float) -> None:
        self.acceptance = Acceptance(places, hope)
        self._places, self._hope = places, hope
        self._account, self._failures, self._rest = 0.0, 0, 0.0

    @property
    def resting(self) -> bool:
        """Whether it is not to be tried now."""
        return self._rest > 0

    def pass_by(self, tokens: float) -> None:
        """Let the text grow by so many tokens."""
        if not self.resting:
            self.acceptance.forget(tokens)
            return
        self._rest -= tokens
        if not self.resting:
            self.acceptance = Acceptance(self._places, self._hope)

    def record(self, drafted: int, counts: Sequence[int], gain: float) -> None:
        """Learn from a round of its drafts that gave each row so many tokens and won so many plain steps."""
        for count in counts:
            self.acceptance.record(drafted, count - 1)
        self._account = min(self._account + gain, MOST_CREDIT)

    def send_to_rest(self) -> None:
        """Stop trying: it does not pay now."""
        failed = self._account <= 0
        self._failures = self._failures + 1 if failed else 0
        shortest = max(SHORTEST_REST, -self._account / REST_SHARE)
        self._rest = max(shortest, min(shortest * 2.0 ** (self._failures - 1), LONGEST_REST))
        self._account = max(self._account, 0.0)
