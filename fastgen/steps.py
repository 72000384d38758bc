"""The two steps of generation, prefill of a chunk and decoding of one token, eager or compiled.

Compiled means `torch.compile(mode="reduce-overhead", fullgraph=True)`. The part of the cache that attention reads
and a chunk's width are dynamic sizes, so one graph of each step serves every prompt: nothing recompiles after the
first text (`count_compilations` counts; `--fail-on-recompile` enforces). On a CPU a block is compiled once and called
for every layer, which takes a third of the time; on a GPU the step is flat and becomes CUDA graphs, one for every
power of two of filled cache, since a CUDA graph cannot have a dynamic size.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastgen.model import Transformer
from fastgen.noise import NoiseKey
from fastgen.sampling import SamplingOptions, log_probabilities, sample

CHUNKS = (1024, 128, 16)
"""Widths of prefill; the last chunk of a prompt is padded to the smallest."""

SMALLEST_BOUND = 256
"""Filled positions that the smallest CUDA graph reads."""


def prefill(model: Transformer, tokens: Tensor, positions: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """Fill the cache with one chunk [B, T] and return the hidden state [B, D] of each text's last token in it.

    Rows whose prompt ends in another chunk give a value that means nothing.
    """
    hidden = model(tokens, positions, keys, lengths)
    last = (lengths - 1 - positions[:, 0]).clamp(0, tokens.shape[1] - 1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


class Choice(NamedTuple):
    """The next token [B] int64 and, where asked for, its log-probability [B] fp32 under the unfiltered model."""

    token: Tensor
    logprob: Tensor | None


def choose_token(
    model: Transformer, hidden: Tensor, options: SamplingOptions, key: NoiseKey, seen: Tensor, *, logprobs: bool
) -> Choice:
    """Return the next token from hidden states [B, D]; `key` holds the positions where these tokens will stand."""
    logits = model.logits(hidden)
    token = sample(logits, options, key=key, seen=seen)
    if options.repetition_penalty != 1.0:
        seen.scatter_(1, token[:, None].clamp(min=0), True)
    return Choice(token, log_probabilities(logits, token) if logprobs else None)


def decode_one_token(
    model: Transformer, token: Tensor, positions: Tensor, keys: Tensor, options: SamplingOptions,
    seed: Tensor, samples: Tensor, seen: Tensor, *, logprobs: bool,
) -> Choice:  # fmt: skip
    """Append `token` [B] at `positions` [B] of the texts, and return the token [B] that follows.

    An invalid token is fed as 0: the device goes on, and the host raises when it reads it.
    """
    hidden = model(token[:, None].clamp(min=0), positions[:, None], keys, positions + 1)
    key = NoiseKey(seed=seed, sample=samples, position=positions + 1)
    return choose_token(model, hidden[:, 0], options, key, seen, logprobs=logprobs)


def chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, width) of the chunks that prefill positions start .. end - 1: the widest that still fill, the
    last one padded."""
    while start < end:
        width = next((width for width in CHUNKS if width <= end - start), CHUNKS[-1])
        yield start, width
        start += width


class Steps:
    """Runs the steps of one model; `reach` is the number of positions that any step may read, less than its cache
    holds."""

    def __init__(self, model: Transformer, reach: int, *, compiled: bool) -> None:
        self.model = model
        self.compiled = compiled
        self.on_gpu = model.embedding.weight.is_cuda
        self._positions = torch.arange(reach, device=model.embedding.weight.device)
        self._prefill: Callable[..., Tensor] = prefill
        self._decode: Callable[..., Choice] = decode_one_token
        model.by_region = compiled and not self.on_gpu
        if compiled:
            compile_step = partial(
                torch.compile, fullgraph=True, dynamic=False, mode="reduce-overhead" if self.on_gpu else None
            )
            self._prefill, self._decode = compile_step(prefill), compile_step(decode_one_token)

    def prefill(self, tokens: Tensor, start: int, lengths: Tensor) -> Tensor:
        """Fill positions start .. start + T - 1 with tokens [B, T]; returns hidden states [B, D], see `prefill`."""
        width = tokens.shape[1]
        # A slice of one row counts as contiguous with any stride, and the strides are part of the compiled graph.
        tokens = tokens.clone(memory_format=torch.contiguous_format)
        positions = self._positions[start : start + width].repeat(tokens.shape[0], 1)
        if self.compiled:
            torch._dynamo.mark_dynamic(tokens, 1)
            torch._dynamo.mark_dynamic(positions, 1)
        self._begin()
        return self._prefill(self.model, tokens, positions, self._keys(start + width), lengths).clone()

    def choose(
        self, hidden: Tensor, position: Tensor, options: SamplingOptions, seed: Tensor, samples: Tensor, seen: Tensor,
        *, logprobs: bool,
    ) -> Choice:  # fmt: skip
        """Choose the token that follows a prompt, once a text and so never compiled; see `choose_token`."""
        key = NoiseKey(seed=seed, sample=samples, position=position)
        return choose_token(self.model, hidden, replace(options, seed=0), key, seen, logprobs=logprobs)

    def decode(
        self, token: Tensor, positions: Tensor, filled: int, options: SamplingOptions, seed: Tensor, samples: Tensor,
        seen: Tensor, *, logprobs: bool,
    ) -> Choice:  # fmt: skip
        """Decode one token with `filled` positions to look at, the new one included; see `decode_one_token`."""
        # The seed comes as a tensor, and not in the options, so that another seed is no other graph.
        options, keys = replace(options, seed=0), self._keys(filled)
        self._begin()
        choice = self._decode(self.model, token, positions, keys, options, seed, samples, seen, logprobs=logprobs)
        return Choice(choice.token.clone(), None if choice.logprob is None else choice.logprob.clone())

    def bounds(self) -> list[int]:
        """Return every number of positions that a CUDA graph may read."""
        reach = self._positions.shape[0]
        powers = [SMALLEST_BOUND << power for power in range(32) if SMALLEST_BOUND << power < reach]
        return [*powers, reach]

    def _keys(self, filled: int) -> Tensor:
        if self.compiled and self.on_gpu:
            filled = next(bound for bound in self.bounds() if bound >= filled)
        keys = self._positions[:filled]
        if self.compiled:
            torch._dynamo.mark_dynamic(keys, 0)
        return keys

    def _begin(self) -> None:
        """Tell CUDA graphs that the memory of earlier outputs may be used again: those in use are clones."""
        if self.compiled and self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()


def count_compilations() -> int:
    """Return how many graphs this process has compiled."""
    return counters["stats"]["unique_graphs"]
