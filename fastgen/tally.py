"""What rounds of speculation did: how many drafts were accepted, at which places, and what the rounds took."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastgen.pace import PLAIN, Arm
from fastgen.readback import Mark


class Launch(NamedTuple):
    """What the host remembers of a round that is under way."""

    arm: Arm
    tokens: int  # at most so many for each row
    missed: tuple[int, ...]  # widths of the chunks of text that the draft was shown first
    start: Mark
    shown: Mark
    drafted: Mark
    end: Mark | None  # of a plain round on a GPU nobody marks it


@dataclass
class Tally:
    """What the rounds of the last generation did; rows of a batch are counted one by one."""

    accepted: Counter[int] = field(default_factory=Counter)  # rounds by how many drafts were accepted
    tried: Counter[int] = field(default_factory=Counter)  # by place, 1 for the first draft: drafts whose turn came
    kept: Counter[int] = field(default_factory=Counter)  # and those that stayed
    arms: Counter[Arm] = field(default_factory=Counter)  # launches, plain ones among them
    draft_seconds: list[float] = field(default_factory=list)  # of every round with drafts
    verify_seconds: list[float] = field(default_factory=list)

    def record(self, launch: Launch, counts: Sequence[int]) -> None:
        """Count a round that gave each row so many tokens."""
        self.arms[launch.arm] += 1
        if launch.arm == PLAIN:
            return
        assert launch.end, "rounds with drafts have their end marked"
        self.draft_seconds.append(launch.shown.until(launch.drafted))
        self.verify_seconds.append(launch.drafted.until(launch.end))
        for count in counts:
            self.accepted[count - 1] += 1
            self.tried.update(range(1, min(count, launch.arm.drafts) + 1))
            self.kept.update(range(1, count))

    @property
    def rounds(self) -> int:
        """Rounds with drafts, of all rows."""
        return self.accepted.total()

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that stayed, of those whose turn came."""
        return self.kept.total() / self.tried.total() if self.tried else None

    def figures(self, drafters: Sequence[str]) -> "SpeculationMetrics":
        """Return the figures to report; `drafters` are the names that arms count."""
        reached = sorted(self.tried)
        return SpeculationMetrics(
            rounds=self.rounds,
            acceptance=self.acceptance,
            accepted={str(count): self.accepted[count] for count in sorted(self.accepted)},
            acceptance_by_place=[self.kept[place] / self.tried[place] for place in reached],
            arms={
                "plain" if arm == PLAIN else f"{drafters[arm.drafter]} {arm.drafts}": launches
                for arm, launches in self.arms.most_common()
            },
            draft_ms=1e3 * statistics.median(self.draft_seconds) if self.draft_seconds else None,
            verify_ms=1e3 * statistics.median(self.verify_seconds) if self.verify_seconds else None,
        )


@dataclass(frozen=True, kw_only=True)
class SpeculationMetrics:
    """How speculation went; medians of times over the rounds with drafts, milliseconds."""

    rounds: int
    acceptance: float | None  # share of drafts that stayed, of those whose turn came
    accepted: dict[str, int]  # rounds by accepted drafts
    acceptance_by_place: list[float]  # the first draft's, the second's ...
    arms: dict[str, int]  # passes of the target by who drafted how many tokens; a plain one on a GPU is several
    draft_ms: float | None
    verify_ms: float | None
    plain_ms_per_token: float | None = None  # of plain decoding in the same process, where compared
    speedup: float | None = None
    same_text: bool | None = None

    def lines(self) -> list[str]:
        """Return them for people."""
        if self.acceptance is None:
            return [f"drafts     none: {self.arms.get('plain', 0)} plain steps"]
        places = ", ".join(f"{share:.0%}" for share in self.acceptance_by_place)
        arms = ", ".join(f"{name} x{launches}" for name, launches in self.arms.items())
        lines = [
            f"drafts     {self.acceptance:.0%} accepted over {self.rounds} rounds (by place {places}); "
            f"draft {self.draft_ms:.2f} ms, verify {self.verify_ms:.2f} ms",
            f"rounds     {arms}",
        ]
        if self.speedup is not None:
            same = {True: "the same text", False: "another text", None: ""}[self.same_text]
            lines.append(f"speed-up   {self.speedup:.2f}x of plain {self.plain_ms_per_token:.2f} ms/token; {same}")
        return lines
