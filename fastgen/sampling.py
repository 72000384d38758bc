"""From logits to a token: greedy, or sampled with temperature, top-k, top-p, min-p and a repetition penalty.

Sampling is Gumbel-max: argmax(logits / temperature + Gumbel noise) is a draw from softmax(logits / temperature)
(https://arxiv.org/abs/1611.01144, section 2). With noise that is a function of its place (`fastgen.noise`) the token is
too, whoever computes it.

Nothing here waits for the device: no value is read on the host and no shape depends on data. Options are Python
constants, so a compiled step holds only what they switch on. Order and meaning of the filters are those of Hugging
Face transformers; what they leave open, ties, is decided below. Letters: B samples, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.errors import UsageError
from fastgen.noise import NoiseKey, gumbel

INVALID_TOKEN = -1
"""Stands for the token where the logits name none: a NaN or +inf among them, or all -inf."""

PROBABILITY_STEPS = 2**40  # fixed point of top-p; finer than any fp32 probability above 2^-17


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. The defaults are greedy decoding; a temperature of 0 leaves the filters without effect.

    Raises `UsageError` that names the flag of the same name.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0  # 1 = all
    min_p: float = 0.0  # 0 = all
    repetition_penalty: float = 1.0  # 1 = none; also when greedy
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number, 0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "a number of tokens, or 0 to keep all"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1 (keeps all)"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 (keeps all) to 1"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "a finite number above 0 (1 is none)",
            ),
            ("seed", -(2**63) <= self.seed < 2**63, "a signed 64-bit integer"),
        )
        for name, fine, expected in checks:
            if not fine:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")


def penalize(logits: Tensor, seen: Tensor, options: SamplingOptions) -> Tensor:
    """Make the tokens of the mask `seen` (bool [..., V]) less likely: CTRL's penalty (https://arxiv.org/abs/1909.05858).

    As in transformers, positive fp32 logits [..., V] are divided by the penalty and negative ones multiplied, once a
    token however often it was seen. It precedes the temperature.
    """
    penalty = options.repetition_penalty
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Apply temperature (above 0), top-k, top-p, min-p to fp32 logits [..., V]; -inf marks the tokens removed.

    The rest comes back divided by the temperature, less the row's maximum: the same distribution, with fp32's
    precision spent on the tokens that can win, however large the logits. Each filter sees what the one before left.
    Tokens that tie at a threshold stay together, so no outcome hangs on the order of a sort; the most likely token
    always stays. A row with a NaN or +inf comes back with a NaN.
    """
    scores = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        scores = _remove_below(scores, scores.topk(options.top_k).values[..., -1:])
    if options.top_p < 1:
        scores = _remove_below(scores, _top_p_threshold(scores, options.top_p))
    if options.min_p > 0:
        # p / p_max >= min_p without a softmax: the maximum of the scores is 0.
        scores = scores.masked_fill(scores < math.log(options.min_p), -math.inf)
    return scores


def sample(
    logits: Tensor, options: SamplingOptions, *, key: NoiseKey | None = None, seen: Tensor | None = None
) -> Tensor:
    """Choose a token from each row of logits [..., V] (fp32 or lower): int64 [...], or `INVALID_TOKEN`.

    `key` names the noise, and is needed unless the options are greedy (its shape is that of the result); its seed
    counts, not that of the options. `seen` [..., V] is the bool mask of earlier tokens, needed with a repetition
    penalty.
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

    A row without a finite maximum gives `INVALID_TOKEN`: a broken model must not pass for a confident one, and there
    is no raising on the device. Whoever reads the tokens raises; whoever feeds them back clamps them to 0 first.
    """
    # torch.max promises the first of equal maxima, eager and compiled, and counts NaN as the largest value.
    value, token = scores.max(-1)
    return torch.where(value.isfinite(), token, INVALID_TOKEN)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the model's own log-probability of `tokens` [...] (int64) under logits [..., V]: fp32 [...].

    It is that of the distribution before penalty, temperature and filters; NaN where the token is `INVALID_TOKEN`.
    """
    logits = logits.float()
    chosen = logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)
    return chosen.masked_fill(tokens == INVALID_TOKEN, math.nan)


def _remove_below(scores: Tensor, threshold: Tensor) -> Tensor:
    # Written as a comparison that is false for NaN, so that a NaN stays and is noticed.
    return scores.masked_fill(scores < threshold, -math.inf)


def _top_p_threshold(scores: Tensor, top_p: float) -> Tensor:
    """Return [..., 1]: the smallest score in the smallest set of largest ones whose probability reaches `top_p`.

    Probabilities are summed as integers. A floating-point sum depends on its order, which CUDA's cumsum does not fix
    (see torch.use_deterministic_algorithms), and the same seed would now and then give another text.
    """
    ascending = scores.sort(-1).values
    steps = (ascending.softmax(-1) * PROBABILITY_STEPS).round().long()
    removed = (steps.cumsum(-1) <= int((1 - top_p) * PROBABILITY_STEPS)).sum(-1, keepdim=True)
    return ascending.gather(-1, removed.clamp(max=scores.shape[-1] - 1))
