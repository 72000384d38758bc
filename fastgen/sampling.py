"""From logits to a token: greedy, or sampled with temperature, top-k, top-p, min-p and a repetition penalty.

Sampling is Gumbel-max: argmax(logits / temperature + Gumbel noise) is a draw from softmax(logits / temperature)
(https://arxiv.org/abs/1611.01144, section 2). The noise is a function of its place (`fastgen.noise`), and with it
the token, whoever computes it.

Nothing here waits for the device: no value is read on the host and no shape depends on data. Options are Python
constants, so a compiled step holds only what they switch on. Order and meaning of the filters are those of
Hugging Face transformers; what it leaves open, ties, is decided here. V is the size of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.errors import UsageError
from fastgen.noise import NoiseKey, gumbel

INVALID_TOKEN = -1
"""Stands for a token where the logits name none: there is a NaN or +inf among them, or all are -inf."""

WEIGHT_UNITS = 2**40
"""What the most likely token weighs in the integer sums of top-p: 2^22 tokens fit, and 1e-12 of it still counts."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; the default is greedy decoding, which no filter changes.

    Raises `UsageError`, which names the flag, where a value is out of its range.
    """

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    repetition_penalty: float = 1.0  # 1 = off; the one option that greedy decoding heeds
    seed: int = 0

    def __post_init__(self) -> None:
        temperature, penalty = self.temperature, self.repetition_penalty
        expectations = (
            # The bounds keep fp32 from overflow, and numbers from being divided by what rounds to 0.
            ("temperature", temperature == 0 or 1e-6 <= temperature <= 1e6, "0 (greedy), or 1e-6 to 1e6"),
            ("top_k", self.top_k >= 0, "a number of tokens, or 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 (off) to 1"),
            ("repetition_penalty", 1e-6 <= penalty <= 1e6, "1e-6 to 1e6; 1 is off, more discourages"),
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits, with its sign"),
        )
        for name, met, expected in expectations:
            if not met:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")


def penalize(logits: Tensor, seen: Tensor, options: SamplingOptions) -> Tensor:
    """Make tokens that were `seen` (bool [..., V]) less likely, as in CTRL (https://arxiv.org/abs/1909.05858).

    As in transformers, positive fp32 logits [..., V] are divided by the penalty and negative ones multiplied,
    once a token however often it was seen. This precedes the temperature.
    """
    penalty = options.repetition_penalty
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Apply temperature (not 0), top-k, top-p and min-p to fp32 logits [..., V]; removed tokens become -inf.

    The others come back less the row's maximum and divided by the temperature: the same distribution, with
    fp32's precision spent on the tokens that can win, however large the logits. Each filter sees what the one
    before left. Tokens that tie at a threshold stay together, so no result hangs on the order of a sort, and the
    most likely token always stays. A NaN or +inf in a row comes back as NaN.
    """
    scores = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        scores = _remove_below(scores, scores.topk(options.top_k).values[..., -1:])
    if options.top_p < 1:
        scores = _remove_below(scores, _top_p_threshold(scores, options.top_p))
    if options.min_p > 0:
        # p / max p < min_p, without a softmax: the largest score is 0.
        scores = _remove_below(scores, math.log(options.min_p))
    return scores


def _remove_below(scores: Tensor, threshold: Tensor | float) -> Tensor:
    # The comparison is false for NaN, so a NaN stays and reaches `best_token`.
    return scores.masked_fill(scores < threshold, -math.inf)


def _top_p_threshold(scores: Tensor, top_p: float) -> Tensor:
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
    logits: Tensor, options: SamplingOptions, *, key: NoiseKey | None = None, seen: Tensor | None = None
) -> Tensor:
    """Choose a token for each row of logits [..., V] (fp32 or lower): int64 [...], or `INVALID_TOKEN`.

    `key` names the noise of these rows, with its own seed, and may be left out when greedy. `seen` [..., V] is
    the bool mask of earlier tokens, and may be left out without a repetition penalty.
    """
    scores = logits.float()
    if options.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the mask of earlier tokens"
        scores = penalize(scores, seen, options)
    if options.temperature > 0:
        assert key is not None, "sampling needs a noise key"
        scores = filter_logits(scores, options) + gumbel(key, scores.shape[-1])
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
