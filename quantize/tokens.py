"""How many tokens a linear is given: a few go through kernels that read packed weights, more are worth unpacking.

The kernels round otherwise than PyTorch does. So what a token goes through hangs on how many of its own text come with
it, never on the texts beside it: verified drafts come out as decoded tokens do, in a batch of any size.
"""

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

FEW = 16
"""Tokens of a text that a decode step or a verified draft has at most."""


def are_few(x: Tensor) -> bool:
    """Return whether x [texts, tokens, in], or [texts, in] with a token each, holds at most `FEW` tokens of a text.

    A number that is dynamic in a compiled graph, a prefill's, counts as many, so that no width is a graph of its own.
    """
    return x.dim() < 3 or statically_known_true(x.shape[-2] <= FEW)
