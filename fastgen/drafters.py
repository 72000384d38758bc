"""Drafters: who guesses the tokens that a round of speculation verifies, all behind one small interface.

    ModelDrafter   a smaller model with the target's vocabulary and a KV cache of its own, or the target's own first
                   layers with its head (`self_drafter`), which share its cache
    NgramDrafter   no model: what stood behind the last place of the text that ended as the text does now (prompt
                   lookup, https://github.com/apoorvumang/prompt-lookup-decoding)

A drafter reads the rows of the texts, on the device, and gives tokens without a value on the host or a shape that
depends on data: its work can be captured in a CUDA graph as it stands. Wrong guesses cost time, never correctness.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.model import Transformer
from fastgen.noise import NoiseKey, gumbel
from fastgen.options import MOST_DRAFTS, SamplingOptions
from fastgen.sampling import Knobs, adjust, best_token
from fastgen.steps import Cases, Rows, Steps, covered_by_kernels

DRAFT_STREAM = 2
"""The noise that drafts are drawn with where they must not share the target's (`accept_or_resample`)."""

LONGEST_MATCH = 8
"""Tokens at the end of a text that the n-gram drafter compares."""


class Draft(NamedTuple):
    """`tokens` [B, K] int64, and where drafts are drawn independently what from: `probabilities` [B, K, V] fp32."""

    tokens: Tensor
    probabilities: Tensor | None


class Drafter(Protocol):
    """What a round needs of a drafter.

    Attributes:
        name: as on the command line.
        steps: the steps that fill the drafter's own KV cache, None if it has none.
    """

    name: str
    steps: Steps | None

    def draft(self, rows: Rows, count: int, keys: Tensor, options: SamplingOptions, *, independent: bool) -> Draft:
        """Return `count` drafted tokens behind each row's last.

        `keys` [L] are 0 .. L - 1 with L above every place that is drafted. With `independent` the drafts are drawn
        with noise of their own, from the probabilities that are given back; else with the target's.
        """
        ...


class DraftStep(NamedTuple):
    """One drafted token [B] int64 (where the draft is broken, an invalid one) and, with independent noise, its
    distribution [B, V]."""

    token: Tensor
    probabilities: Tensor | None


def draw(
    model: Transformer, hidden: Tensor, rows: Rows, following: Tensor, seen: Tensor, options: SamplingOptions,
    *, vocab_size: int, independent: bool,
) -> DraftStep:  # fmt: skip
    """Draft the tokens that stand at `following` [B], by the draft's hidden states [B, D]."""
    logits = _fit(model.logits(hidden), vocab_size)
    scores = adjust(logits, options, seen=seen, knobs=Knobs(*rows.knobs.unbind()))
    noisy = scores
    if options.temperature > 0:
        stream = DRAFT_STREAM if independent else 0
        key = NoiseKey(seed=rows.seed, sample=rows.samples, position=following, stream=stream)
        noisy = scores + gumbel(key, vocab_size)
    token = best_token(noisy)
    if options.repetition_penalty != 1.0:
        seen.scatter_(1, token[:, None].clamp(min=0), True)
    return DraftStep(token, scores.softmax(-1) if independent else None)


def draft_token(
    model: Transformer, rows: Rows, last: Tensor, position: Tensor, following: Tensor, seen: Tensor, keys: Tensor,
    options: SamplingOptions, *, vocab_size: int, overlap: bool, independent: bool,
    draw: Callable[..., DraftStep] = draw,
) -> DraftStep:  # fmt: skip
    """Append tokens `last` [B], which stand at `position` [B], to the draft's cache and draft the ones at `following`.

    `overlap` appends the tokens before them as well: a round whose drafts all stayed leaves the last of them out of the
    draft's cache, for it was never fed. `seen` [B, V] moves along with the drafts; `draw` is the function of that name,
    compiled.
    """
    tokens, places = last[:, None], position[:, None]
    if overlap:
        places = torch.cat((places - 1, places), 1)
        tokens = torch.cat((rows.text.gather(1, places[:, :1]), tokens), 1)
    # A broken draft drafts something; the target decides.
    hidden = model(tokens.clamp(0, model.vocab_size - 1), places, keys, following)[:, -1]
    if options.takes_largest and model.vocabulary.is_whole and model.vocab_size == vocab_size:
        return DraftStep(model.greedy_token(hidden), None)
    return draw(
        model, hidden, rows, following, seen, options, vocab_size=vocab_size, independent=independent
    )  # fmt: skip


class ModelDrafter:
    """Drafts with a model, token by token."""

    def __init__(
        self, name: str, model: Transformer, vocab_size: int, reach: int, *, batch: int, compiled: bool,
        shares_cache: bool = False,
    ) -> None:  # fmt: skip
        """`vocab_size` and `reach` are the target's; with `shares_cache` the target keeps the model's cache filled."""
        self.name = name
        self.steps = None if shares_cache else Steps(model, reach, compiled=compiled, batch=batch)
        self._model, self._vocab_size = model, vocab_size
        self._cases = Cases(compiled)
        self._step: Callable[..., DraftStep] = draft_token
        if compiled and covered_by_kernels(model, 2 * batch):
            self._step = partial(draft_token, draw=torch.compile(draw, fullgraph=True, dynamic=False))
        elif compiled:
            model.by_region |= not model.embedding.weight.is_cuda
            self._step = torch.compile(draft_token, fullgraph=True, dynamic=False)

    def draft(self, rows: Rows, count: int, keys: Tensor, options: SamplingOptions, *, independent: bool) -> Draft:
        """See `Drafter.draft`."""
        seen = rows.seen.clone()
        last, steps = rows.token, []
        places = rows.positions + torch.arange(count + 1, device=seen.device)[:, None]
        for place, (position, following) in enumerate(pairwise(places)):
            overlap = place == 0 and self.steps is not None
            step = partial(self._step, vocab_size=self._vocab_size, overlap=overlap, independent=independent)
            case = (options, rows.token.shape[0], overlap, independent)
            steps.append(self._cases.run(case, step, self._model, rows, last, position, following, seen, keys, options))
            last = steps[-1].token
        tokens = torch.stack([step.token for step in steps], 1)
        if not independent:
            return Draft(tokens, None)
        return Draft(tokens, torch.stack([step.probabilities for step in steps if step.probabilities is not None], 1))


def self_drafter(
    name: str, target: Transformer, layers: int, reach: int, *, batch: int, compiled: bool
) -> ModelDrafter:  # fmt: skip
    """Return the drafter that is the target's first layers with its head; what it appends, verifying overwrites."""
    head, vocab_size = target.first_layers(layers), target.vocab_size
    return ModelDrafter(name, head, vocab_size, reach, batch=batch, compiled=compiled, shares_cache=True)


class NgramDrafter:
    """Drafts from the text itself: the longest match first, of equally long ones the latest."""

    steps: Steps | None = None

    def __init__(self, vocab_size: int, *, compiled: bool) -> None:
        self.name = "ngram"
        self._vocab_size = vocab_size
        self._cases = Cases(compiled)
        self._continue: Callable[..., Tensor] = continue_text
        if compiled:
            self._continue = torch.compile(continue_text, fullgraph=True, dynamic=False)

    def draft(self, rows: Rows, count: int, keys: Tensor, options: SamplingOptions, *, independent: bool) -> Draft:
        """See `Drafter.draft`; a guess that nothing is drawn for has probability 1."""
        # Always as many as there may be: another count is no other graph.
        tokens = self._cases.run(rows.text.shape, self._continue, rows.text, rows.positions, MOST_DRAFTS)[:, :count]
        if not independent:
            return Draft(tokens, None)
        certain = torch.zeros(*tokens.shape, self._vocab_size, device=tokens.device)
        return Draft(tokens, certain.scatter_(2, tokens[:, :, None], 1.0))


def continue_text(text: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return [B, count] int64: what followed the latest of the longest matches of each text's end.

    `text` [B, S] int64 is valid up to `positions` [B]. A match that ends d tokens before the text does is taken to
    repeat every d tokens, so drafts may run past the end of what is there. Without a match it repeats the last token.
    """
    S = text.shape[1]
    places = torch.arange(S, device=text.device)
    length = torch.zeros_like(text)
    running = places < positions[:, None]  # a match ends before the text does
    for back in range(LONGEST_MATCH):
        wanted = text.gather(1, (positions - back).clamp(min=0)[:, None])
        shifted = F.pad(text, (back, 0))[:, :S]
        running = running & (shifted == wanted) & (places >= back)
        length = length + running
    best = (length * S + places * (length > 0)).argmax(1)
    found = length.gather(1, best[:, None])[:, 0] > 0
    best = torch.where(found, best, positions - 1).clamp(min=0)
    period = (positions - best).clamp(min=1)[:, None]
    offsets = torch.arange(count, device=text.device) % period
    following = text.gather(1, (best[:, None] + 1 + offsets).clamp(max=S - 1))
    return torch.where(found[:, None], following, text.gather(1, positions[:, None])).clamp(min=0)


def _fit(logits: Tensor, vocab_size: int) -> Tensor:
    """Cut or fill logits [B, V'] to the target's vocabulary: the same tokens may be padded to another size."""
    return F.pad(logits[:, :vocab_size], (0, max(0, vocab_size - logits.shape[1])), value=-torch.inf)
