"""The proof that speculation loses nothing, on any pair of models: its greedy texts beside plain decoding's.

Prompts are what the target itself writes: beginnings sampled with a temperature, each of its own sample number. A text
that differs is followed to its first other token. In fp32 that does not happen but where two tokens tie to the last
bits; in bf16 logits that are computed for several tokens at once may round apart from those of one (`noise`), and a
difference is explained where the two best tokens lie no further apart than that (`gap`).

Texts are compared in batches, which is faster and lets rows accept each their own number. `auto` gets small ones: it
drafts where that pays, and on a CPU a hundred rows leave nothing to gain.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.engine import Engine
from fastgen.errors import UsageError
from fastgen.load import LoadedModel
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.rounds import WIDTHS
from fastgen.speculation import AUTO, Speculation
from fastgen.speculative import SpeculativeEngine

PROMPT_TOKENS = 8
MOST_ROWS, AUTO_ROWS = 100, 10
"""Texts at a time, for a fixed number of drafts and for `auto`."""


@dataclass(frozen=True)
class Difference:
    """The first token of a text that differs: how far apart the two best logits are there, and rounding is."""

    text: int
    place: int
    gap: float
    noise: float

    @property
    def explained(self) -> bool:
        """Whether rounding alone may have decided between the two."""
        return self.gap <= 2 * self.noise


@dataclass(frozen=True)
class Proof:
    """What comparing gave for one number of drafts; `acceptance` and `launches` are of the last batch of texts."""

    count: int | str
    rows: int
    texts: int
    tokens: int
    acceptance: float | None
    launches: dict[str, int]
    differences: tuple[Difference, ...]


def own_prompts(model: LoadedModel, texts: int) -> list[list[int]]:
    """Return beginnings of texts, sampled from the model behind its beginning-of-text token.

    Raises `UsageError` where the model has no room for a token behind them.
    """
    room = model.config.max_seq_len
    if room <= PROMPT_TOKENS:
        raise UsageError(
            f"--check-lossless: begins texts with {PROMPT_TOKENS} tokens, and the model has room for {room}"
        )
    first = model.tokenizer.bos_id or 0
    rows = min(texts, MOST_ROWS)
    engine = Engine(model, batch=rows, max_seq_len=PROMPT_TOKENS + 1)
    options = GenerationOptions(
        max_new_tokens=PROMPT_TOKENS, ignore_eos=True, sampling=SamplingOptions(temperature=1.0)
    )
    prompts: list[list[int]] = []
    for start in range(0, texts, rows):
        streams: list = []
        for _ in engine.stream([[first]] * rows, options, streams=streams, samples=range(start, start + rows)):
            pass
        prompts += [[first, *stream.completion().tokens[: PROMPT_TOKENS - 1]] for stream in streams]
    return prompts[:texts]


def prove(
    model: LoadedModel, draft: LoadedModel | str, prompts: Sequence[Sequence[int]], *, counts: Sequence[int | str],
    new_tokens: int = 64, sampling: SamplingOptions | None = None, rows: int | None = None, compile: bool = False,
) -> Iterator[Proof]:  # fmt: skip
    """Yield, for every number of drafts, how texts of `new_tokens` compare to plain decoding's; greedy by default.

    They are shorter where the model has no room for so many. `rows` texts are generated at a time, by either; steps
    are compiled with `compile`.
    """
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True, sampling=sampling or SamplingOptions())
    capacity = min(max(map(len, prompts)) + new_tokens, model.config.max_seq_len)
    expected: dict[int, list[list[int]]] = {}
    for count in counts:
        batch = min(len(prompts), rows or (AUTO_ROWS if count == AUTO else MOST_ROWS))
        if batch not in expected:
            plain = Engine(model, batch=batch, max_seq_len=capacity, compile=compile)
            expected[batch] = _texts(plain, prompts, options)
        speculation = Speculation(draft=draft, count=count)
        engine = SpeculativeEngine(model, speculation, batch=batch, max_seq_len=capacity, compile=compile)
        found = _texts(engine, prompts, options)
        different = [
            _difference(model, number, list(prompt), plain_text, other)
            for number, (prompt, plain_text, other) in enumerate(zip(prompts, expected[batch], found, strict=True))
            if plain_text != other
        ]
        tokens, figures = sum(map(len, found)), engine.figures()
        yield Proof(count, batch, len(prompts), tokens, figures.acceptance, figures.arms, tuple(different))


def _texts(engine: Engine, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> list[list[int]]:
    """Return the texts, as many at a time as the engine takes; the last of them again where too few are left."""
    engine.warm_up(options)
    found: list[list[int]] = []
    for start in range(0, len(prompts), engine.batch):
        group = list(map(list, prompts[start : start + engine.batch]))
        group += [group[-1]] * (engine.batch - len(group))
        found += [list(row.tokens) for row in engine.generate(group, options)]
    return found[: len(prompts)]


@torch.inference_mode()
def _difference(model: LoadedModel, number: int, prompt: list[int], plain: list[int], other: list[int]) -> Difference:
    place = next(at for at, (one, another) in enumerate(zip(plain, other, strict=True)) if one != another)
    text = torch.tensor([[*prompt, *plain[:place]]], device=model.placement.device)
    model.transformer.allocate_cache(1, text.shape[1] + 1)
    length = text.shape[1]
    alone = torch.cat([_logits(model, text[:, at : at + 1], at) for at in range(length)])[-1]
    starts = [max(0, length - width) for width in (*WIDTHS[1:], length)]
    together = torch.stack([_logits(model, text[:, start:], start)[-1] for start in starts])
    best = alone.topk(2)
    noise = (alone - together)[:, best.indices].abs().max()
    return Difference(number, place, float(best.values[0] - best.values[1]), float(noise))


def _logits(model: LoadedModel, tokens: Tensor, start: int) -> Tensor:
    """Return the logits [T, V] of tokens [1, T] that begin at a place of the text; appends them to the cache."""
    end = start + tokens.shape[1]
    positions = torch.arange(end, device=tokens.device)
    length = torch.tensor([end], device=tokens.device)
    return model.transformer.logits(model.transformer(tokens, positions[None, start:], positions, length))[0]
