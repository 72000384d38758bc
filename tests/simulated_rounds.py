"""Rounds of speculation on a clock that does not run: what `auto` chooses costs what a machine is said to take.

Costs are in steps of plain decoding. As on a GPU, rounds are queued one behind the device: what a round gave is known
only once the next was begun; plain steps come in bursts, and a draft model has to be shown what was decoded without it.
The host takes its time to read a round and to queue the next: a device whose rounds are shorter waits for it.
The pace reads timings that are noisy, and was told prices that may be wrong; time is reckoned without the noise.
"""

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastgen.pace import MODEL_HOPE, NGRAM_HOPE, PLAIN, Arm, LivePace, Spent, cheapest_chunks

STEP_SECONDS = 1e-4

Text = Callable[[int, int], float]
"""The chance of a draft: of which drafter, at which place of the text."""


@dataclass(frozen=True)
class Machine:
    """What rounds cost: verifying by width, a draft of the model, drafting n-grams, showing the model a chunk."""

    verify: Mapping[int, float]
    draft: float
    ngram: float
    showing: Mapping[int, float]
    burst: int
    lag: int  # rounds that are queued before the oldest is read
    host: float = 0.0  # what the host needs to read a round and to queue another
    single: float | None = None  # what a step costs that is made alone, at the end of a text; None: bursts alone

    def rehearsed(self) -> dict[Arm, float]:
        """Return what rounds of every arm cost one after the other, and a plain step."""
        return {arm: 1.0 if arm == PLAIN else max(cost, self.host) for arm, cost in self.costs().items()}

    def costs(self) -> dict[Arm, float]:
        """Return what a round of every arm costs, and a plain step."""
        model = {Arm(0, count): self.verify[count + 1] + count * self.draft for count in (1, 3, 7)}
        return {PLAIN: 1.0} | model | {Arm(1, count): self.verify[count + 1] + self.ngram for count in (3, 7, 15)}


# As the built-in pair on a GPU, whose launches weigh as much as its weights.
TINY = Machine({2: 1.33, 4: 1.36, 8: 1.4, 16: 1.5}, 0.47, 0.15, {16: 0.6, 128: 3.0, 1024: 6.0}, 8, 1)

MACHINES = {
    "tiny": TINY,
    "tiny, slow host": replace(TINY, host=4.0),
    "7B": Machine(
        {2: 1.03, 4: 1.06, 8: 1.12, 16: 1.2}, 0.066, 0.02, {16: 0.08, 128: 0.1, 1024: 0.4}, 2, 1, single=1.01
    ),
    "7B int4": Machine(
        {2: 1.1, 4: 1.15, 8: 1.25, 16: 1.4}, 0.1, 0.04, {16: 0.15, 128: 0.2, 1024: 0.8}, 8, 1, single=1.05
    ),
    "dear single steps": Machine(
        {2: 1.1, 4: 1.15, 8: 1.25, 16: 1.4}, 0.1, 0.04, {16: 0.15, 128: 0.2, 1024: 0.8}, 8, 1, single=1.3
    ),
    "CPU": Machine({2: 1.15, 4: 1.35, 8: 1.7, 16: 2.3}, 0.25, 0.05, {16: 0.5, 128: 1.3, 1024: 10.0}, 1, 0),
    "CPU batch": Machine({2: 1.6, 4: 2.6, 8: 4.6, 16: 8.6}, 0.25, 0.05, {16: 3.0, 128: 20.0, 1024: 160.0}, 1, 0),
    "slow draft": Machine({2: 1.2, 4: 1.4, 8: 1.6, 16: 2.0}, 1.1, 1.5, {16: 1.2, 128: 3.0, 1024: 6.0}, 8, 1),
}


class Run(NamedTuple):
    """How fast each text was, as a multiple of plain decoding, and how often each arm was chosen."""

    speeds: list[float]
    arms: Counter[Arm]


class _Round(NamedTuple):
    arm: Arm
    spent: list[float]
    showing: float
    missed: Sequence[int]
    tokens: int


def simulate(
    machine: str, text: Text, lengths: Sequence[int], *, price: Callable[[Arm], float] = lambda arm: 1.0,
    noise: float = 0.02, spikes: float = 0.0, seed: int = 0,
) -> Run:  # fmt: skip
    """Decode texts of so many tokens, one after the other; `at` counts on from text to text.

    `price` is what each arm was thought to cost, as a multiple of what it does; timings scatter by `noise`, and a share
    `spikes` of them is several times as long.
    """
    kind, chance = MACHINES[machine], random.Random(seed)
    costs = kind.costs()
    pace = LivePace(
        {arm: cost * price(arm) * STEP_SECONDS for arm, cost in kind.rehearsed().items()},
        {0: MODEL_HOPE, 1: NGRAM_HOPE},
        {width: cost * STEP_SECONDS for width, cost in kind.showing.items()},
        burst=kind.burst,
    )
    speeds, arms, before = [], Counter(), 0
    for length in lengths:
        pace.begin()
        at, shown, ends, ready = 0, 0, [0.0], 0.0  # `ends` are the device's times, `ready` is the host's
        under_way: deque[_Round] = deque()
        while at < length:
            missed = [width for _, width in cheapest_chunks(shown, at, 1 << 20, kind.showing)]
            arm = pace.choose(missed)
            missed = missed if arm != PLAIN and arm.drafter == 0 else []
            pace.queue(arm, missed)
            cost, tokens = costs[arm], 1
            if arm == PLAIN and (kind.single is None or length - at >= kind.burst):
                cost, tokens = kind.burst, kind.burst
            elif arm == PLAIN:
                cost = kind.single
            while tokens <= arm.drafts and chance.random() < text(arm.drafter, before + at):
                tokens += 1
            showing = sum(kind.showing[width] for width in missed)
            at, arms[arm] = at + tokens, arms[arm] + 1
            shown = at if arm != PLAIN and arm.drafter == 0 else shown
            idle = max(0.0, ready - ends[-1])
            if under_way:  # what the device waited for a round is counted to the one before
                under_way[-1].spent.append(idle * STEP_SECONDS)
            ends.append(ends[-1] + idle + cost + showing)
            ready = max(ready, ends[max(0, len(ends) - 1 - kind.lag)]) + kind.host
            scatter = math.exp(chance.gauss(0, noise)) * (chance.uniform(3, 50) if chance.random() < spikes else 1)
            seconds = (cost * scatter + showing) * STEP_SECONDS
            under_way.append(_Round(arm, [seconds], showing * STEP_SECONDS, missed, tokens))
            if len(under_way) > kind.lag:
                done = under_way.popleft()
                pace.record(done.arm, Spent(sum(done.spent), done.showing, done.missed), [done.tokens])
        speeds.append(at / ends[-1])
        before += at
    return Run(speeds, arms)


def best_speed(machine: str, chances: Mapping[int, float]) -> float:
    """Return the speed of the best arm alone, with drafters that are right so often."""
    return max(
        sum(chances[arm.drafter] ** place for place in range(arm.drafts + 1)) / cost
        for arm, cost in MACHINES[machine].costs().items()
    )
