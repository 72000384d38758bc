"""Pearson's chi-square test, for claims about what random numbers do."""

import torch
from torch import Tensor


def fit_p_value(counts: Tensor, expected: Tensor) -> float:
    """Return how likely counts [N] are to stray this far from fp64 probabilities [N]; impossible outcomes give 0."""
    assert counts.shape == expected.shape, f"{counts.shape} counts for {expected.shape} probabilities"
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    mean = expected[possible].double() * counts.sum()
    assert mean.min() >= 5, f"an outcome is expected only {mean.min():.1f} times; take more draws"
    return _survival(((counts[possible] - mean) ** 2 / mean).sum(), int(possible.sum()) - 1)


def independence_p_value(table: Tensor) -> float:
    """Return how likely two independent variables are to give the joint counts [M, N]."""
    table = table.double()
    mean = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    assert mean.min() >= 5, f"a cell is expected only {mean.min():.1f} times; take more draws"
    return _survival(((table - mean) ** 2 / mean).sum(), (table.shape[0] - 1) * (table.shape[1] - 1))


def joint_counts(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Return [size, size]: how often each pair of values below `size` occurs at the same place of two tensors."""
    return torch.bincount(first.flatten() * size + second.flatten(), minlength=size * size).view(size, size)


def _survival(statistic: Tensor, degrees: int) -> float:
    if degrees == 0:
        return 1.0  # one possible outcome, and it is the one that occurred
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))
