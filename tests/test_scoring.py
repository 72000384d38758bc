"""Perplexity, KL and agreement are those of their definitions, token by token, whatever the windows."""

import dataclasses
import functools
import math
import random

import pytest
import torch
from torch import Tensor

from fastgen import evaluate
from fastgen.errors import ModelFileError, UsageError
from fastgen.load import LoadedModel
from fastgen.scoring import score
from tests.models import random_model

TOKENS = [random.Random(0).randrange(250) for _ in range(150)]


@functools.cache
def model(seed: int) -> LoadedModel:
    return random_model(seed)


@torch.inference_mode()
def predicted(which: LoadedModel, text: list[int]) -> Tensor:
    """Log-probabilities of what follows `text`, computed from all of it at once."""
    which.transformer.allocate_cache(1, len(text))
    positions = torch.arange(len(text))
    hidden = which.transformer(torch.tensor([text]), positions[None], positions, torch.tensor([len(text)]))
    return which.transformer.logits(hidden[:, -1])[0].double().log_softmax(-1)


def contexts(width: int, stride: int) -> list[tuple[list[int], int]]:
    """Every token that is scored, after what it is predicted from: its part of the first window that begins before."""
    found = []
    for place, token in enumerate(TOKENS):
        starts = [start for start in range(0, len(TOKENS), stride) if start < place < start + width]
        if starts:
            found.append((TOKENS[starts[0] : place], token))
    return found


@pytest.mark.parametrize(("width", "stride"), [(150, None), (64, None), (64, 64), (64, 40), (64, 1), (150, 7), (2, 1)])
def test_every_token_is_scored_once_by_its_definition(width: int, stride: int | None) -> None:
    pairs = contexts(width, stride or width)
    p = torch.stack([predicted(model(1), text) for text, _ in pairs])
    q = torch.stack([predicted(model(0), text) for text, _ in pairs])
    scores = score(model(0), TOKENS, width=width, stride=stride, against=model(1))
    losses = -q[torch.arange(len(pairs)), [token for _, token in pairs]]
    divergence = (p.exp() * (p - q)).sum(1)
    assert scores.tokens == len(pairs)
    assert scores.mean_loss == pytest.approx(losses.mean().item(), rel=1e-4)
    assert scores.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-4)
    assert scores.mean_kl == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert scores.p99_kl == pytest.approx(divergence.quantile(0.99).item(), rel=1e-4)
    assert scores.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert divergence.mean() != pytest.approx((q.exp() * (q - p)).sum(1).mean().item(), rel=0.01), "a test of direction"


def test_a_model_is_nowhere_from_itself_and_alone_has_no_distance() -> None:
    scores = score(model(0), TOKENS, width=64, against=model(0))
    assert (scores.mean_kl, scores.p99_kl, scores.top1_agreement) == (0, 0, 1)
    alone = score(model(0), TOKENS, width=64)
    assert alone == dataclasses.replace(scores, mean_kl=None, p99_kl=None, top1_agreement=None)


@pytest.mark.parametrize("chunk", [1, 16, 63])
def test_a_window_that_is_read_in_chunks_has_the_same_scores(chunk: int) -> None:
    whole, parts = score(model(0), TOKENS, width=64), score(model(0), TOKENS, width=64, chunk=chunk)
    assert parts.tokens == whole.tokens
    assert parts.mean_loss == pytest.approx(whole.mean_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"width": 1}, "--window 1"),
        ({"width": 257}, "--window 257"),
        ({"width": 64, "stride": 0}, "--stride 0"),
        ({"width": 64, "stride": 65}, "--stride 65"),
        ({"width": 64, "chunk": 0}, "--chunk 0"),
        ({"width": 64, "chunk": 65}, "--chunk 65"),
        ({"width": 64, "tokens": [3]}, "at least two"),
        ({"width": 64, "against": random_model(vocab_size=300)}, "vocabulary"),
        ({"width": 128, "against": random_model(max_seq_len=64)}, "expected 2 to 64"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        score(model(0), **({"tokens": TOKENS} | flags))


def test_predictions_that_are_not_finite_are_an_error() -> None:
    broken = random_model(0)
    broken.transformer.norm.weight[3] = float("nan")
    with pytest.raises(ModelFileError, match="not finite"):
        score(broken, TOKENS, width=64)


def test_models_with_other_tokens_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    other = random_model(1)
    monkeypatch.setattr(type(other.tokenizer), "encode", lambda self, text: [1, 2] if self is other.tokenizer else [3])
    loaded = {"ours": model(0), "theirs": other}
    monkeypatch.setattr(evaluate, "_load", lambda config, name, phases, quantized: loaded[name])
    with pytest.raises(UsageError, match="other tokens"):
        evaluate.main(["--model", "ours", "--against", "theirs", "--text", __file__])
