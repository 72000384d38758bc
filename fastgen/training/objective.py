"""What training minimizes: cross-entropy on the next token, or the distance to another model's distribution of it.

An objective is a module from rows of tokens to a loss, so that it can be compiled and run in parallel as one. Letters:
B rows, T positions, V vocabulary; rows are [B, T + 1], each token the target of the one before it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.model import Transformer


def logits_of(model: Transformer, tokens: Tensor) -> Tensor:
    """Return fp32 logits [B, T, V] at every position of tokens [B, T]; the model has `CausalStages`."""
    B, T = tokens.shape
    positions = torch.arange(T, device=tokens.device).expand(B, T)
    lengths = torch.full((B,), T, device=tokens.device)
    return model.logits(model(tokens, positions, positions[0], lengths))


class NextToken(nn.Module):
    """The mean cross-entropy of the next token, in nats."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        """Return the loss of rows [B, T + 1], an fp32 scalar."""
        logits = logits_of(self.model, rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


class Distillation(nn.Module):
    """The mean KL divergence of the model's next-token distribution from a teacher's, both at one temperature.

    Scaled with the square of the temperature, which keeps the gradients' size (Hinton et al., arXiv 1503.02531,
    section 2).
    """

    def __init__(self, model: Transformer, teacher: Transformer, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.teacher, self.temperature = model, teacher, temperature

    def forward(self, rows: Tensor) -> Tensor:
        """Return the divergence on rows [B, T + 1], an fp32 scalar; the last token of a row only closes it."""
        tokens = rows[:, :-1]
        with torch.no_grad():
            wanted = logits_of(self.teacher, tokens)
        given = logits_of(self.model, tokens)
        return divergence(wanted / self.temperature, given / self.temperature).mean() * self.temperature**2


def divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """Return KL(softmax(wanted) || softmax(given)) of logits [.., V], in nats: fp32 [..]."""
    target = wanted.log_softmax(-1)
    return F.kl_div(given.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)


class Measured(NamedTuple):
    """Sums over the tokens of some rows: of what, an fp64 vector, and over how many tokens."""

    sums: Tensor
    tokens: int


@torch.no_grad()
def measure(model: Transformer, teacher: Transformer | None, rows: Tensor) -> Measured:
    """Return sums over rows [B, T + 1]: of the cross-entropy and, with a teacher, of the divergence from it and of
    positions where both models' likeliest tokens agree."""
    logits = logits_of(model, rows[:, :-1])
    sums = [F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").sum(dtype=torch.float64)]
    if teacher is not None:
        wanted = logits_of(teacher, rows[:, :-1])
        sums.append(divergence(wanted, logits).sum(dtype=torch.float64))
        sums.append((wanted.argmax(-1) == logits.argmax(-1)).sum(dtype=torch.float64))
    return Measured(torch.stack(sums), rows[:, 1:].numel())
