"""A round of speculation: draft K tokens, verify them in one pass of the target, accept, move on, all on the device.

The target's pass takes each text's last token and its drafts, a row of W tokens at consecutive places, W the smallest
of `WIDTHS` that holds K + 1; what lies behind the drafts is filling, computed and ignored. Its KV cache then holds
the drafts that were refused as well, behind the place that the text has reached: a text is rolled back by its
position alone (`Transformer.allocate_cache`).

Rows, drafts and limit are static tensors that the work itself moves on, so on CUDA a round is two graph launches,
drafting and verifying, whatever the texts do, and the host reads nothing in between. Plain decoding is one, of as many
steps as `fastgen.graphs` puts into one. Texts of a batch accept each their own number. As in `fastgen.steps`, where the
model's stages are kernels only the choice of sampled tokens is left to torch.compile.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.acceptance import Verdict, accept_equal, accept_or_resample
from fastgen.drafters import Drafter
from fastgen.graphs import Burst, Graphs, bounds_below, burst_of, settle
from fastgen.model import Transformer
from fastgen.noise import NoiseKey, gumbel, uniform
from fastgen.options import MOST_DRAFTS, SamplingOptions
from fastgen.sampling import Knobs, adjust, log_probabilities, sample
from fastgen.steps import (
    Cases,
    Choice,
    Result,
    Rows,
    choose_token,
    covered_by_kernels,
    decode_one_token,
    most_bytes,
    whole_lanes,
)

WIDTHS = (1, 2, 4, 8, MOST_DRAFTS + 1)
"""Tokens that the target takes at once."""

SINGLE = 2
"""The width of a single draft: a size of 1 is a special case to the compiler, and so a graph of its own."""

SPARE = WIDTHS[-1] + 1
"""Places of a row's text behind the last position: a round may write there."""

ACCEPT_STREAM = 1
"""The noise that decides about drafts, see `accept_or_resample`; what replaces them has stream 0, plain sampling's."""


class Round(NamedTuple):
    """What a round gave: tokens int64 [B, W], the first `counts` [B] of a row real (None: all of them, as of plain
    steps), and their log-probabilities fp32 [B, W] where asked for."""

    tokens: Tensor
    counts: Tensor | None
    logprobs: Tensor | None


class Drafts(NamedTuple):
    """What is to be verified, in static tensors.

    Attributes:
        tokens: [B, 17] int64; place 0 is the text's last token's, the drafts stand from 1 on.
        probabilities: [B, 15, V] fp32 that they were drawn from; empty where drafts share the target's noise.
        limit: int64 without dimensions, how many there are.
    """

    tokens: Tensor
    probabilities: Tensor
    limit: Tensor


def width_of(count: int) -> int:
    """Return the width that verifies `count` drafts, at most `MOST_DRAFTS`."""
    return next(width for width in WIDTHS if width > count)


def needs_no_logits(model: Transformer, options: SamplingOptions, *, logprobs: bool) -> bool:
    """Whether all that is asked of the logits is where the largest stands."""
    return options.takes_largest and model.vocabulary.is_whole and not logprobs


def decide(
    model: Transformer, hidden: Tensor, rows: Rows, tokens: Tensor, probabilities: Tensor | None, limit: Tensor,
    options: SamplingOptions, *, logprobs: bool,
) -> Round:  # fmt: skip
    """Return which drafts stay, tokens[:, 1:] of [B, W], and what follows them, by the target's hidden states
    [B, W, D]."""
    own = model.own_logits(hidden)
    logits = model.vocabulary.join(own)
    seen = _seen_before(rows.seen, tokens) if options.repetition_penalty != 1.0 else None
    places = rows.positions[:, None] + 1 + torch.arange(tokens.shape[1], device=tokens.device)
    key = NoiseKey(seed=rows.seed, sample=rows.samples, position=places)
    knobs = Knobs(*rows.knobs.unbind())
    if probabilities is None:
        verdict = accept_equal(sample(logits, options, key=key, seen=seen, knobs=knobs), tokens[:, 1:], limit)
    else:
        target = adjust(logits, options, seen=seen, knobs=knobs).softmax(-1)
        verdict = _accept_or_resample(rows, target, probabilities, tokens[:, 1:], limit)
    verdict = verdict._replace(tokens=model.vocabulary.check(verdict.tokens, hidden, own, fed=tokens))
    return Round(*verdict, log_probabilities(logits, verdict.tokens) if logprobs else None)


def verify(
    model: Transformer, rows: Rows, tokens: Tensor, probabilities: Tensor | None, limit: Tensor, keys: Tensor,
    options: SamplingOptions, *, logprobs: bool, decide: Callable[..., Round] = decide,
) -> Round:  # fmt: skip
    """Verify drafts, tokens[:, 1:] of [B, W], and move the rows behind what was accepted and one token more.

    Drafts that were drawn independently come with the `probabilities` [B, W - 1, V] that they were drawn from, and are
    accepted or resampled; others stay while they equal the target's choice. `decide` is the function of that name,
    compiled.
    """
    places = rows.positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    tokens = torch.cat((rows.token[:, None], tokens[:, 1:]), 1).clamp(min=0)
    hidden = model(tokens, places, keys, rows.positions + 1)
    if needs_no_logits(model, options, logprobs=logprobs):
        done = Round(*accept_equal(model.greedy_token(hidden), tokens[:, 1:], limit), None)
    else:
        done = decide(model, hidden, rows, tokens, probabilities, limit, options, logprobs=logprobs)
    _advance(rows, done, places + 1, options)
    return done


def _accept_or_resample(rows: Rows, target: Tensor, draft: Tensor, drafts: Tensor, limit: Tensor) -> Verdict:
    first = rows.positions + 1
    decided = first[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
    key = partial(NoiseKey, seed=rows.seed, sample=rows.samples)

    def noise(place: Tensor) -> Tensor:
        return gumbel(key(position=first + place), target.shape[2])

    chances = uniform(key(position=decided, stream=ACCEPT_STREAM))
    return accept_or_resample(target, draft, drafts, limit, uniform=chances, gumbel=noise)


def _advance(rows: Rows, done: Round, places: Tensor, options: SamplingOptions) -> None:
    """Write a round's tokens to where they stand, [B, W], and move the rows to the last real one.

    What is written behind it is overwritten by the next round.
    """
    tokens, counts, _ = done
    assert counts is not None, "a verified round says how many tokens stayed"
    last = tokens.gather(1, counts[:, None] - 1)
    rows.text.scatter_(1, places, tokens)
    if options.repetition_penalty != 1.0:
        real = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        rows.seen.scatter_(1, torch.where(real, tokens, last).clamp(min=0), True)
    rows.token.copy_(last[:, 0])
    rows.positions.copy_((rows.positions + counts).clamp(max=rows.text.shape[1] - SPARE))


def _seen_before(seen: Tensor, tokens: Tensor) -> Tensor:
    """Return [B, W, V] bool: the tokens `seen` [B, V], and those of the row [B, W] up to each place."""
    own = torch.zeros(*tokens.shape, seen.shape[1], dtype=torch.bool, device=seen.device)
    own = own.scatter(2, tokens[:, :, None], True)
    return seen[:, None] | (own.long().cumsum(1) > 0)


class Rounds:
    """Runs rounds for one target and its drafters.

    `reach` is the number of positions that a plain step may read; the cache holds `SPARE` more. `widths` are those
    that will come, for `batch` texts; `independent` says that drafts are drawn apart from the target's noise.
    """

    def __init__(
        self, model: Transformer, drafters: Sequence[Drafter], reach: int, *, batch: int, widths: Sequence[int],
        compiled: bool,
    ) -> None:  # fmt: skip
        device = model.embedding.weight.device
        on_gpu = compiled and device.type == "cuda"
        by_kernels = compiled and covered_by_kernels(model, batch * max(widths))
        self.model, self.drafters, self.widths = model, drafters, widths
        self.independent, self._dynamic = False, compiled and not by_kernels
        self.burst = burst_of(most_bytes(model)) if on_gpu else Burst()
        self.bounds = [reach] if by_kernels else bounds_below(reach)
        self._positions = torch.arange(reach + SPARE, device=device)
        self._first = torch.zeros((), dtype=torch.int64, device=device)  # where what a drafter is shown begins
        self._decode_one: Callable[..., Choice] = decode_one_token
        self._choose: Callable[..., Choice] | None = None
        self._verify: Callable[..., Round] = verify
        self._cases = Cases(compiled)
        self._graphs = Graphs() if on_gpu else None
        self._by_kernels: dict[tuple[int, int], bool] = {}  # whether a drafter is shown so many tokens by kernels
        self._rows: Rows | None = None
        self._drafts: Drafts | None = None
        compile_step = partial(torch.compile, fullgraph=True, dynamic=False)
        if by_kernels:
            self._choose = compile_step(choose_token)
            self._verify = partial(verify, decide=compile_step(decide))
        elif compiled:
            self._decode_one, self._verify = compile_step(decode_one_token), compile_step(verify)

    @property
    def rows(self) -> Rows:
        """The rows, where the rounds move them on."""
        assert self._rows is not None, "start() comes first"
        return self._rows

    def start(self, rows: Rows, *, independent: bool) -> None:
        """Begin with these rows, whose tensors are ours from now on."""
        self._rows, moved = settle(self._rows, rows) if self._graphs else (rows, False)
        if moved or self._drafts is None or independent != self.independent:
            self._drafts, self.independent = self._no_drafts(rows, independent), independent
            self.forget()

    def forget(self) -> None:
        """Drop what holds addresses of tensors that are no longer there."""
        if self._graphs:
            self._graphs.forget()

    @property
    def captures(self) -> int:
        """How many CUDA graphs have been captured."""
        return self._graphs.captures if self._graphs else 0

    def draft(self, drafter: int, count: int, filled: int, options: SamplingOptions) -> None:
        """Let a drafter guess `count` tokens behind texts of at most `filled` tokens, the last one included."""
        options, bound = options.structure(), self._bound(filled + count)
        work = partial(self._draft, drafter, count, bound, options)
        self._run(("draft", drafter, count, bound, options), work)

    def show(self, drafter: int, start: int, width: int) -> None:
        """Append the texts' tokens at start .. start + width - 1 to the cache of a drafter that has its own."""
        steps = self.drafters[drafter].steps
        assert steps is not None, "who has no cache has missed nothing"
        if self._graphs and self._shown_by_kernels(drafter, steps.model, width):
            self._first.fill_(start)
            self._run(("show", drafter, width), partial(self._show, steps.model, width))
        else:
            tokens = self.rows.text[:, start : start + width].clamp(0, steps.model.vocab_size - 1)
            steps.prefill(tokens, start, self.rows.positions + 1)

    def _shown_by_kernels(self, drafter: int, draft: Transformer, width: int) -> bool:
        case = (drafter, width)
        if case not in self._by_kernels:
            self._by_kernels[case] = covered_by_kernels(draft, len(self.rows.token) * width)
        return self._by_kernels[case]

    def verify(self, width: int, filled: int, options: SamplingOptions, *, logprobs: bool) -> Round:
        """Verify what was drafted for texts of at most `filled` tokens."""
        options, bound = options.structure(), self._bound(filled + width)
        work = partial(self._verify_drafts, width, bound, options, logprobs)
        return self._run(("verify", width, bound, options, logprobs), work)

    def decode(self, steps: int, filled: int, options: SamplingOptions, *, logprobs: bool) -> Round:
        """Make so many plain steps for texts of at most `filled` tokens."""
        options, bound = options.structure(), self._bound(filled + steps)
        work = partial(self._decode, steps, bound, options, logprobs)
        return self._run(("decode", steps, bound, options, logprobs), work)

    def _run(self, case: object, work: Callable[[], Round | None]) -> Round:
        if self._graphs is None:
            return work()  # type: ignore[return-value]
        return self._graphs.run(case, work, [*self.rows, *self._static_drafts()])  # type: ignore[return-value]

    def _draft(self, drafter: int, count: int, bound: int, options: SamplingOptions) -> None:
        tokens, probabilities, limit = self._static_drafts()
        draft = self.drafters[drafter].draft(self.rows, count, self._keys(bound), options, independent=self.independent)
        tokens[:, 1 : count + 1] = draft.tokens
        limit.fill_(count)
        if draft.probabilities is not None:
            probabilities[:, :count] = draft.probabilities

    def _show(self, draft: Transformer, width: int) -> None:
        places = (self._first + self._positions[:width]).expand(len(self.rows.token), -1)
        tokens = self.rows.text.gather(1, places).clamp(0, draft.vocab_size - 1)
        draft(tokens, places, self._positions[: self.bounds[-1]], self.rows.positions + 1)

    def _decode(self, count: int, bound: int, options: SamplingOptions, logprobs: bool) -> Round:
        """Make `count` plain steps, as one round of so many tokens.

        As in `fastgen.graphs`, a step does nothing but decode: what moves the rows on is done once, for all steps.
        """
        rows, keys, steps = self.rows, self._keys(bound), []
        ahead = self._positions[1 : count + 1, None]
        places = (rows.positions + ahead).clamp(max=rows.text.shape[1] - SPARE)
        decode_one = self._decode_one
        if self._choose and not needs_no_logits(self.model, options, logprobs=logprobs):
            decode_one = partial(decode_one, choose=self._choose)
        case = ("plain", options, logprobs)
        for following in places:
            steps.append(self._call(case, decode_one, logprobs, (self.model, rows, keys, options)))
            rows = rows._replace(token=steps[-1].token, positions=following)
        tokens = torch.stack([step.token for step in steps], 1)
        self.rows.text.scatter_(1, places.T, tokens)
        self.rows.token.copy_(rows.token)
        self.rows.positions.copy_(rows.positions)
        given = torch.stack([step.logprob for step in steps if step.logprob is not None], 1) if logprobs else None
        return Round(tokens, None, given)

    def _verify_drafts(self, width: int, bound: int, options: SamplingOptions, logprobs: bool) -> Round:
        drafts = self._static_drafts()
        tokens = drafts.tokens[:, :width].contiguous()
        probabilities = drafts.probabilities[:, : width - 1].contiguous() if self.independent else None
        case: tuple[object, ...] = ("verify", options, logprobs)
        if self._dynamic and len(self.widths) > 2 and tokens.shape[0] == 1 and width > SINGLE:
            # One graph for all; that none exceeds 16 tokens is what quantized linears and kernels need to know.
            torch._dynamo.mark_dynamic(tokens, 1, min=SINGLE + 1, max=WIDTHS[-1])
        else:
            case = (*case, width)
        arguments = (self.model, self.rows, tokens, probabilities, drafts.limit, self._keys(bound), options)
        return self._call(case, self._verify, logprobs, arguments)

    def _call(
        self, case: tuple[object, ...], step: Callable[..., Result], logprobs: bool, arguments: tuple[object, ...]
    ) -> Result:
        case = (*case, self.rows.token.shape, self.rows.seen.shape, self.independent)
        return self._cases.run(case, partial(step, logprobs=logprobs), *arguments)

    def _bound(self, filled: int) -> int:
        """Return how many positions attention reads for `filled` tokens."""
        if self._graphs is None:
            return min(filled, self.bounds[-1])
        return next((bound for bound in self.bounds if bound >= filled), self.bounds[-1])

    def _keys(self, bound: int) -> Tensor:
        keys = self._positions[: whole_lanes(bound)]
        if self._dynamic:
            torch._dynamo.mark_dynamic(keys, 0)
        return keys

    def _static_drafts(self) -> Drafts:
        assert self._drafts is not None, "start() comes first"
        return self._drafts

    def _no_drafts(self, rows: Rows, independent: bool) -> Drafts:
        shape = (len(rows.token), MOST_DRAFTS, self.model.vocab_size)
        return Drafts(
            tokens=torch.zeros(len(rows.token), SPARE, dtype=torch.int64, device=rows.token.device),
            probabilities=torch.zeros(shape if independent else 0, device=rows.token.device),
            limit=torch.zeros((), dtype=torch.int64, device=rows.token.device),
        )
