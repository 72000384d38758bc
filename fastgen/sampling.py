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
from torch import Tensor

from fastgen.noise import NoiseKey, gumbel
from fastgen.options import SamplingOptions

INVALID_TOKEN = -1
"""Stands for a token where the logits name none: there is a NaN or +inf among them, or all are -inf."""

WEIGHT_UNITS = 2**40
"""What the most likely token weighs in the integer sums of top-p: 2^22 tokens fit, and 1e-12 of it still counts."""


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


def filter_logits(logits: Tensor, options: SamplingOptions, knobs: Knobs | None = None) -> Tensor:
    """Apply temperature (not 0), top-k, top-p and min-p to fp32 logits [..., V]; removed tokens become -inf.

    The others come back less the row's maximum and divided by the temperature: the same distribution, with
    fp32's precision spent on the tokens that can win, however large the logits. Each filter sees what the one
    before left. Tokens that tie at a threshold stay together, so no result hangs on the order of a sort, and the
    most likely token always stays. A NaN or +inf in a row comes back as NaN.
    """
    knobs = knobs or knobs_of(options)
    scores = (logits - logits.amax(-1, keepdim=True)) / knobs.temperature
    if 0 < options.top_k < scores.shape[-1]:
        scores = _remove_below(scores, scores.topk(options.top_k).values[..., -1:])
    if options.top_p < 1:
        scores = _remove_below(scores, _top_p_threshold(scores, knobs.top_p))
    if options.min_p > 0:
        # p / max p < min_p, without a softmax: the largest score is 0.
        scores = _remove_below(scores, torch.as_tensor(knobs.min_p, dtype=torch.float64).log())
    return scores


def _remove_below(scores: Tensor, threshold: Tensor | float) -> Tensor:
    # The comparison is false for NaN, so a NaN stays and reaches `best_token`.
    return scores.masked_fill(scores < threshold, -math.inf)


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
) -> Tensor:
    """Choose a token for each row of logits [..., V] (fp32 or lower): int64 [...], or `INVALID_TOKEN`.

    `key` names the noise of these rows, with its own seed, and may be left out when greedy. `seen` [..., V] is
    the bool mask of earlier tokens, and may be left out without a repetition penalty. `knobs` stand in for the
    options' numbers, of which then only counts whether they switch a filter on.
    """
    scores, knobs = logits.float(), knobs or knobs_of(options)
    if options.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the mask of earlier tokens"
        scores = penalize(scores, seen, knobs.repetition_penalty)
    if options.temperature > 0:
        assert key is not None, "sampling needs a noise key"
        scores = filter_logits(scores, options, knobs) + gumbel(key, scores.shape[-1])
    return best_token(scores)


def best_token(scores: Tensor) -> Tensor:
    """Return the id of each row's largest score [..., V], the lowest id on ties: int64 [...].

    Without a finite maximum it is `INVALID_TOKEN`, so that a broken model does not pass for a confident one:
    nothing can be raised on the device. Who reads the tokens raises; who feeds them back clamps them to 0 first.
    """
    # torch.max promises the first of equal maxima, and NaN is the largest value to it. In two steps, because Inductor
    # gives the argmax of a row to one thread block, with all that is fused into it: for V = 128256 on an H200, 98 us
    # with the noise, against 8 us.
    vocab = scores.shape[-1]
    block = min(vocab & -vocab, 1024)  # a power of two that divides the row
    value, within = scores.unflatten(-1, (-1, block)).max(-1)
    value, which = value.max(-1, keepdim=True)
    token = which * block + within.gather(-1, which)
    return torch.where(value.isfinite(), token, INVALID_TOKEN)[..., 0]


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of `tokens` (int64 [...]) under logits [..., V]: fp32 [...].

    They are the model's own: without penalty, temperature and filters. That of `INVALID_TOKEN` is NaN.
    """
    logits = logits.float()
    chosen = logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    return (chosen - logits.logsumexp(-1)).masked_fill(tokens == INVALID_TOKEN, math.nan)
