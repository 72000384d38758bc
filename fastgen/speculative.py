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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.device import require_memory, synchronize
from fastgen.drafters import Drafter, ModelDrafter, NgramDrafter, self_drafter
from fastgen.engine import Engine, StepTokens
from fastgen.errors import UsageError
from fastgen.load import LoadedModel
from fastgen.model import Transformer
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.pace import PLAIN, Arm, FixedPace, LivePace, Pace
from fastgen.readback import Mark, Readback, mark
from fastgen.rounds import MOST_DRAFTS, SPARE, WIDTHS, Round, Rounds, width_of
from fastgen.steps import CHUNKS, Choice, Rows, chunks
from fastgen.vocabulary import require_same_vocabulary

AUTO = "auto"
MODEL_COUNTS, NGRAM_COUNTS = (1, 3, 7), (3, 7, 15)
"""Drafts a round among which `auto` chooses: those that fill the target's widths."""

SMALLEST = 40
"""Tokens of the texts that graphs are compiled for and costs are measured with."""

AHEAD = 2 * WIDTHS[-1]
"""Tokens by which the device can be ahead of what the host has read."""

CALIBRATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to speculate.

    Attributes:
        draft: a model, "ngram", or "self:N" for the target's own first N layers.
        count: tokens to draft a round, 1 to 15, or "auto": as many, by the draft or by n-grams, as is fastest now.
        accept: "coupled" gives the very text of plain sampling, "leviathan" (arXiv 2211.17192) accepts more when
            sampling and gives its distribution; greedy texts are plain ones in any case.

    Raises `UsageError` where a value is out of its range.
    """

    draft: LoadedModel | str = "ngram"
    count: int | str = AUTO
    accept: str = "coupled"

    def __post_init__(self) -> None:
        if self.count != AUTO and not (isinstance(self.count, int) and 1 <= self.count <= MOST_DRAFTS):
            raise UsageError(f"--speculate {self.count}: expected 1 to {MOST_DRAFTS} tokens a round, or auto")
        if self.accept not in ("coupled", "leviathan"):
            raise UsageError(f"--accept {self.accept}: expected coupled or leviathan")
        if self.accept == "leviathan" and self.count == AUTO:
            raise UsageError(
                "--accept leviathan: needs a fixed --speculate K, for its text hangs on the number of drafts,\n"
                "and auto chooses that by the clock; coupled gives the same text at any number"
            )


class Token(NamedTuple):
    """A token on its way to the reader."""

    id: int
    logprob: float | None
    drafted: bool


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


class SpeculativeEngine(Engine):
    """Generates as `Engine` does, several tokens a step of the target.

    Raises `UsageError` if the draft has another vocabulary or device, or the target cannot be speculated about.
    """

    def __init__(
        self, model: LoadedModel, speculation: Speculation, *, batch: int = 1, max_seq_len: int | None = None,
        compile: bool = False,
    ) -> None:  # fmt: skip
        _check(model, speculation)
        self.speculation = speculation
        self.tally = Tally()
        self._drafted = 0  # the draft's cache is filled below this position, as far as each row reaches
        self._behind = False  # whether rounds without the draft have moved the rows on since
        super().__init__(model, batch=batch, max_seq_len=max_seq_len, compile=compile)
        self.drafters = _drafters(model, speculation, self._reach, compiled=compile)
        self.arms = _arms(speculation, self.drafters)
        widths = sorted({width_of(arm.drafts) for arm in (*self.arms, PLAIN)})
        self._rounds = Rounds(model.transformer, self.drafters, self._reach, widths=widths, compiled=compile)
        self.pace: Pace | None = None if speculation.count == AUTO else FixedPace(self.arms[0])

    def _owns_cache(self) -> bool:
        draft = _own_model(self.model, self.speculation)
        return super()._owns_cache() and (draft is None or draft.cache_owner is self._token)

    def _own_cache(self) -> bool:
        if not super()._own_cache():
            return False
        draft = _own_model(self.model, self.speculation)
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

    def _warm_jobs(self, options: GenerationOptions) -> list[Callable[[], None]]:
        jobs = self._warm_prefills(self._steps)
        for drafter in self.drafters:
            jobs += self._warm_prefills(drafter.steps) if drafter.steps else []
        arms = self.arms if self.pace else (*self.arms, PLAIN)
        for bound in self._bounds():
            jobs += [partial(self._warm_arm, arm, bound, options) for arm in arms]
        return [*jobs, partial(self._calibrate, options)]

    def _bounds(self) -> list[int]:
        """Return filled lengths whose rounds make every graph that any text needs."""
        if self.device.type != "cuda":
            return [SMALLEST, SMALLEST + 1]
        bounds = self._rounds.bounds
        enough = next((bound for bound in bounds if bound >= self._most_filled() + AHEAD), bounds[-1])
        return [bound - AHEAD for bound in bounds if bound <= enough]

    def _warm_arm(self, arm: Arm, filled: int, options: GenerationOptions) -> None:
        self._start(self._idle_rows(filled - 1, options), options)
        self._launch(arm, filled, options, None)

    def _calibrate(self, options: GenerationOptions) -> None:
        """Measure what `auto` chooses by: a round of every arm, a few times, the best counts."""
        if self.pace:
            return
        seconds = {}
        for arm in (*self.arms, PLAIN):
            times = []
            for _ in range(CALIBRATIONS):
                self._start(self._idle_rows(SMALLEST, options), options)
                synchronize(self.device)
                start = time.perf_counter()
                self._launch(arm, SMALLEST + 1, options, None)
                synchronize(self.device)
                times.append(time.perf_counter() - start)
            seconds[arm] = min(times) / (self._rounds.burst if arm == PLAIN else 1)
        self.pace = LivePace(seconds)
        self._texts = []

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
        rows, first = super()._begin(prompts, options, samples)
        rows.text.scatter_(1, rows.positions[:, None], first.token[:, None])
        self._let_draft_follow(rows, max(map(len, prompts)))
        return rows, first

    def _reusable(self, prompts: Sequence[Sequence[int]]) -> int:
        shared = super()._reusable(prompts)
        self._drafted = min(self._drafted, shared)
        return shared

    def _decode(self, rows: Rows, first: Choice, filled: int, options: GenerationOptions) -> Iterator[StepTokens]:
        assert self.pace, "the costs of rounds have been measured"
        places = rows.positions.tolist()  # of the last token of each row that the host knows
        self._start(rows, options)
        self.tally = Tally()
        self.timings.share_out(1)
        yield StepTokens(first.token.tolist(), first.logprob.tolist() if first.logprob is not None else None)
        queues: list[deque[Token]] = [deque() for _ in places]
        readback: Readback[Round, Launch] = Readback(self.device)
        previous: Mark | None = None
        while True:
            arm = self.pace.choose()
            ahead = sum(launch.tokens for launch in readback.waiting())
            round_, launch = self._launch(arm, max(places) + ahead + 1, options, previous)
            previous = launch.end
            for done, its_launch in readback.push(round_, launch):
                counts = self._take(done, its_launch, queues)
                places = [place + count for place, count in zip(places, counts, strict=True)]
                if not self._behind:
                    self._drafted = min(places) - 1
                yield from self._steps_of(queues)

    def _start(self, rows: Rows, options: GenerationOptions) -> None:
        sampled = options.sampling.temperature > 0
        self._rounds.start(rows, independent=sampled and self.speculation.accept == "leviathan")

    def _let_draft_follow(self, rows: Rows, reached: int) -> None:
        """Show a draft with a cache of its own what it has missed, up to the place that texts may have reached."""
        steps = self.drafters[0].steps
        if steps:
            for start, width in chunks(self._drafted, reached):
                tokens = rows.text[:, start : start + width].clamp(0, steps.model.config.vocab_size - 1)
                steps.prefill(tokens, start, rows.positions + 1)
        self._behind = False

    def _launch(self, arm: Arm, filled: int, options: GenerationOptions, previous: Mark | None) -> tuple[Round, Launch]:
        """Queue a round for texts of at most `filled` tokens; it counts from the end of the `previous` one on a GPU,
        whose idle time is a cost too."""
        filled = min(filled, self._most_filled())
        start = previous if previous and previous.device else mark(self.device)
        if arm == PLAIN or not self.drafters[arm.drafter].steps:
            self._behind = True
        elif self._behind:
            self._let_draft_follow(self._rounds.rows, filled - 1)
        if arm.drafts:
            self._rounds.draft(arm.drafter, arm.drafts, filled, options.sampling)
        drafted = mark(self.device)
        width = width_of(arm.drafts)
        done = self._rounds.verify(width, filled, options.sampling, logprobs=options.logprobs)
        return done, Launch(arm, done.tokens.shape[1], start, drafted, mark(self.device))

    def _most_filled(self) -> int:
        """Return how many tokens a text can have before it is read and ended."""
        return self.max_seq_len + 2 * AHEAD

    def _take(self, done: Round, launch: Launch, queues: list["deque[Token]"]) -> list[int]:
        """Put a round's tokens into the rows' queues, learn from it, and return how many each row got."""
        counts: list[int] = done.counts.tolist()
        tokens = done.tokens.tolist()
        logprobs = done.logprobs.tolist() if done.logprobs is not None else None
        for row, count in enumerate(counts):
            for at in range(count):
                drafted = bool(launch.arm.drafts) and at < count - 1
                queues[row].append(Token(tokens[row][at], logprobs[row][at] if logprobs else None, drafted))
        assert self.pace, "there is a pace once there are rounds"
        self.pace.record(launch.arm, launch.start.until(launch.end), counts)
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


def _check(model: LoadedModel, speculation: Speculation) -> None:
    """Raise `UsageError` where the target cannot be speculated about, or not with this draft."""
    if model.transformer.rope.is_dynamic:
        raise UsageError(
            "--draft: this model's RoPE (dynamic NTK) turns a token by the length of its text, so tokens that are\n"
            "verified together would differ from tokens that come one by one; leave --draft out"
        )
    draft = speculation.draft
    if isinstance(draft, LoadedModel):
        if draft.placement.device != model.placement.device:
            raise UsageError(f"--draft: on {draft.placement.device}, the model on {model.placement.device}")
        require_same_vocabulary(model, draft)


def _own_model(model: LoadedModel, speculation: Speculation) -> Transformer | None:
    """Return the draft's transformer if it has a cache of its own."""
    draft = speculation.draft
    return draft.transformer if isinstance(draft, LoadedModel) and draft.transformer is not model.transformer else None


def _drafters(model: LoadedModel, speculation: Speculation, reach: int, *, compiled: bool) -> list[Drafter]:
    """Return the draft's drafter and, where `auto` may choose, the n-gram drafter."""
    transformer, draft = model.transformer, speculation.draft
    vocab_size, layers = model.config.vocab_size, len(transformer.layers)
    ngram = NgramDrafter(vocab_size, compiled=compiled)
    if draft == "ngram":
        return [ngram]
    own = _own_model(model, speculation)
    if own is not None:
        drafter = ModelDrafter("model", own, vocab_size, reach, compiled=compiled)
    else:
        count = str(draft).removeprefix("self:") if isinstance(draft, str) else str(layers)
        if not count.isdecimal() or not 1 <= int(count) <= layers:
            raise UsageError(f"--draft {draft}: expected a model, ngram, none, or self:N with N from 1 to {layers}")
        drafter = self_drafter(f"self:{count}", transformer, int(count), reach, compiled=compiled)
    return [drafter, ngram] if speculation.count == AUTO else [drafter]


def _arms(speculation: Speculation, drafters: Sequence[Drafter]) -> list[Arm]:
    """Return the rounds among which to choose, plain decoding apart."""
    if isinstance(speculation.count, int):
        return [Arm(0, speculation.count)]
    return [
        Arm(number, count)
        for number, drafter in enumerate(drafters)
        for count in (NGRAM_COUNTS if isinstance(drafter, NgramDrafter) else MODEL_COUNTS)
    ]
