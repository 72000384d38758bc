"""Which tokens a training step sees: a function of the seed and the row's number, and of nothing else.

So a run that is interrupted goes on with the very rows that were to come, and any number of processes share a
step's rows between them. Rows are numbered through from the first step to the last. An epoch's windows of `context`
tokens lie side by side, begin at an offset that the epoch draws, and come in an order that the epoch draws.
"""

import numpy as np
import torch
from torch import Tensor

from fastgen.training.tokens import Tokens


class Windows:
    """Rows of `context` + 1 tokens, each token the target of the one before it."""

    def __init__(self, tokens: Tokens, context: int, seed: int) -> None:
        assert tokens.size > context, "the tokens were checked to hold a window"
        self._tokens, self._context, self._seed = tokens, context, seed
        # One window fewer than would fit leaves an epoch room to begin at another place.
        self.per_epoch = max(1, (tokens.size - 1) // context - 1)
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def rows(self, first: int, count: int) -> Tensor:
        """Return rows `first` .. `first + count - 1` as int64 [count, context + 1]."""
        starts = np.array([self._start(row) for row in range(first, first + count)])
        return take(self._tokens, starts, self._context)

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self._seed % 2**64, epoch))
            slack = self._tokens.size - 1 - self.per_epoch * self._context
            offset = int(random.integers(slack, endpoint=True))
            self._starts = offset + self._context * random.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._starts[place])


def side_by_side(tokens: Tokens, context: int) -> Tensor:
    """Return all whole windows in their order, for validation: int64 [windows, context + 1]."""
    starts = context * np.arange((tokens.size - 1) // context)
    return take(tokens, starts, context)


def take(tokens: Tokens, starts: np.ndarray, context: int) -> Tensor:
    """Return the windows that begin at `starts` as int64 [len(starts), context + 1]."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
