"""Which drafted tokens stay, and the token that follows them: the rules of lossless speculation, as pure functions.

A round of speculation has K drafted tokens a text, and the target's distributions at their places and at the one
behind them. The result is always a prefix of the drafts and one more token of the target's own, so a round gives
1 to K + 1 tokens. Two rules lose nothing:

    accept_equal        a draft stays while it equals the token that the target itself chooses at that place. With
                        noise that hangs on the place alone (`fastgen.noise`) the text is plain decoding's very text,
                        whatever was drafted; greedy decoding is the same without noise.
    accept_or_resample  a draft d stays with probability min(1, p(d) / q(d)); the first that does not is replaced by
                        a draw from max(0, p - q), normalized. The text has plain decoding's distribution, not its
                        words: https://arxiv.org/abs/2211.17192, algorithm 1.

Letters: B texts, K drafts, V vocabulary. Nothing waits for the device and no shape depends on data. `limit`, a number
on the device, cuts the drafts short: those from it on are filling.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.sampling import best_token


class Verdict(NamedTuple):
    """The tokens of a round, int64 [B, K + 1], of which row b's first `counts[b]` (int64 [B], 1 .. K + 1) are real."""

    tokens: Tensor
    counts: Tensor


def accept_equal(choices: Tensor, drafts: Tensor, limit: Tensor | int) -> Verdict:
    """Accept drafts [B, K] while they equal the target's choices [B, K + 1] (int64 all)."""
    places = torch.arange(drafts.shape[1], device=drafts.device)
    return Verdict(choices, _leading((choices[:, :-1] == drafts) & (places < limit)) + 1)


def accept_or_resample(
    target: Tensor,
    draft: Tensor,
    drafts: Tensor,
    limit: Tensor | int,
    *,
    uniform: Tensor,
    gumbel: Callable[[Tensor], Tensor],
) -> Verdict:
    """Accept drafts with probability min(1, p / q), and draw the token behind the last accepted one.

    Args:
        target: [B, K + 1, V] fp32 probabilities p of the target, filtered as the options say.
        draft: [B, K, V] fp32 probabilities q that `drafts` [B, K] int64 were drawn from, filtered alike.
        uniform: [B, K] fp32 in (0, 1), independent of what the drafts were drawn with.
        gumbel: gives Gumbel noise [B, V] fp32 for a place [B] int64 in 0 .. K of each row, independent of both.
    """
    K = drafts.shape[1]
    p, q = (probabilities[:, :K].gather(2, drafts[:, :, None])[:, :, 0] for probabilities in (target, draft))
    places = torch.arange(K + 1, device=drafts.device)
    place = _leading((uniform * q < p) & (places[:K] < limit))
    rest = residual(_at(target, place), _at(draft, place.clamp(max=K - 1)), (place < limit)[:, None])
    token = best_token(rest.log() + gumbel(place))
    tokens = torch.where(places == place[:, None], token[:, None], F.pad(drafts, (0, 1)))
    return Verdict(tokens, place + 1)


def residual(p: Tensor, q: Tensor, rejected: Tensor) -> Tensor:
    """Return what the token behind the accepted ones is drawn from, as weights [B, V] that need not add up to 1.

    Behind a draft that was `rejected` (bool [B, 1]) it is max(0, p - q), else p itself: the bonus of a round whose
    drafts all stayed. Where rounding leaves nothing of p - q, p and q are equal, and p is right.
    """
    rest = (p - q).clamp(min=0)
    return torch.where(rejected & (rest.sum(1, keepdim=True) > 0), rest, p)


def _leading(accepted: Tensor) -> Tensor:
    """Return how many of each row's places [B, K] bool are true before the first that is not: int64 [B]."""
    return accepted.long().cumprod(1).sum(1)


def _at(rows: Tensor, place: Tensor) -> Tensor:
    """Return [B, V]: of each row of [B, K, V] the entry at its place [B]."""
    return rows.gather(1, place[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]
