"""What rounds of speculation did: how many drafts were accepted, at which places, and what the rounds took."""

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
    start: Mark
    drafted: Mark
    end: Mark


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
        self.draft_seconds.append(launch.start.until(launch.drafted))
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
