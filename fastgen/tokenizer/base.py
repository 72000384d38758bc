"""The one interface of every tokenizer, and decoding as tokens arrive.

A format (one file each beside this one) gives the two directions and the ids that it knows. What is common stands
here: which tokens end an answer, what a chat template is told, that text is checked before it is encoded and ids
before they are decoded, and above all that decoding never yields half a character.

SentencePiece puts a space in front of every text, so that a word is spelled alike at the start and inside. Decoding a
text from its beginning takes that space away again; text that continues another keeps every space. Which of the two
it is, only the caller knows: `incremental(continues=True)` follows a prompt, `decode` starts at the beginning.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property

from fastgen.errors import ModelFileError, UsageError
from fastgen.tokenizer.settings import Settings

END_OF_ANSWER = ("</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>")
"""Special tokens that end a text or a turn in Llama 2, ChatML (Qwen, SmolLM2), Llama 3 and GPT-2 vocabularies.

Chat models often list only one of the two in their metadata; all that the vocabulary has end an answer.
"""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, special tokens included; every id is below it.
        bos_id: the beginning-of-sequence id, if the vocabulary has one.
        eos_id: the end-of-sequence id, if the vocabulary has one.
        add_bos: whether the model was trained with `bos_id` in front of every text.
        stop_ids: ids that end an answer: end of sequence, end of turn.
        special: special tokens by their text.
        template_tokens: what a chat template is told beside the messages: `bos_token`, `eos_token` and the like.
        chat_template: the model's own jinja2 template, if it has one.
        adds_space: whether encoding puts a space in front of a text.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    stop_ids: frozenset[int]
    special: Mapping[str, int]
    template_tokens: Mapping[str, str]
    chat_template: str | None
    adds_space: bool

    def __init__(
        self,
        *,
        vocab_size: int,
        special: Mapping[str, int],
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        adds_space: bool,
        settings: Settings,
    ) -> None:
        """Combine what the vocabulary says with the `settings` beside it, which win.

        Raises `ModelFileError` if the settings name a token that the vocabulary lacks.
        """
        self.vocab_size, self.special, self.adds_space = vocab_size, special, adds_space
        self.bos_id = _named("bos_token", bos_id, special, settings)
        self.eos_id = _named("eos_token", eos_id, special, settings)
        self.add_bos = self.bos_id is not None and (add_bos if settings.add_bos is None else settings.add_bos)
        ends = {special[text] for text in END_OF_ANSWER if text in special}
        self.stop_ids = frozenset({*ends, *settings.eos_ids, *([] if self.eos_id is None else [self.eos_id])})
        texts: dict[int | None, str] = {token: text for text, token in special.items()}
        own = {"bos_token": texts.get(self.bos_id), "eos_token": texts.get(self.eos_id)}
        self.template_tokens = {**settings.tokens, **{role: text for role, text in own.items() if text is not None}}
        self.chat_template = settings.chat_template

    def encode(self, text: str, *, bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, after `bos_id` if `bos` (by default: if `add_bos`).

        `parse_special` reads special tokens out of the text, as a rendered chat template needs (which has its own
        BOS: pass `bos=False`); a user's own text must never do that. Raises `UsageError` for text that has no UTF-8
        form, and for `bos` where the vocabulary has none.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"text: character {error.start} is {text[error.start]!a}, half of a surrogate pair; "
                "the input was not UTF-8"
            ) from error
        prefix = []
        if self.add_bos if bos is None else bos:
            if self.bos_id is None:
                raise UsageError("bos=True: this vocabulary has no beginning-of-sequence token")
            prefix = [self.bos_id]
        return prefix + self._encode(text, parse_special)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` stands for in running text; special tokens give none.

        Raises `UsageError` for an id that the vocabulary does not have.
        """
        if not 0 <= token < self.vocab_size:
            raise UsageError(f"token id {token}: this vocabulary has ids 0 to {self.vocab_size - 1}")
        return b"" if token in self._special_ids else self._token_bytes(token)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens` from its beginning; bytes that form no character become U+FFFD."""
        decoder = self.incremental()
        return "".join(map(decoder.push, tokens)) + decoder.flush()

    def incremental(self, *, continues: bool = False) -> "IncrementalDecoder":
        """Return a decoder for one stream of tokens, which begins a text or `continues` one."""
        return IncrementalDecoder(self, drop_space=self.adds_space and not continues)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special.values())

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]:
        """Return the ids of valid text, without BOS."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes:
        """Return the bytes of an ordinary token."""


class SegmentedTokenizer(Tokenizer):
    """A tokenizer whose algorithm knows no special tokens: the text between them is encoded piece by piece."""

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of text in which nothing is special."""

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special or not self.special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self._encode_ordinary(part)
        return ids

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return any_of(self.special)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of one group that matches each of `texts`, the longest one where several begin alike."""
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")


class IncrementalDecoder:
    """Turns a stream of tokens into text, holding back bytes until they form whole characters."""

    def __init__(self, tokenizer: Tokenizer, *, drop_space: bool) -> None:
        self._tokenizer = tokenizer
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes, perhaps none."""
        data = self._tokenizer.token_bytes(token)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return what an incomplete character at the end becomes (U+FFFD), or nothing."""
        return self._utf8.decode(b"", final=True)


def _named(role: str, default: int | None, special: Mapping[str, int], settings: Settings) -> int | None:
    text = settings.tokens.get(role)
    if text is None:
        return default
    if text not in special:
        raise ModelFileError(
            f"{settings.source}: {role} {text!r} is not a special token of the vocabulary that it stands beside"
        )
    return special[text]
