"""The proof that speculation loses nothing, on any pair of models: its greedy texts beside plain decoding's.

Prompts are what the target itself writes: beginnings sampled with a temperature, each of its own sample number. A text
that differs is followed to its first other token. In fp32 that does not happen but where two tokens tie to the last
bits; in bf16 logits that are computed for several tokens at once may round apart from those of one (`noise`), and a
difference is explained where the two best tokens lie no further apart than that (`gap`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.engine import Engine
from fastgen.load import LoadedModel
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine

PROMPT_TOKENS = 8
MOST_ROWS = 100


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
    """What comparing gave for one number of drafts."""

    count: int | str
    texts: int
    tokens: int
    acceptance: float | None
    differences: tuple[Difference, ...]


def own_prompts(model: LoadedModel, texts: int) -> list[list[int]]:
    """Return beginnings of texts, sampled from the model behind its beginning-of-text token."""
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
    model: LoadedModel, draft: LoadedModel | str, prompts: Sequence[Sequence[int]], *,
    counts: Sequence[int | str], new_tokens: int = 64, sampling: SamplingOptions | None = None,
) -> Iterator[Proof]:  # fmt: skip
    """Yield, for every number of drafts, how texts of `new_tokens` compare to plain decoding's; greedy by default."""
    rows = min(len(prompts), MOST_ROWS)
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True, sampling=sampling or SamplingOptions())
    capacity = max(map(len, prompts)) + new_tokens
    groups = [list(map(list, prompts[start : start + rows])) for start in range(0, len(prompts), rows)]
    groups[-1] += [groups[-1][-1]] * (rows - len(groups[-1]))
    expected = _texts(Engine(model, batch=rows, max_seq_len=capacity), groups, options)[: len(prompts)]
    for count in counts:
        engine = SpeculativeEngine(model, Speculation(draft=draft, count=count), batch=rows, max_seq_len=capacity)
        found = _texts(engine, groups, options)[: len(prompts)]
        different = [
            _difference(model, number, list(prompt), plain, other)
            for number, (prompt, plain, other) in enumerate(zip(prompts, expected, found, strict=True))
            if plain != other
        ]
        tokens = sum(map(len, expected))
        yield Proof(count, len(prompts), tokens, engine.tally.acceptance, tuple(different))


def _texts(engine: Engine, groups: list[list[list[int]]], options: GenerationOptions) -> list[list[int]]:
    return [list(row.tokens) for group in groups for row in engine.generate(group, options)]


@torch.inference_mode()
def _difference(model: LoadedModel, number: int, prompt: list[int], plain: list[int], other: list[int]) -> Difference:
    place = next(at for at, (one, another) in enumerate(zip(plain, other, strict=True)) if one != another)
    text = torch.tensor([[*prompt, *plain[:place]]], device=model.placement.device)
    model.transformer.allocate_cache(1, text.shape[1] + 1)
    alone = torch.cat([_logits(model, text[:, at : at + 1], at) for at in range(text.shape[1])])[-1]
    together = _logits(model, text[:, -4:], max(0, text.shape[1] - 4))[-1]
    best = alone.topk(2)
    noise = (alone - together)[best.indices].abs().max()
    return Difference(number, place, float(best.values[0] - best.values[1]), float(noise))


def _logits(model: LoadedModel, tokens: Tensor, start: int) -> Tensor:
    """Return the logits [T, V] of tokens [1, T] that begin at a place of the text; appends them to the cache."""
    end = start + tokens.shape[1]
    positions = torch.arange(end, device=tokens.device)
    length = torch.tensor([end], device=tokens.device)
    return model.transformer.logits(model.transformer(tokens, positions[None, start:], positions, length))[0]
