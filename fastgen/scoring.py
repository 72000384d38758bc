"""How likely a model finds a text, and how far its predictions are from another model's.

A text is read in windows of `width` tokens, each `stride` behind the one before; every token is scored once, in the
first window that holds it, so with a stride below the width each has at least width - stride tokens before it. The
first token of the text is never scored; with a stride of the width, that of every window is not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.errors import ModelFileError, UsageError
from fastgen.load import LoadedModel

ROWS = 128  # logits that are looked at together: [ROWS, V] in fp32, three times over


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured over `tokens` predictions; the last three beside another model, else None."""

    tokens: int
    perplexity: float
    mean_loss: float  # nats a token
    mean_kl: float | None  # of the other model's predictions P from this one's Q: sum P log(P / Q), nats
    p99_kl: float | None
    top1_agreement: float | None


def score(
    model: LoadedModel,
    tokens: Sequence[int],
    *,
    width: int,
    stride: int | None = None,
    chunk: int | None = None,
    against: LoadedModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a text's tokens with `model`, and compare it with the model `against`, which has the same vocabulary.

    The models take a window whole, or `chunk` tokens at a time, as when they decode.

    Raises `UsageError` for a text that is too short, a width, stride or chunk that does not fit, or two vocabularies;
    `ModelFileError` for predictions that are not finite.
    """
    stride, chunk = width if stride is None else stride, width if chunk is None else chunk
    check_windows(len(tokens), width=width, stride=stride, limit=_limit(model, against))
    if not 1 <= chunk <= width:
        raise UsageError(f"--chunk {chunk}: expected 1 to the window's {width}")
    for each in filter(None, (model, against)):
        each.transformer.allocate_cache(1, width)
    losses, divergences, agreements = [], [], []
    windows = list(_windows(len(tokens), width, stride))
    for done, (start, first, end) in enumerate(windows):
        if progress:
            progress(done, len(windows))
        hidden = _hidden(model, tokens[start:end], chunk)[first - start - 1 : -1]
        other = _hidden(against, tokens[start:end], chunk)[first - start - 1 : -1] if against else hidden
        targets = torch.tensor(tokens[first:end], device=hidden.device)
        for rows in range(0, len(targets), min(ROWS, chunk)):
            part = slice(rows, rows + min(ROWS, chunk))
            predicted = _log_probabilities(model, hidden[part])
            losses.append(F.nll_loss(predicted, targets[part], reduction="none"))
            if against:
                reference = _log_probabilities(against, other[part]).to(predicted.device)
                divergences.append(F.kl_div(predicted, reference, log_target=True, reduction="none").sum(1))
                agreements.append(predicted.argmax(1) == reference.argmax(1))
    if progress:
        progress(len(windows), len(windows))
    return _scores(model, torch.cat(losses), divergences, agreements)


def _scores(model: LoadedModel, losses: Tensor, divergences: list[Tensor], agreements: list[Tensor]) -> Scores:
    mean = losses.double().mean().item()
    if not losses.isfinite().all():
        raise ModelFileError(f"{model.checkpoint.path}: the predictions are not finite; try --dtype fp32")
    divergence = torch.cat(divergences).double() if divergences else None
    return Scores(
        tokens=losses.numel(),
        perplexity=torch.tensor(mean, dtype=torch.float64).exp().item(),
        mean_loss=mean,
        mean_kl=None if divergence is None else divergence.mean().item(),
        p99_kl=None if divergence is None else divergence.quantile(0.99).item(),
        top1_agreement=torch.cat(agreements).double().mean().item() if agreements else None,
    )


def _windows(count: int, width: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield every window's start, the first token that it scores, and its end."""
    scored = 1
    for start in range(0, count - 1, stride):
        end = min(start + width, count)
        first = max(scored, start + 1)
        if first < end:
            yield start, first, end
        scored = max(scored, end)
        if end == count:
            return


@torch.inference_mode()
def _hidden(model: LoadedModel, tokens: Sequence[int], chunk: int) -> Tensor:
    """Return the hidden states [T, D] of one window."""
    device = model.placement.device
    ids, positions = torch.tensor([tokens], device=device), torch.arange(len(tokens), device=device)
    length = torch.tensor([len(tokens)], device=device)
    parts = []
    for start in range(0, len(tokens), chunk):
        part = slice(start, start + chunk)
        parts.append(model.transformer(ids[:, part], positions[None, part], positions[: start + chunk], length)[0])
    return torch.cat(parts)


@torch.inference_mode()
def _log_probabilities(model: LoadedModel, hidden: Tensor) -> Tensor:
    """Return [T, V] of hidden states [T, D], the head's of one text."""
    return torch.log_softmax(model.transformer.logits(hidden[None])[0], dim=-1)


def check_windows(count: int, *, width: int, stride: int | None, limit: int) -> None:
    """Raise `UsageError` unless `count` tokens can be read in such windows by a model made for `limit` tokens."""
    stride = width if stride is None else stride
    if not 2 <= width <= limit:
        raise UsageError(f"--window {width}: expected 2 to {limit}, which the model was made for")
    if not 1 <= stride <= width:
        raise UsageError(f"--stride {stride}: expected 1 to the window's {width}")
    if count < 2:
        raise UsageError(f"the text has {count} token(s), at least two are needed")


def _limit(model: LoadedModel, against: LoadedModel | None) -> int:
    """Return how many tokens both models were made for; raises `UsageError` if they have two vocabularies."""
    if against and against.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"--against: {against.checkpoint.path} has a vocabulary of {against.config.vocab_size}, "
            f"{model.checkpoint.path} one of {model.config.vocab_size}; only models of one vocabulary can be compared"
        )
    return min(each.config.max_seq_len for each in (model, against) if each)
