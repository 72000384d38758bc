"""The one interface of every tokenizer, and decoding as tokens arrive.

A format gives the two directions and the ids that matter; what is common, above all never printing half a
character, stands here.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, special tokens included.
        bos_id: the beginning-of-sequence id, if the vocabulary has one.
        add_bos: whether the model was trained with `bos_id` in front of every text.
        stop_ids: ids that end an answer: end of sequence, end of turn.
        special: special tokens by their text.
        chat_template: the model's own jinja2 template, if it has one.
    """

    vocab_size: int
    bos_id: int | None
    add_bos: bool
    stop_ids: frozenset[int]
    special: Mapping[str, int]
    chat_template: str | None

    @abstractmethod
    def encode(self, text: str, *, bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, after `bos_id` if `bos` (by default: if `add_bos`).

        `parse_special` reads special tokens out of the text, as a rendered chat template needs; a user's own
        text must never do that.
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` stands for in running text; special tokens give none."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; bytes that form no character become U+FFFD."""
        decoder = self.incremental()
        return "".join(map(decoder.push, tokens)) + decoder.flush()

    def incremental(self) -> "IncrementalDecoder":
        """Return a decoder for one stream of tokens."""
        return IncrementalDecoder(self)


class IncrementalDecoder:
    """Turns a stream of tokens into text, holding back bytes until they form whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return what an incomplete character at the end becomes (U+FFFD), or nothing."""
        return self._utf8.decode(b"", final=True)
