"""The two steps of generation, prefill of a chunk and decoding of one token, eager or compiled.

Compiled means `torch.compile(fullgraph=True)`. The part of the cache that attention reads and a chunk's width are
dynamic sizes, so one graph of each step serves every prompt: nothing recompiles after the first text
(`count_compilations` counts; `--fail-on-recompile` enforces). On a CPU a block is compiled once and called for every
layer, which takes a third of the time; on a GPU the step is compiled flat, and CUDA graphs of several steps
(`fastgen.graphs`) take the launches off the host: what mode="reduce-overhead" is for, without its copies of inputs
and outputs at every step. Where the model's stages are kernels (`fastgen.kernels.fused`), only the choice of a
sampled token is left to torch.compile; prompts then go through plain PyTorch, whose time is that of the matmuls.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastgen.graphs import Burst, GraphDecoder, bounds_below, burst_of
from fastgen.model import Transformer
from fastgen.noise import NoiseKey
from fastgen.options import SamplingOptions
from fastgen.sampling import Knobs, log_probabilities, sample

CHUNKS = (1024, 128, 16)
"""Widths of prefill; the last chunk of a prompt is padded to the smallest."""


LANES = 16
"""Numbers of 32 bits in the widest vector of a CPU."""

Result = TypeVar("Result")

MOST_CASES = 1024
"""Graphs of one step that a process may compile: structures of sampling options times batch sizes."""


class Rows(NamedTuple):
    """What the rows of a batch carry from step to step, on the device.

    Attributes:
        token: [B] int64, the last token of each text, which the next step appends to the cache.
        positions: [B] int64, where that token stands.
        seed: int64 without dimensions, of the sampling noise; a tensor, so that another seed is no other graph.
        samples: [B] int64, tells apart texts with equal prompts.
        knobs: [4] float64, the numbers of `fastgen.sampling.Knobs`; like the seed, no part of a graph.
        seen: [B, V] bool, the tokens that a text holds, for the repetition penalty; empty without one.
        text: [B, S] int64, the tokens of each text by their position, for drafting; empty without it.
    """

    token: Tensor
    positions: Tensor
    seed: Tensor
    samples: Tensor
    knobs: Tensor
    seen: Tensor
    text: Tensor


class Choice(NamedTuple):
    """The next token, int64, and where asked for its log-probability, fp32, under the unfiltered model: [B] each, or
    [steps, B]."""

    token: Tensor
    logprob: Tensor | None


def prefill(model: Transformer, tokens: Tensor, positions: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """Fill the cache with one chunk [B, T] and return the hidden state [B, D] of each text's last token in it.

    Rows whose prompt ends in another chunk give a value that means nothing.
    """
    hidden = model(tokens, positions, keys, lengths)
    last = (lengths - 1 - positions[:, 0]).clamp(0, tokens.shape[1] - 1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def choose_token(
    model: Transformer, hidden: Tensor, positions: Tensor, rows: Rows, options: SamplingOptions, *, logprobs: bool
) -> Choice:
    """Return the next token from hidden states [B, D]; `positions` [B] is where it will stand."""
    vocabulary = model.vocabulary
    if options.takes_largest and not logprobs and vocabulary.is_whole:
        return Choice(model.greedy_token(hidden), None)
    logits = model.own_logits(hidden)
    key = NoiseKey(seed=rows.seed, sample=rows.samples, position=positions)
    knobs = Knobs(*rows.knobs.unbind())
    token = sample(logits, options, key=key, seen=rows.seen, knobs=knobs, vocabulary=vocabulary)
    token = vocabulary.check(token, hidden, logits)
    if options.repetition_penalty != 1.0:
        rows.seen.scatter_(1, token[:, None].clamp(min=0), True)
    return Choice(token, log_probabilities(logits, token, vocabulary) if logprobs else None)


def decode_one_token(
    model: Transformer,
    rows: Rows,
    keys: Tensor,
    options: SamplingOptions,
    *,
    logprobs: bool,
    choose: Callable[..., Choice] = choose_token,
) -> Choice:
    """Append each row's token to its text, and return the token that follows; `choose` is `choose_token`, compiled.

    An invalid token is fed as 0: the device goes on, and the host raises when it reads it.
    """
    following = rows.positions
    if model.rope.is_dynamic or not options.takes_largest:  # who else looks would cost a launch
        following = following + 1
    hidden = model(rows.token[:, None], rows.positions[:, None], keys, following)
    return choose(model, hidden[:, 0], following, rows, options, logprobs=logprobs)


def chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, width) of the chunks that prefill positions start .. end - 1: the widest that still fill, the
    last one padded."""
    while start < end:
        width = next((width for width in CHUNKS if width <= end - start), CHUNKS[-1])
        yield start, width
        start += width


class Steps:
    """Runs the steps of one model.

    `reach` is the number of positions that any step may read, less than the cache holds: reading all of it would be a
    special case to the compiler, and so another graph. `burst` is how many steps `decode` makes at once.
    """

    def __init__(self, model: Transformer, reach: int, *, compiled: bool, batch: int = 1) -> None:
        self.model = model
        self.compiled = compiled
        self.burst = Burst()
        self._positions = torch.arange(reach, device=model.embedding.weight.device)
        self._prefill: Callable[..., Tensor] = prefill
        self._decode: Callable[..., Choice] = decode_one_token
        self._graphs: GraphDecoder | None = None
        self._rows: Rows | None = None
        self._cases = Cases(compiled)
        on_gpu = model.embedding.weight.is_cuda
        model.by_region |= compiled and not on_gpu
        compile_step = partial(torch.compile, fullgraph=True, dynamic=False)
        self._by_kernels = compiled and on_gpu and covered_by_kernels(model, batch)
        if self._by_kernels:
            self._choose = compile_step(choose_token)
        elif compiled:
            self._prefill, self._decode = compile_step(prefill), compile_step(decode_one_token)
        if compiled and on_gpu:
            # Kernels read where a text ends on the device: one graph serves every length.
            bounds = [reach] if self._by_kernels else bounds_below(reach)
            self._graphs = GraphDecoder(self._decode_eagerly, reach, bounds)
            self.burst = burst_of(most_bytes(model))

    def prefill(self, tokens: Tensor, start: int, lengths: Tensor) -> Tensor:
        """Fill positions start .. start + T - 1 with tokens [B, T]; returns hidden states [B, D], see `prefill`."""
        width = tokens.shape[1]
        # A slice of one row counts as contiguous with any stride, and the strides are part of the compiled graph.
        tokens = tokens.clone(memory_format=torch.contiguous_format)
        positions = self._positions[start : start + width].repeat(tokens.shape[0], 1)
        if self.compiled and not self._by_kernels:
            torch._dynamo.mark_dynamic(tokens, 1)
            torch._dynamo.mark_dynamic(positions, 1)
        keys = self._keys(start + width)
        return self._cases.run(
            ("prefill", tokens.shape[0]), self._prefill, self.model, tokens, positions, keys, lengths
        )

    def forget(self) -> None:
        """Drop what holds addresses of a cache that is no longer there."""
        if self._graphs:
            self._graphs.forget()

    def start(self, rows: Rows) -> None:
        """Begin to decode from `rows`; the tensors are ours from now on."""
        self._rows = rows
        if self._graphs:
            self._graphs.start(rows)

    def choose(self, hidden: Tensor, rows: Rows, options: SamplingOptions, *, logprobs: bool) -> Choice:
        """Choose the token that follows a prompt; once a text, and so never compiled. See `choose_token`."""
        return choose_token(self.model, hidden, rows.positions, rows, options, logprobs=logprobs)

    def decode(self, filled: int, options: SamplingOptions, *, logprobs: bool, left: int) -> Choice:
        """Decode the next tokens of all rows, [steps, B], so many as `burst` has for texts with at most `left` tokens
        still to come. The first step attends to `filled` positions, its own included."""
        options = options.structure()
        reach = self._positions.shape[0]
        if self._graphs:
            steps = self.burst.steps(left)
            return self._graphs.decode(min(filled + steps - 1, reach), steps, options, logprobs=logprobs)
        assert self._rows is not None, "start() comes before decode()"
        choice = self._decode_eagerly(self._rows, min(filled, reach), options, logprobs=logprobs)
        following = (self._rows.positions + 1).clamp(max=reach - 1)
        self._rows = self._rows._replace(token=choice.token, positions=following)
        return Choice(choice.token[None], None if choice.logprob is None else choice.logprob[None])

    def bounds(self) -> list[int]:
        """Return values of `filled` whose decoding makes every graph that any value needs."""
        if self._graphs:
            return self._graphs.bounds
        return list(dict.fromkeys(min(bound, len(self._positions)) for bound in (LANES + 1, 2 * LANES + 1)))

    def count(self) -> int:
        """Return how many graphs have been compiled or captured; stands still once every case was seen."""
        if not self.compiled:
            return 0
        return count_compilations() + self.captures

    @property
    def captures(self) -> int:
        """How many CUDA graphs have been captured."""
        return self._graphs.captures if self._graphs else 0

    def _decode_eagerly(self, rows: Rows, filled: int, options: SamplingOptions, *, logprobs: bool) -> Choice:
        case = ("decode", options, logprobs, rows.token.shape[0], rows.seen.shape)
        step = partial(self._decode, logprobs=logprobs)
        if self._by_kernels and (logprobs or not options.takes_largest or not self.model.vocabulary.is_whole):
            step = partial(step, choose=self._choose)
        return self._cases.run(case, step, self.model, rows, self._keys(filled), options)

    def _keys(self, filled: int) -> Tensor:
        keys = self._positions[: whole_lanes(filled)]
        if self.compiled and not self._by_kernels:
            torch._dynamo.mark_dynamic(keys, 0)
        return keys


def whole_lanes(filled: int) -> int:
    """Return how many positions to read so that what is summed over them comes out the same however many follow: the
    end of a vector's last lanes would be summed in another order."""
    return -(-filled // LANES) * LANES


class Cases:
    """What compiled steps have been called with: a case that is new may compile, however many others there are."""

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._seen: set[object] = set()

    def run(self, case: object, step: Callable[..., Result], *arguments: object) -> Result:
        """Run a step."""
        if not self._compiled or case in self._seen:
            return step(*arguments)
        # PyTorch gives a function up after eight graphs. Cases that differ by intent are not what that guards against.
        with torch._dynamo.config.patch(recompile_limit=MOST_CASES, accumulated_recompile_limit=MOST_CASES):
            result = step(*arguments)
        self._seen.add(case)
        return result


def covered_by_kernels(model: Transformer, batch: int) -> bool:
    """Whether a decode step of `batch` texts is nothing but kernels, which leave torch.compile nothing to do."""
    covers = getattr(model.stages, "covers", None)
    return covers is not None and covers(model, model.config.head_dim, batch)


def most_bytes(model: Transformer) -> int:
    """Return the bytes of weights that a step reads, of several ranks' parts the largest: all are to make as many steps
    at a time. The ranks come here together."""
    return model.vocabulary.largest(model.weight_bytes())


def count_compilations() -> int:
    """Return how many graphs this process has compiled."""
    return counters["stats"]["unique_graphs"]
