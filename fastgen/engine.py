"""The engine: prefill a prompt in fixed chunks, decode token by token, stream the text.

    engine = Engine(load_model("smollm2"))
    for piece in engine.stream(["The capital of France is"]):
        print(piece.text, end="")

The KV cache and every buffer are allocated once. Token, position and noise live on the device; on CUDA the host
reads tokens a few steps behind it and never makes it wait. `fastgen.naive` is the slow twin that tests compare with.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.completion import Completion, GenerationOptions, TextStream
from fastgen.device import synchronize
from fastgen.errors import CapacityError, ModelFileError, UsageError
from fastgen.load import LoadedModel
from fastgen.model import Transformer
from fastgen.noise import NoiseKey
from fastgen.sampling import INVALID_TOKEN, SamplingOptions, sample

CHUNKS = (1024, 128, 16)
"""Widths of prefill; the last chunk of a prompt is padded to the smallest."""

DEFAULT_MAX_SEQ_LEN = 4096
HOST_LAG = 2  # decode steps that are queued on a GPU before the oldest token is read


def prefill(model: Transformer, tokens: Tensor, positions: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """Fill the cache with one chunk [B, T] and return the hidden state [B, D] of each text's last token in it.

    Rows whose prompt ends in another chunk give a value that means nothing.
    """
    hidden = model(tokens, positions, keys, lengths)
    last = (lengths - 1 - positions[:, 0]).clamp(0, tokens.shape[1] - 1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def choose_token(
    model: Transformer,
    hidden: Tensor,
    options: SamplingOptions,
    samples: Tensor,
    positions: Tensor,
    seen: Tensor,
) -> Tensor:
    """Return the next token [B] from hidden states [B, D]; `positions` [B] are where these tokens will stand."""
    key = NoiseKey(seed=options.seed, sample=samples, position=positions)
    token = sample(model.logits(hidden), options, key=key, seen=seen)
    if options.repetition_penalty != 1.0:
        seen.scatter_(1, token[:, None].clamp(min=0), True)
    return token


def decode_one_token(
    model: Transformer, token: Tensor, positions: Tensor, keys: Tensor, options: SamplingOptions,
    samples: Tensor, seen: Tensor,
) -> Tensor:  # fmt: skip
    """Append `token` [B] at `positions` [B] of the texts, and return the token [B] that follows.

    An invalid token is fed as 0: the device goes on, and the host raises when it reads it.
    """
    hidden = model(token[:, None].clamp(min=0), positions[:, None], keys, positions + 1)
    return choose_token(model, hidden[:, 0], options, samples, positions + 1, seen)


class Piece(NamedTuple):
    """A piece of one row's text as it arrives; `token` is the id that completed it."""

    row: int
    text: str
    token: int


@dataclass
class Timings:
    """When things happened in the last generation, in seconds of `time.perf_counter`."""

    start: float = 0.0
    prefilled: float = 0.0
    tokens: list[float] = field(default_factory=list)  # when the host had each step's tokens


class Engine:
    """Generates with one model, `batch` texts at a time, each of at most `max_seq_len` tokens."""

    def __init__(self, model: LoadedModel, *, batch: int = 1, max_seq_len: int | None = None) -> None:
        limit = model.config.max_seq_len
        if max_seq_len is not None and max_seq_len > limit:
            raise UsageError(f"--max-seq-len {max_seq_len}: the model was made for at most {limit} positions")
        self.model = model
        self.batch = batch
        self.max_seq_len = max_seq_len or min(limit, DEFAULT_MAX_SEQ_LEN)
        self.device = model.placement.device
        self.timings = Timings()
        # A padded last chunk writes up to CHUNKS[-1] - 1 positions behind the prompt.
        self._capacity = -(-self.max_seq_len // CHUNKS[-1]) * CHUNKS[-1] + CHUNKS[-1]
        try:
            model.transformer.allocate_cache(batch, self._capacity)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            need = model.transformer.kv_bytes(self._capacity) * batch / 1e9
            raise CapacityError(
                f"a KV cache of {batch} x {self.max_seq_len} tokens needs {need:.1f} GB on {self.device}, "
                "which is not free\nUse a smaller --max-seq-len"
            ) from error
        self._positions = torch.arange(self._capacity, device=self.device)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], options: GenerationOptions | None = None
    ) -> list[Completion]:
        """Return the completions of up to `batch` prompts (texts, or token ids).

        Raises:
            UsageError: no prompt, too many, an empty one, or one that leaves no room in `max_seq_len`.
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
        """Yield every row's text piece by piece.

        `streams` receives the rows' `TextStream`s, whose completions can be asked for at any time; `samples` numbers
        the rows for the noise, so that equal prompts give different texts (by default 0, 1, ...).
        """
        options = options or GenerationOptions()
        encode = self.model.tokenizer.encode
        ids = [encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        self._check(ids)
        rows = [TextStream(self.model.tokenizer, row, options, room=self.max_seq_len - len(row)) for row in ids]
        if streams is not None:
            streams.extend(rows)
        for tokens in self.tokens(ids, options.sampling, samples=samples or range(len(ids))):
            for row, (text, token) in enumerate(zip(rows, tokens, strict=False)):
                if not text.finish_reason:
                    if token == INVALID_TOKEN:
                        raise ModelFileError(
                            f"{self.model.checkpoint.path}: the logits are not finite at position "
                            f"{len(ids[row]) + len(text.completion().tokens)}\n"
                            "The weights are damaged, or overflow this dtype: try --dtype fp32"
                        )
                    yield Piece(row, text.push(token), token)
            if all(text.finish_reason for text in rows):
                return

    @torch.inference_mode()
    def tokens(
        self, prompts: Sequence[Sequence[int]], options: SamplingOptions, *, samples: Sequence[int]
    ) -> Iterator[list[int]]:
        """Yield the next token of every row, step by step, until the caller stops asking.

        A row that is full or finished goes on giving tokens that mean nothing.
        """
        timings = self.timings = Timings(start=time.perf_counter())
        model, lengths = self.model.transformer, [len(prompt) for prompt in prompts]
        sample_ids = torch.tensor(samples, device=self.device)
        seen = self._seen(prompts, options)
        position = torch.tensor(lengths, device=self.device)
        token = choose_token(model, self._prefill(prompts, position), options, sample_ids, position, seen)
        synchronize(self.device)
        timings.prefilled = time.perf_counter()
        reader = TokenReader(self.device)
        filled = max(lengths)
        while True:
            for step in reader.push(token):
                timings.tokens.append(time.perf_counter())
                yield step
            filled = min(filled + 1, self._capacity)
            keys = self._positions[:filled]
            token = decode_one_token(model, token, position, keys, options, sample_ids, seen)
            position = (position + 1).clamp(max=self._capacity - 1)

    def _prefill(self, prompts: Sequence[Sequence[int]], lengths: Tensor) -> Tensor:
        """Return the hidden state [B, D] of every prompt's last token."""
        longest = max(map(len, prompts))
        padded = torch.zeros(len(prompts), self._capacity, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        padded = padded.to(self.device)
        hidden: Tensor | None = None
        for start, width in chunks(longest):
            positions = self._positions[start : start + width].expand(len(prompts), -1)
            keys = self._positions[: start + width]
            tokens = padded[:, start : start + width]
            new = prefill(self.model.transformer, tokens, positions, keys, lengths)
            hidden = new if hidden is None else torch.where((lengths > start)[:, None], new, hidden)
        assert hidden is not None, "prompts are never empty"
        return hidden

    def _seen(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> Tensor:
        """Return [B, V] bool: which tokens each text holds; nothing reads it without a repetition penalty."""
        if options.repetition_penalty == 1.0:
            return torch.empty(0, device=self.device)
        seen = torch.zeros(len(prompts), self.model.config.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
        return seen.to(self.device)

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        if len(prompts) != self.batch:
            raise UsageError(f"{len(prompts)} prompts for an engine with a batch of {self.batch}")
        for prompt in prompts:
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


def chunks(length: int) -> Iterator[tuple[int, int]]:
    """Yield (start, width) of the prefill chunks of a prompt: the widest that still fill, the last one padded."""
    start = 0
    while start < length:
        width = next((width for width in CHUNKS if width <= length - start), CHUNKS[-1])
        yield start, width
        start += width


class TokenReader:
    """Brings tokens to the host: at once on a CPU, a few steps behind the device on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def push(self, token: Tensor) -> Iterator[list[int]]:
        """Queue a step's tokens [B] and yield those that are due."""
        if not self._cuda:
            yield token.tolist()
            return
        host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
        host.copy_(token, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event))
        if len(self._pending) > HOST_LAG:
            oldest, copied = self._pending.popleft()
            copied.synchronize()
            yield oldest.tolist()
