"""The engine with speculation: a draft guesses several tokens, the target verifies them in one pass, nothing is lost.

    target, draft = load_model("stories"), load_model("stories-draft")
    engine = SpeculativeEngine(target, Speculation(draft=draft))
    for piece in engine.stream(["Once upon a time"]):
        print(piece.text, end="")

It is used like `Engine` and gives the same texts: greedy and coupled ones token for token, those of the rule of
Leviathan et al. with the same distribution (`fastgen.acceptance`). Rounds run on the device (`fastgen.rounds`); the
host reads them one behind and chooses the next (`fastgen.pace`). Where the texts of a batch accept differently, the
faster ones wait for the slowest on the host alone.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.device import require_memory, synchronize
from fastgen.drafters import NgramDrafter
from fastgen.engine import Engine, StepTokens
from fastgen.load import LoadedModel, Progress
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.pace import (
    MODEL_HOPE,
    NGRAM_HOPE,
    PLAIN,
    Arm,
    FixedPace,
    LivePace,
    Pace,
    Rehearsal,
    Spent,
    cheapest_chunks,
)
from fastgen.readback import Mark, Readback, mark
from fastgen.rounds import SPARE, WIDTHS, Round, Rounds, width_of
from fastgen.speculation import AUTO, Speculation, check, make_arms, make_drafters, own_model
from fastgen.steps import CHUNKS, LANES, Choice, Rows
from fastgen.tally import Launch, SpeculationMetrics, Tally

SMALLEST = 40
"""Tokens of the texts that graphs are compiled for and costs are measured with."""

AHEAD = 2 * WIDTHS[-1]
"""Tokens by which the device can be ahead of what the host has read."""

CALIBRATIONS, CALIBRATION_SECONDS, REHEARSED = 9, 1.0, 2
"""How often every round is timed before the first text, after what time less often, and which of several in a row
counts on a GPU."""

ENDLESS = 1 << 30
"""Tokens of a text whose end is not what is timed."""


class Token(NamedTuple):
    """A token on its way to the reader."""

    id: int
    logprob: float | None
    drafted: bool


class SpeculativeEngine(Engine):
    """Generates as `Engine` does, several tokens a step of the target.

    Raises `UsageError` if the draft has another vocabulary or device, or the target cannot be speculated about.
    """

    def __init__(
        self, model: LoadedModel, speculation: Speculation, *, batch: int = 1, max_seq_len: int | None = None,
        compile: bool = False,
    ) -> None:  # fmt: skip
        check(model, speculation)
        self.speculation = speculation
        self.tally = Tally()
        self._drafted = 0  # the draft's cache is filled below this position, as far as each row reaches
        self._behind = False  # whether rounds without the draft have moved the rows on since
        self._showing: dict[int, float] = {width: width for width in CHUNKS}  # what a chunk costs, by its width
        super().__init__(model, batch=batch, max_seq_len=max_seq_len, compile=compile)
        self._smallest = min(SMALLEST, self._reach)
        self.drafters = make_drafters(model, speculation, self._reach, batch=batch, compiled=compile)
        self.arms = make_arms(speculation, self.drafters)
        widths = sorted({width_of(arm.drafts) for arm in (*self.arms, PLAIN)})
        self._rounds = Rounds(
            model.transformer, self.drafters, self._reach, batch=batch, widths=widths, compiled=compile
        )  # fmt: skip
        self.pace: Pace | None = None if speculation.count == AUTO else FixedPace(self.arms[0])

    def figures(self) -> SpeculationMetrics:
        """Return how the last generation's speculation went."""
        return self.tally.figures([drafter.name for drafter in self.drafters])

    def _owns_cache(self) -> bool:
        draft = own_model(self.model, self.speculation)
        return super()._owns_cache() and (draft is None or draft.cache_owner is self._token)

    def _own_cache(self) -> bool:
        if not super()._own_cache():
            return False
        draft = own_model(self.model, self.speculation)
        if draft is not None:
            capacity = self._reach + CHUNKS[-1]
            require_memory(
                self.device, draft.kv_bytes(capacity) * self.batch, "the draft's KV cache", "a smaller --max-seq-len"
            )
            draft.allocate_cache(self.batch, capacity, owner=self._token)
        self._drafted = 0
        return True

    def _forget(self) -> None:
        super()._forget()
        self._rounds.forget()

    def _count(self) -> int:
        return super()._count() + self._rounds.captures

    def _captures(self) -> int:
        return super()._captures() + self._rounds.captures

    @torch.inference_mode()
    def warm_up(self, options: GenerationOptions | None = None, progress: Progress | None = None) -> None:
        """See `Engine.warm_up`; without `compile` too it measures what `auto` chooses by, which else is done before the
        first text."""
        super().warm_up(options, progress)
        if not self.compiled:
            if self._own_cache():
                self._forget()
            self._calibrate(options or GenerationOptions())

    def _warm_jobs(self, options: GenerationOptions) -> list[Callable[[], None]]:
        jobs = self._warm_prefills(self._steps)
        for drafter in self.drafters:
            jobs += self._warm_prefills(drafter.steps) if drafter.steps else []
        arms = self.arms if isinstance(self.pace, FixedPace) else (*self.arms, PLAIN)
        cases = [(arm, left) for arm in arms for left in (self._rounds.burst.sizes() if arm == PLAIN else [1])]
        for bound in self._bounds():
            jobs += [partial(self._warm_arm, arm, left, bound, options) for arm, left in cases]
        if self.device.type == "cuda":
            jobs += [partial(self._rounds.show, 0, 0, width) for width in self._shown_widths()]
        return [*jobs, partial(self._calibrate, options)]

    def _bounds(self) -> list[int]:
        """Return filled lengths whose rounds make every graph that any text needs."""
        if self.device.type != "cuda":
            return [self._smallest, self._smallest + LANES]
        bounds = self._rounds.bounds
        enough = next((bound for bound in bounds if bound >= self._most_filled() + AHEAD), bounds[-1])
        return [bound - AHEAD for bound in bounds if bound <= enough]

    def _warm_arm(self, arm: Arm, left: int, filled: int, options: GenerationOptions) -> None:
        self._start(self._idle_rows(filled - 1, options), options)
        self._launch(arm, filled, left, options)

    def _calibrate(self, options: GenerationOptions) -> None:
        """Measure what `auto` chooses by: rounds of every arm in turn, a few times over; the best of each counts."""
        if self.pace:
            return
        seconds: dict[Arm, float] = {}
        showing: dict[int, float] = {}
        begin = time.perf_counter()
        for turn in range(CALIBRATIONS):
            if turn > 2 and self.model.ranks.share(time.perf_counter() - begin > CALIBRATION_SECONDS):
                break
            for arm in (*self.arms, PLAIN):
                took = self._time_round(arm, options) / (self._rounds.burst.most if arm == PLAIN else 1)
                seconds[arm] = min(took, seconds.get(arm, took))
            for width in self._shown_widths():
                took = self._time_showing(width)
                showing[width] = min(took, showing.get(width, took))
        if showing:
            self._showing = dict(self.model.ranks.share(list(showing.items())))  # all ranks show the same chunks
        ngram = [isinstance(drafter, NgramDrafter) for drafter in self.drafters]
        hopes = {number: NGRAM_HOPE if found else MODEL_HOPE for number, found in enumerate(ngram)}
        self.pace = LivePace(seconds, hopes, showing, burst=self._rounds.burst.most)
        self._texts, self._drafted = [], 0

    def _time_round(self, arm: Arm, options: GenerationOptions) -> float:
        """Return the seconds of a round in the midst of others. On a GPU the first is launched while the device waits,
        the next while the host has nothing to read: neither costs what those that follow do."""
        rehearsal = self.pace = Rehearsal(arm)
        rows = self._idle_rows(self._smallest, options)
        self._start(rows, options)
        self._drafted, self._behind = self._smallest, False
        try:
            for _ in self._decode(rows, Choice(rows.token, None), self._smallest, ENDLESS, options):
                if len(rehearsal.seconds) >= (REHEARSED if self.device.type == "cuda" else 1):
                    break
        finally:  # a chat goes on when this was interrupted, and then is to find out anew
            self.pace = None
        synchronize(self.device)
        return rehearsal.seconds[-1]

    def _time_showing(self, width: int) -> float:
        """Return the seconds that it takes to show the draft a chunk of text."""
        start = mark(self.device)
        self._rounds.show(0, 0, width)
        end = mark(self.device)
        synchronize(self.device)
        return start.until(end)

    def _shown_widths(self) -> list[int]:
        """Return widths of chunks by which a draft with a cache of its own catches up."""
        return [width for width in CHUNKS if width <= self._reach] if self.drafters[0].steps else []

    def _rows(
        self, lengths: Tensor, prompts: Sequence[Sequence[int]], samples: Sequence[int], options: SamplingOptions
    ) -> Rows:
        text = torch.zeros(len(prompts), self._reach + SPARE, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            text[row, : len(prompt)] = torch.tensor(prompt)
        return super()._rows(lengths, prompts, samples, options)._replace(text=text.to(self.device))

    def _begin(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions, samples: Sequence[int]
    ) -> tuple[Rows, Choice]:
        self._calibrate(options)
        return super()._begin(prompts, options, samples)

    def _prepare(self, rows: Rows, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> None:
        """Write the first tokens to where they stand, and show the draft the prompts: that is prefill too."""
        rows.text.scatter_(1, rows.positions[:, None], rows.token[:, None])
        self._start(rows, options)
        self._behind = True
        self._show_draft(self._missed(max(map(len, prompts))))
        self._drafted = min(map(len, prompts))

    def _reusable(self, prompts: Sequence[Sequence[int]]) -> int:
        shared = super()._reusable(prompts)
        self._drafted = min(self._drafted, shared)
        return shared

    def _decode(
        self, rows: Rows, first: Choice, filled: int, most: int, options: GenerationOptions
    ) -> Iterator[StepTokens]:
        assert self.pace, "there is a pace once there are rounds"
        starts = places = rows.positions.tolist()  # of the last token of each row that the host knows
        self.pace.begin()
        self.tally = Tally()
        tokens = first.token.tolist()
        logprobs = [None] * len(tokens) if first.logprob is None else first.logprob.tolist()
        queues = [deque([Token(token, logprob, False)]) for token, logprob in zip(tokens, logprobs, strict=True)]
        readback: Readback[Round, Launch] = Readback(self.device)
        if not readback.lags:  # else the device has a round to do while the first token is looked at
            yield from self._steps_of(queues)
        while True:
            waiting = readback.waiting()
            filled = max(places) + 1 + sum(launch.tokens for launch in waiting)
            made = 1 + min(place - start for place, start in zip(places, starts, strict=True))
            made += sum(launch.tokens if launch.arm == PLAIN else 1 for launch in waiting)  # at least
            missed = self._missed(filled - 1)
            arm = self._choose([width for _, width in missed])
            round_, launch = self._launch(arm, filled, most - made, options)
            self.pace.queue(arm, launch.missed)
            yield from self._steps_of(queues)
            for done, its_launch in readback.push(round_, launch):
                # A device that had to wait for the next round waited because this one was so short.
                end = launch.end if launch is its_launch else launch.start
                assert end, "results that do not lag are a CPU's, which marks every end"
                counts = self._take(done, its_launch, end, queues)
                places = [place + count for place, count in zip(places, counts, strict=True)]
                if not self._behind:
                    self._drafted = min(places) - 1
                yield from self._steps_of(queues)
            self.model.ranks.at("decode")
            self.model.ranks.check_interrupt()

    def _choose(self, missed: Sequence[int]) -> Arm:
        """Return what to do next, see `Pace.choose`: all ranks do what the first one's clock says."""
        assert self.pace, "there is a pace once there are rounds"
        arm = self.pace.choose(missed)
        return arm if isinstance(self.pace, FixedPace) else Arm(*self.model.ranks.share(arm))

    def _start(self, rows: Rows, options: GenerationOptions) -> None:
        sampled = options.sampling.temperature > 0
        self._rounds.start(rows, independent=sampled and self.speculation.accept == "leviathan")

    def _missed(self, reached: int) -> list[tuple[int, int]]:
        """Return the chunks (start, width) that a draft with a cache of its own has missed, up to the place that texts
        may have reached."""
        if not self._behind or not self.drafters[0].steps:
            return []
        # Of a text that is full and goes on beside others nothing needs to be known.
        return cheapest_chunks(self._drafted, min(reached, self.max_seq_len), self._reach, self._showing)

    def _show_draft(self, missed: Sequence[tuple[int, int]]) -> None:
        """Show the draft what it has missed."""
        for start, width in missed:
            self._rounds.show(0, start, width)
        self._behind = False

    def _launch(self, arm: Arm, filled: int, left: int, options: GenerationOptions) -> tuple[Round, Launch]:
        """Queue a round for texts of at most `filled` tokens. At most `left` more are asked for, which is for plain
        steps to know, not for drafts."""
        filled = min(filled, self._most_filled())
        start = shown = mark(self.device)
        missed: Sequence[tuple[int, int]] = ()
        if arm == PLAIN or not self.drafters[arm.drafter].steps:
            self._behind = True
        elif self._behind:
            missed = self._missed(filled - 1)
            self._show_draft(missed)
            shown = mark(self.device)
        drafted = shown
        if arm == PLAIN:
            steps = self._rounds.burst.steps(left)
            done = self._rounds.decode(steps, filled, options.sampling, logprobs=options.logprobs)
        else:
            self._rounds.draft(arm.drafter, arm.drafts, filled, options.sampling)
            drafted = mark(self.device)
            width = width_of(arm.drafts)
            done = self._rounds.verify(width, filled, options.sampling, logprobs=options.logprobs)
        widths = tuple(width for _, width in missed)
        # A mark takes a GPU some microseconds, and there the next round's start is the end that `_decode` goes by.
        end = None if arm == PLAIN and start.device else mark(self.device)
        return done, Launch(arm, done.tokens.shape[1], widths, start, shown, drafted, end)

    def _most_filled(self) -> int:
        """Return how many tokens a text can have before it is read and ended."""
        return self.max_seq_len + 2 * AHEAD

    def _take(self, done: Round, launch: Launch, end: Mark, queues: list["deque[Token]"]) -> list[int]:
        """Put a round's tokens into the rows' queues, learn from it, and return how many each row got."""
        tokens: list[list[int]] = done.tokens.tolist()
        counts = [launch.tokens] * len(tokens) if done.counts is None else done.counts.tolist()
        logprobs = done.logprobs.tolist() if done.logprobs is not None else None
        for row, count in enumerate(counts):
            for at in range(count):
                drafted = bool(launch.arm.drafts) and at < count - 1
                queues[row].append(Token(tokens[row][at], logprobs[row][at] if logprobs else None, drafted))
        assert self.pace, "there is a pace once there are rounds"
        spent = Spent(launch.start.until(end), launch.start.until(launch.shown), launch.missed)
        self.pace.record(launch.arm, spent, counts)
        self.tally.record(launch, counts)
        return counts

    def _steps_of(self, queues: list["deque[Token]"]) -> Iterator[StepTokens]:
        """Yield the steps for which every row has a token."""
        ready = min(map(len, queues))
        self.timings.share_out(ready)
        for _ in range(ready):
            step = [queue.popleft() for queue in queues]
            logprobs = [token.logprob for token in step if token.logprob is not None]
            yield StepTokens([token.id for token in step], logprobs or None, [token.drafted for token in step])
