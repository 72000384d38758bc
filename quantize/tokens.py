"""How many tokens a linear is given: a few go through kernels that read packed weights, more are worth unpacking.

The kernels round otherwise than PyTorch does. So what a token goes through hangs on how many of its own text come with
it, never on the texts beside it: verified drafts come out as decoded tokens do, in a batch of any size.
"""

from torch import Tensor

from fastgen.kernels.reference import is_few


def are_few(x: Tensor) -> bool:
    """Return whether x [texts, tokens, in], or [texts, in] with a token each, holds few tokens of a text."""
    return x.dim() < 3 or is_few(x.shape[-2])
