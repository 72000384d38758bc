"""The engine: prefill a prompt in fixed chunks, decode token by token, stream the text.

    engine = Engine(load_model("smollm2"))
    for piece in engine.stream(["The capital of France is"]):
        print(piece.text, end="")

The KV cache and every buffer are allocated once. Token, position and noise live on the device; on CUDA the host
reads tokens a few steps behind it and never makes it wait. `fastgen.naive` is the slow twin that tests compare with.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.completion import Completion, TextStream
from fastgen.device import require_memory, synchronize
from fastgen.errors import FastgenError, ModelFileError, RankLostError, UsageError
from fastgen.load import LoadedModel, Progress
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.readback import Readback
from fastgen.sampling import INVALID_TOKEN, RANKS_DIFFER, knobs_of
from fastgen.steps import CHUNKS, Choice, Rows, Steps, chunks

DEFAULT_MAX_SEQ_LEN = 4096


class Piece(NamedTuple):
    """A piece of one row's text as it arrives; `token` is the id that completed it, `drafted` tells whether a draft
    model had guessed it (`fastgen.speculative`)."""

    row: int
    text: str
    token: int
    drafted: bool = False


class StepTokens(NamedTuple):
    """What one step gave the host: every row's token, where asked for its log-probability, and under speculation
    whether it was drafted."""

    tokens: list[int]
    logprobs: list[float] | None
    drafted: list[bool] | None = None


@dataclass
class Timings:
    """When things happened in the last generation, in seconds of `time.perf_counter`."""

    start: float = 0.0
    prefilled: float = 0.0
    prefilled_tokens: int = 0  # of the longest prompt; what the cache held already is not counted
    tokens: list[float] = field(default_factory=list)  # when the host had each step's tokens
    ends: list[int] = field(default_factory=list)  # how many steps had been made whenever some had come

    def share_out(self, steps: int) -> None:
        """Record that the host has the tokens of so many steps: only their end can be seen, so they share the time."""
        now = time.perf_counter()
        before = self.tokens[-1] if self.tokens else now
        self.tokens += [before + (now - before) * (step + 1) / steps for step in range(steps)]
        self.ends.append(len(self.tokens))

    def decoded(self, count: int) -> tuple[int, float]:
        """Return how many steps behind the first had been made when the host had `count` of them, at least one, and the
        seconds that they took: a burst, or a round, comes as a whole, and takes its time whoever needs the last of it.
        """
        end = next(end for end in self.ends if end >= count)
        return end - 1, self.tokens[end - 1] - self.tokens[0]


class Engine:
    """Generates with one model, `batch` texts at a time, each of at most `max_seq_len` tokens.

    The cache is kept between calls: a prompt that begins like the last text is prefilled from where they part.
    """

    def __init__(
        self, model: LoadedModel, *, batch: int = 1, max_seq_len: int | None = None, compile: bool = False
    ) -> None:
        limit = model.config.max_seq_len
        if max_seq_len is not None and not 2 <= max_seq_len <= limit:
            raise UsageError(f"--max-seq-len {max_seq_len}: expected 2 to {limit}, which the model was made for")
        if batch < 1:
            raise UsageError(f"batch {batch}: expected at least 1")
        self.model = model
        self.batch = batch
        self.max_seq_len = max_seq_len or min(limit, DEFAULT_MAX_SEQ_LEN)
        self.device = model.placement.device
        self.timings = Timings()
        # A padded last chunk reaches up to CHUNKS[-1] - 1 positions behind the prompt.
        self._reach = -(-self.max_seq_len // CHUNKS[-1]) * CHUNKS[-1] + CHUNKS[-1]
        self._texts: list[list[int]] = []  # tokens of each row; the cache holds all but perhaps the last
        self._token = object()  # says that the model's cache is ours
        self._generation: object = None  # which one the cache's content belongs to
        self._warm_count = 0
        self._warm_for: GenerationOptions | None = None  # what `warm_up` was for, if it was called
        self._own_cache()
        self._steps = Steps(model.transformer, self._reach, compiled=compile, batch=batch)

    @property
    def compiled(self) -> bool:
        """Whether the steps are compiled."""
        return self._steps.compiled

    @property
    def recompiles(self) -> int:
        """Graphs that this process has compiled or captured since `warm_up`; there should never be one."""
        return self._count() - self._warm_count

    @torch.inference_mode()
    def warm_up(self, options: GenerationOptions | None = None, progress: Progress | None = None) -> None:
        """Compile and capture everything that a text of any length will need; does nothing without `compile`."""
        if not self.compiled:
            return
        if self._own_cache():
            self._forget()
        self._texts, self._generation = [], object()  # what the cache holds will be written over
        self._warm_for = options or GenerationOptions()
        jobs = self._warm_jobs(self._warm_for)
        for done, job in enumerate(jobs):
            if progress:
                progress(done, len(jobs))
            job()
        synchronize(self.device)
        self._warm_count = self._count()

    def _warm_jobs(self, options: GenerationOptions) -> list[Callable[[], None]]:
        """Return what compiles and captures, in parts."""
        cases = [(bound, left) for bound in self._steps.bounds() for left in self._steps.burst.sizes()]
        decoding = [partial(self._warm_decode, bound, left, options) for bound, left in cases]
        return [*self._warm_prefills(self._steps), *decoding]

    def _warm_prefills(self, steps: Steps) -> list[Callable[[], None]]:
        on_gpu = self.device.type == "cuda"
        widths = [width for width in CHUNKS if width < self._reach] if on_gpu else CHUNKS[-1:]
        cases = [(width, bound) for bound in steps.bounds() for width in widths if width <= bound]
        return [partial(self._warm_prefill, steps, width, bound) for width, bound in cases]

    def _warm_prefill(self, steps: Steps, width: int, bound: int) -> None:
        tokens = torch.zeros(self.batch, width, dtype=torch.int64, device=self.device)
        steps.prefill(tokens, bound - width, torch.full((self.batch,), bound, device=self.device))

    def _warm_decode(self, bound: int, left: int, options: GenerationOptions) -> None:
        self._steps.start(self._idle_rows(bound - left, options))
        self._steps.decode(bound - left + 1, options.sampling, logprobs=options.logprobs, left=left)

    def _idle_rows(self, position: int, options: GenerationOptions) -> Rows:
        """Return rows of no text in particular whose last token stands at `position`."""
        lengths = torch.full((self.batch,), position, device=self.device)
        return self._rows(lengths, [[0]] * self.batch, range(self.batch), options.sampling)

    def _count(self) -> int:
        """Return how many graphs have been compiled or captured."""
        return self._steps.count()

    def _captures(self) -> int:
        """Return how many CUDA graphs have been captured."""
        return self._steps.captures

    def _owns_cache(self) -> bool:
        return self.model.transformer.cache_owner is self._token

    def _own_cache(self) -> bool:
        """Allocate the model's cache for this engine, if another engine has taken it since; returns whether it had.

        Raises:
            CapacityError: the memory is not there.
        """
        if self._owns_cache():
            return False
        transformer = self.model.transformer
        capacity = self._reach + CHUNKS[-1]  # more than any step reads, see `Steps`
        need = transformer.kv_bytes(capacity) * self.batch
        require_memory(
            self.device, need, f"a KV cache of {self.batch} x {self.max_seq_len} tokens", "a smaller --max-seq-len"
        )
        transformer.allocate_cache(self.batch, capacity, owner=self._token)
        self._texts = []
        return True

    def weights_changed(self) -> None:
        """Let no later text reuse what the cache holds of an earlier one."""
        self._texts = []

    def generate(
        self, prompts: Sequence[str | Sequence[int]], options: GenerationOptions | None = None
    ) -> list[Completion]:
        """Return the completions of `batch` prompts (texts, or token ids).

        Raises:
            UsageError: too few or too many prompts, an empty one, or one that leaves no room in `max_seq_len`.
            ModelFileError: the weights give logits that are not finite.
        """
        streams: list[TextStream] = []
        for _ in self.stream(prompts, options, streams=streams):
            pass
        return [stream.completion() for stream in streams]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: GenerationOptions | None = None,
        *,
        streams: list[TextStream] | None = None,
        samples: Sequence[int] | None = None,
    ) -> Iterator[Piece]:
        """Return an iterator over every row's text, piece by piece; raises as `generate`, for bad prompts at once.

        `streams` receives the rows' `TextStream`s, whose completions can be asked for at any time; `samples` numbers
        the rows for the noise, so that equal prompts give different texts (by default 0, 1, ...).
        """
        options = options or GenerationOptions()
        ids = self.encode(prompts)
        samples = range(len(ids)) if samples is None else samples
        if len(samples) != len(ids):
            raise UsageError(f"{len(samples)} sample numbers for {len(ids)} prompts: expected one for each")
        rows = [
            TextStream(
                self.model.tokenizer, row, options, room=self.max_seq_len - len(row), stop_ids=self.model.stop_ids
            )
            for row in ids
        ]
        if streams is not None:
            streams.extend(rows)
        return self._pieces(ids, rows, options, samples)

    def _pieces(
        self, ids: list[list[int]], rows: list[TextStream], options: GenerationOptions, samples: Sequence[int]
    ) -> Iterator[Piece]:
        """Generate, and give every row its tokens until all have ended."""
        for tokens, logprobs, drafted in self.tokens(ids, options, samples=samples):
            for row, (text, token) in enumerate(zip(rows, tokens, strict=True)):
                if not text.finish_reason:
                    if token in (INVALID_TOKEN, RANKS_DIFFER):
                        self._texts = []
                        self.model.transformer.clear_cache()
                        raise self._no_token(token, len(ids[row]) + text.count)
                    piece = text.push(token, logprobs[row] if logprobs else None)
                    yield Piece(row, piece, token, bool(drafted and drafted[row]))
            if all(text.finish_reason for text in rows):
                return

    @torch.inference_mode()
    def tokens(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions, *, samples: Sequence[int]
    ) -> Iterator[StepTokens]:
        """Yield the next token of every row, step by step, until the caller stops asking.

        A row that is full or finished goes on giving tokens that mean nothing.
        """
        if self._own_cache():
            captures = self._captures()
            self._forget()
            if captures and self._warm_for:  # now, for what a text captures would count as a part of its steps
                self.warm_up(self._warm_for)
        generation = self._generation = object()
        rows, first = self._begin(prompts, options, samples)
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        most = min(options.max_new_tokens, self.max_seq_len - shortest)
        for step in self._decode(rows, first, longest, most, options):
            for text, token in zip(self._texts, step.tokens, strict=True):
                text.append(token)
            yield step
            if self._generation is not generation or not self._owns_cache():
                raise UsageError(
                    "this text cannot go on: another was begun on the same model, whose cache holds one\n"
                    "Finish one before the next, or use Engine(batch=N)"
                )

    def _begin(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions, samples: Sequence[int]
    ) -> tuple[Rows, Choice]:
        """Prefill the prompts and choose each text's first token, which the rows that are returned hold."""
        timings = self.timings = Timings(start=time.perf_counter())
        start = self._reusable(prompts)
        self._texts = []
        lengths = torch.tensor(list(map(len, prompts)), device=self.device)
        rows = self._rows(lengths, prompts, samples, options.sampling)
        hidden = self._prefill(self._steps, prompts, start, lengths)
        choice = self._steps.choose(hidden, rows, options.sampling, logprobs=options.logprobs)
        rows = rows._replace(token=choice.token)
        self._prepare(rows, prompts, options)
        synchronize(self.device)
        timings.prefilled = time.perf_counter()
        timings.prefilled_tokens = max(map(len, prompts)) - start
        self._texts = list(map(list, prompts))
        return rows, choice

    def _prepare(self, rows: Rows, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> None:
        """Begin what else must be done before texts of these rows, which hold their first tokens, are decoded."""

    def _decode(
        self, rows: Rows, first: Choice, filled: int, most: int, options: GenerationOptions
    ) -> Iterator[StepTokens]:
        """Yield the first token of every text and those that follow, without end, of which at most `most` are asked of
        any text; `filled` is the longest prompt."""
        self._steps.start(rows)
        readback: Readback[Choice, None] = Readback(self.device)
        burst = Choice(first.token[None], None if first.logprob is None else first.logprob[None])
        end = filled + most - 1
        while True:
            for due, _ in readback.push(burst, None):
                yield from self._unpack(due)
            self.model.ranks.at("decode")
            self.model.ranks.check_interrupt()
            burst = self._steps.decode(filled + 1, options.sampling, logprobs=options.logprobs, left=end - filled)
            filled += len(burst.token)

    def _unpack(self, burst: Choice) -> Iterator[StepTokens]:
        """Yield a burst's steps, [steps, B], once the host has them."""
        tokens = burst.token.tolist()
        logprobs = [None] * len(tokens) if burst.logprob is None else burst.logprob.tolist()
        self.timings.share_out(len(tokens))
        yield from map(StepTokens, tokens, logprobs)

    def _forget(self) -> None:
        """Drop what knows the addresses of a cache that is no longer there."""
        self._steps.forget()

    def _rows(
        self, lengths: Tensor, prompts: Sequence[Sequence[int]], samples: Sequence[int], options: SamplingOptions
    ) -> Rows:
        """Return the rows of texts whose next token is still to be chosen."""
        return Rows(
            token=torch.zeros_like(lengths),
            positions=lengths,
            seed=torch.tensor(options.seed, device=self.device),
            samples=torch.tensor(samples, device=self.device),
            knobs=torch.tensor(knobs_of(options), dtype=torch.float64, device=self.device),
            seen=self._seen(prompts, options),
            text=torch.empty(0, dtype=torch.int64, device=self.device),
        )

    def _prefill(self, steps: Steps, prompts: Sequence[Sequence[int]], first: int, lengths: Tensor) -> Tensor:
        """Fill the cache of a model from position `first` on; returns the hidden state [B, D] of every prompt's last
        token."""
        padded = torch.zeros(len(prompts), self._reach, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        padded = padded.to(self.device)
        last: Tensor | None = None
        for start, width in chunks(first, max(map(len, prompts))):
            self.model.ranks.at("prefill")
            hidden = steps.prefill(padded[:, start : start + width], start, lengths)
            last = hidden if last is None else torch.where((lengths > start)[:, None], hidden, last)
        assert last is not None, "every prompt has a token that is not in the cache"
        return last

    def _reusable(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many tokens from the beginning of every prompt the cache holds already."""
        if len(prompts) != len(self._texts) or self.model.transformer.rope.is_dynamic:
            return 0  # dynamic RoPE turns a key by the length that its text had
        shared = []
        for prompt, text in zip(prompts, self._texts, strict=True):
            pairs = zip(prompt, text, strict=False)
            parting = next((at for at, (new, old) in enumerate(pairs) if new != old), min(len(prompt), len(text)))
            shared.append(min(parting, len(prompt) - 1, len(text) - 1))
        return max(0, min(shared))

    def _seen(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> Tensor:
        """Return [B, V] bool: which tokens each text holds; nothing reads it without a repetition penalty."""
        if options.repetition_penalty == 1.0:
            return torch.empty(0, device=self.device)
        seen = torch.zeros(len(prompts), self.model.config.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
        return seen.to(self.device)

    def encode(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Return the token ids of `batch` prompts, each a text or token ids already.

        Raises:
            UsageError: too few or too many prompts, an empty one, or one that leaves no room in `max_seq_len`.
        """
        if isinstance(prompts, str) or len(prompts) != self.batch:
            found = "a text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise UsageError(f"{found} for an engine with a batch of {self.batch}: expected a list of so many prompts")
        encode = self.model.tokenizer.encode
        ids = [encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for prompt in ids:
            if not prompt:
                raise UsageError("the prompt is empty, and the tokenizer puts nothing in front of it")
            if len(prompt) >= self.max_seq_len:
                raise UsageError(
                    f"the prompt has {len(prompt)} tokens, the context holds {self.max_seq_len}, answer included\n"
                    f"Shorten it, or raise --max-seq-len (this model: up to {self.model.config.max_seq_len})"
                )
            wrong = [token for token in prompt if not 0 <= token < self.model.config.vocab_size]
            if wrong:
                raise UsageError(f"token {wrong[0]} lies outside the vocabulary of {self.model.config.vocab_size}")
        return ids

    def _no_token(self, token: int, position: int) -> FastgenError:
        """Return the error that stands behind what is no token."""
        if token == RANKS_DIFFER:
            return RankLostError(
                f"--check-ranks: the ranks differ in logits or tokens at position {position}\n"
                "They must have the same software and the same kind of device"
            )
        return ModelFileError(
            f"{self.model.checkpoint.path}: the logits are not finite at position {position}\n"
            "The weights are damaged, or overflow this dtype: try --dtype fp32"
        )
