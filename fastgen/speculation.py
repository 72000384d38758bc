"""What is asked of speculation, whether it can be had, and the drafters and arms that it comes to."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgen.drafters import Drafter, ModelDrafter, NgramDrafter, self_drafter
from fastgen.errors import UsageError
from fastgen.load import LoadedModel
from fastgen.model import Transformer
from fastgen.options import check_speculation
from fastgen.pace import Arm

AUTO = "auto"
MODEL_COUNTS, NGRAM_COUNTS = (1, 3, 7), (3, 7, 15)
"""Drafts a round among which `auto` chooses: those that fill the target's widths."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to speculate.

    Attributes:
        draft: a model, "ngram", or "self:N" for the target's own first N layers.
        count: tokens to draft a round, 1 to 15, or "auto": as many, by the draft or by n-grams, as is fastest now.
        accept: "coupled" gives the very text of plain sampling, "leviathan" (arXiv 2211.17192) accepts more when
            sampling and gives its distribution; greedy texts are plain ones in any case.

    Raises `UsageError` where a value is out of its range.
    """

    draft: LoadedModel | str = "ngram"
    count: int | str = AUTO
    accept: str = "coupled"

    def __post_init__(self) -> None:
        check_speculation(self.draft if isinstance(self.draft, str) else None, self.count, self.accept)


def check(model: LoadedModel, speculation: Speculation) -> None:
    """Raise `UsageError` where the target cannot be speculated about, or not with this draft."""
    if model.transformer.rope.is_dynamic:
        raise UsageError(
            "--draft: this model's RoPE (dynamic NTK) turns a token by the length of its text, so tokens that are\n"
            "verified together would differ from tokens that come one by one; leave --draft out"
        )
    draft = speculation.draft
    if isinstance(draft, LoadedModel):
        if draft.placement.device != model.placement.device:
            raise UsageError(f"--draft: on {draft.placement.device}, the model on {model.placement.device}")
        require_same_vocabulary(model, draft)


def own_model(model: LoadedModel, speculation: Speculation) -> Transformer | None:
    """Return the draft's transformer if it has a cache of its own."""
    draft = speculation.draft
    return draft.transformer if isinstance(draft, LoadedModel) and draft.transformer is not model.transformer else None


def make_drafters(
    model: LoadedModel, speculation: Speculation, reach: int, *, batch: int, compiled: bool
) -> list[Drafter]:  # fmt: skip
    """Return the draft's drafter and, where `auto` may choose, the n-gram drafter."""
    transformer, draft = model.transformer, speculation.draft
    vocab_size, layers = model.config.vocab_size, len(transformer.layers)
    ngram = NgramDrafter(vocab_size, compiled=compiled)
    if draft == "ngram":
        return [ngram]
    own = own_model(model, speculation)
    if own is not None:
        drafter = ModelDrafter("model", own, vocab_size, reach, batch=batch, compiled=compiled)
    else:
        count = str(draft).removeprefix("self:") if isinstance(draft, str) else str(layers)
        if not count.isdecimal() or not 1 <= int(count) <= layers:
            raise UsageError(f"--draft {draft}: expected a model, ngram, none, or self:N with N from 1 to {layers}")
        drafter = self_drafter(f"self:{count}", transformer, int(count), reach, batch=batch, compiled=compiled)
    return [drafter, ngram] if speculation.count == AUTO else [drafter]


def make_arms(speculation: Speculation, drafters: Sequence[Drafter]) -> list[Arm]:
    """Return the rounds among which to choose, plain decoding apart."""
    if isinstance(speculation.count, int):
        return [Arm(0, speculation.count)]
    return [
        Arm(number, count)
        for number, drafter in enumerate(drafters)
        for count in (NGRAM_COUNTS if isinstance(drafter, NgramDrafter) else MODEL_COUNTS)
    ]


def require_same_vocabulary(target: LoadedModel, draft: LoadedModel) -> None:
    """Raise `UsageError`, with the first difference, unless every token id stands for the same bytes in both.

    Vocabularies are compared by content: names and files may differ.
    """
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is theirs:
        return
    named = [{token: text for text, token in words.special.items()} for words in (ours, theirs)]
    for token in range(max(ours.vocab_size, theirs.vocab_size)):
        found = [
            "nothing" if token >= words.vocab_size else repr(texts.get(token) or words.token_bytes(token))
            for words, texts in zip((ours, theirs), named, strict=True)
        ]
        if found[0] != found[1]:
            raise UsageError(
                f"--draft {draft.checkpoint.path}: its vocabulary is another: token {token} is {found[1]} there, "
                f"{found[0]} in the model\nA draft must have been made for the model that it drafts for"
            )
