"""How many tokens a linear is given: a few go through kernels that read packed weights, more are worth unpacking."""

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

FEW = 16
"""Tokens that a decode step or a verified draft has at most."""


def are_few(x: Tensor) -> bool:
    """Return whether x [.., in] holds at most `FEW` tokens.

    A size that is dynamic in a compiled graph, a prefill's, counts as many, so that no width is a graph of its own.
    """
    return statically_known_true(x.numel() <= FEW * x.shape[-1])
