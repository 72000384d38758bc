"""From logits to a token: greedy, or sampled with temperature, top-k, top-p, min-p and a repetition penalty.

Sampling is Gumbel-max: argmax(logits / temperature + Gumbel noise) is a draw from softmax(logits / temperature)
(https://arxiv.org/abs/1611.01144, section 2). The noise is a function of its place (`fastgen.noise`), and with it
the token, whoever computes it.

Nothing here waits for the device: no value is read on the host and no shape depends on data. What the options
switch on is static, so a compiled step holds nothing else; their numbers can come from the device (`Knobs`). Order
and meaning of the filters are those of Hugging Face transformers; what it leaves open, ties, is decided here. V is
the size of the vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.noise import NoiseKey, gumbel
from fastgen.options import SamplingOptions

INVALID_TOKEN = -1
"""Stands for a token where the logits name none: there is a NaN or +inf among them, or all are -inf."""

WEIGHT_UNITS = 2**40
"""What the most likely token weighs in the integer sums of top-p: 2^22 tokens fit, and 1e-12 of it still counts."""


RANKS_DIFFER = -2
"""Stands for a token where tensor-parallel ranks were compared and found to differ (`--check-ranks`)."""


class Vocabulary:
    """Which tokens logits [.., V] are of: all, or under tensor parallelism a part, with a way to see the others'."""

    first = 0
    """The token of the first logit."""

    is_whole = True

    def gather(self, x: Tensor) -> Tensor:
        """Return x [.., n] of all parts side by side, [.., parts n], the lowest tokens first."""
        return x

    def largest(self, number: int) -> int:
        """Return the largest of all parts' numbers, whose ranks come here together."""
        return number

    def join(self, logits: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary."""
        return logits

    def check(self, token: Tensor, hidden: Tensor, logits: Tensor, *, fed: Tensor | None = None) -> Tensor:
        """Return the tokens, or `RANKS_DIFFER` where a check was asked for and some rank has other values; `fed` are
        the tokens that it has them from."""
        return token


WHOLE = Vocabulary()


class Knobs(NamedTuple):
    """The numbers of `SamplingOptions` as 0-dim float64 tensors on the device, or as Python numbers."""

    temperature: Tensor | float
    top_p: Tensor | float
    min_p: Tensor | float
    repetition_penalty: Tensor | float


def knobs_of(options: SamplingOptions) -> Knobs:
    """Return the options' numbers."""
    return Knobs(options.temperature, options.top_p, options.min_p, options.repetition_penalty)


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Make tokens that were `seen` (bool [..., V]) less likely, as in CTRL (https://arxiv.org/abs/1909.05858).

    As in transformers, positive fp32 logits [..., V] are divided by the penalty and negative ones multiplied,
    once a token however often it was seen. This precedes the temperature.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(
    logits: Tensor, options: SamplingOptions, knobs: Knobs | None = None, vocabulary: Vocabulary = WHOLE
) -> Tensor:
    """Apply temperature (not 0), top-k, top-p and min-p to fp32 logits [..., V]; removed tokens become -inf.

    The others come back less the row's maximum and divided by the temperature: the same distribution, with
    fp32's precision spent on the tokens that can win, however large the logits. Each filter sees what the one
    before left. Tokens that tie at a threshold stay together, so no result hangs on the order of a sort, and the
    most likely token always stays. A NaN or +inf in a row comes back as NaN.
    """
    knobs = knobs or knobs_of(options)
    scores = (logits - vocabulary.gather(logits.amax(-1, keepdim=True)).amax(-1, keepdim=True)) / knobs.temperature
    if options.top_k > 0:
        scores = _remove_below(scores, _top_k_threshold(scores, options.top_k, vocabulary))
    if options.top_p < 1:
        scores = _remove_below(scores, _top_p_threshold(vocabulary.join(scores), knobs.top_p))
    if options.min_p > 0:
        # p / max p < min_p, without a softmax: the largest score is 0.
        scores = _remove_below(scores, torch.as_tensor(knobs.min_p, dtype=torch.float64).log())
    return scores


def _remove_below(scores: Tensor, threshold: Tensor | float) -> Tensor:
    # The comparison is false for NaN, so a NaN stays and reaches `best_token`.
    return scores.masked_fill(scores < threshold, -math.inf)


def _top_k_threshold(scores: Tensor, top_k: int, vocabulary: Vocabulary) -> Tensor:
    """Return [..., 1], the k-th largest score of the whole vocabulary, or its least if there are no k."""
    own = scores.topk(min(top_k, scores.shape[-1])).values
    if vocabulary.is_whole:
        return own[..., -1:]
    largest = vocabulary.gather(F.pad(own, (0, top_k - own.shape[-1]), value=-math.inf))
    return largest.topk(top_k).values[..., -1:]


def _top_p_threshold(scores: Tensor, top_p: Tensor | float) -> Tensor:
    """Return [..., 1], the least score of the fewest most likely tokens whose probabilities reach `top_p`.

    Weights are added up as integers: a sum of floats depends on its order, CUDA's cumsum does not fix one (see
    torch.use_deterministic_algorithms), and the same seed would now and then give another text.
    """
    ascending = scores.sort(-1).values
    # The largest score is 0, so exp does instead of softmax, whose division would end in the same kernel as the sum:
    # Inductor of torch 2.11 fails on that (https://github.com/pytorch/pytorch/issues/180221).
    below = (ascending.exp() * WEIGHT_UNITS).round().long().cumsum(-1).double()
    removed = (below <= below[..., -1:] * (1 - top_p)).sum(-1, keepdim=True)
    return ascending.gather(-1, removed.clamp(max=scores.shape[-1] - 1))


def sample(
    logits: Tensor,
    options: SamplingOptions,
    *,
    key: NoiseKey | None = None,
    seen: Tensor | None = None,
    knobs: Knobs | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Choose a token for each row of logits [..., V] (fp32 or lower): int64 [...], or `INVALID_TOKEN`.

    `key` names the noise of these rows, with its own seed, and may be left out when greedy. `seen` [..., V] is
    the bool mask of earlier tokens, and may be left out without a repetition penalty. `knobs` stand in for the
    options' numbers, of which then only counts whether they switch a filter on. Where the logits are a part of the
    `vocabulary`, whoever has the other parts calls this too, and all get the same tokens.
    """
    scores = adjust(logits, options, seen=seen, knobs=knobs, vocabulary=vocabulary)
    if options.temperature > 0:
        assert key is not None, "sampling needs a noise key"
        scores = scores + gumbel(key, scores.shape[-1], first_token=vocabulary.first)
    return best_token(scores, vocabulary)


def adjust(
    logits: Tensor,
    options: SamplingOptions,
    *,
    seen: Tensor | None = None,
    knobs: Knobs | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Return the fp32 scores [..., V] that a token is chosen by: logits after the penalty and, unless greedy, after
    temperature and filters; their softmax is then what the token is drawn from."""
    scores, knobs = logits.float(), knobs or knobs_of(options)
    if options.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the mask of earlier tokens"
        if not vocabulary.is_whole:
            seen = seen.narrow(-1, vocabulary.first, scores.shape[-1])
        scores = penalize(scores, seen, knobs.repetition_penalty)
    return filter_logits(scores, options, knobs, vocabulary) if options.temperature > 0 else scores


def best_token(scores: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Return the id of each row's largest score [..., V], the lowest id on ties: int64 [...].

    Without a finite maximum it is `INVALID_TOKEN`, so that a broken model does not pass for a confident one:
    nothing can be raised on the device. Who reads the tokens raises; who feeds them back clamps them to 0 first.
    """
    # torch.max promises the first of equal maxima, and NaN is the largest value to it. In two steps, because Inductor
    # gives the argmax of a row to one thread block, with all that is fused into it: for V = 128256 on an H200, 98 us
    # with the noise, against 8 us.
    size = scores.shape[-1]
    block = min(size & -size, 1024)  # a power of two that divides the row
    value, within = scores.unflatten(-1, (-1, block)).max(-1)
    value, which = value.max(-1, keepdim=True)
    token = which * block + within.gather(-1, which)
    if not vocabulary.is_whole:
        # A score's bits and its token travel together: two gatherings would cost two latencies in every step.
        pair = torch.cat((value.view(torch.int32), (token + vocabulary.first).int()), -1)
        values, tokens = vocabulary.gather(pair).unflatten(-1, (-1, 2)).unbind(-1)
        value, which = values.contiguous().view(torch.float32).max(-1, keepdim=True)
        token = tokens.long().gather(-1, which)
    return torch.where(value.isfinite(), token, INVALID_TOKEN)[..., 0]


def log_probabilities(logits: Tensor, tokens: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Return the log-probabilities of `tokens` (int64 [...]) under logits [..., V]: fp32 [...].

    They are the model's own: without penalty, temperature and filters. That of `INVALID_TOKEN` is NaN.
    """
    logits = logits.float()
    index = tokens[..., None] - vocabulary.first
    chosen, mass = logits.gather(-1, index.clamp(0, logits.shape[-1] - 1)), logits.logsumexp(-1, keepdim=True)
    if not vocabulary.is_whole:
        elsewhere = (index < 0) | (index >= logits.shape[-1])
        pair = torch.cat((chosen.masked_fill(elsewhere, -math.inf), mass), -1)
        parts = vocabulary.gather(pair).unflatten(-1, (-1, 2))
        chosen, mass = parts[..., 0].amax(-1, keepdim=True), parts[..., 1].logsumexp(-1, keepdim=True)
    return (chosen - mass)[..., 0].masked_fill(tokens == INVALID_TOKEN, math.nan)
