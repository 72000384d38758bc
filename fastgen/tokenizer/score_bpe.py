"""Merging by score: SentencePiece's BPE, for vocabularies that come without its library's file.

GGUF (`tokenizer.ggml.model = llama`) and llama2.c's `tokenizer.bin` store pieces and scores of the same models.
A text is a space and then its characters; as long as two neighbours spell a piece, the pair of the best score (of
equals the leftmost) becomes one. What is then no piece is spelled in byte tokens. With a heap of the candidate pairs
and a doubly linked list of symbols that is O(n log n) (google/sentencepiece, `src/bpe_model.cc`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from heapq import heapify, heappop, heappush

from fastgen.errors import ModelFileError
from fastgen.tokenizer.base import SegmentedTokenizer, any_of
from fastgen.tokenizer.settings import Settings


class Kind(IntEnum):
    """What a token is, numbered as in SentencePiece's proto and in GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4  # matched in the text before anything is merged
    UNUSED = 5
    BYTE = 6


class ScoreBpeTokenizer(SegmentedTokenizer):
    """A vocabulary of `pieces` (with plain spaces), their `scores` and `kinds`, in the order of their ids.

    Byte pieces are spelled `<0x00>` to `<0xFF>`; all 256 are needed. Raises `ModelFileError` naming `source` for
    missing bytes, pieces that occur twice, or scores that are not numbers.
    """

    def __init__(
        self,
        *,
        pieces: Sequence[str],
        scores: Sequence[float],
        kinds: Sequence[Kind],
        adds_space: bool,
        source: str,
        settings: Settings,
    ) -> None:
        by_kind: dict[Kind, dict[str, int]] = {kind: {} for kind in Kind}
        for token, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
            if by_kind[kind].setdefault(piece, token) != token:
                raise ModelFileError(f"{source}: token {piece!r} stands at ids {by_kind[kind][piece]} and {token}")
        self.pieces, self.scores, self.kinds = pieces, scores, kinds
        self._ids = by_kind[Kind.UNUSED] | by_kind[Kind.USER_DEFINED] | by_kind[Kind.NORMAL]
        self._scores = {piece: scores[token] for piece, token in self._ids.items()}
        if any(map(math.isnan, self._scores.values())):
            raise ModelFileError(f"{source}: some scores are not numbers; damaged, fetch it again")
        self._byte_ids = [by_kind[Kind.BYTE].get(f"<0x{value:02X}>", -1) for value in range(256)]
        if -1 in self._byte_ids or len(by_kind[Kind.BYTE]) != 256:
            raise ModelFileError(f"{source}: {len(by_kind[Kind.BYTE])} byte tokens, expected <0x00> to <0xFF>")
        self._bytes = {token: bytes([value]) for value, token in enumerate(self._byte_ids)}
        self._user_defined = by_kind[Kind.USER_DEFINED]
        # Where no piece has a space inside, merges never cross the end of a word: words can be encoded one by one.
        crossing = any(re.search("[^ ] ", piece) for piece in by_kind[Kind.NORMAL] | by_kind[Kind.UNUSED])
        self._word = re.compile(".+" if crossing else " *[^ ]+| +", re.DOTALL)
        super().__init__(
            vocab_size=len(pieces),
            special=by_kind[Kind.CONTROL] | by_kind[Kind.UNKNOWN],
            bos_id=None,
            eos_id=None,
            add_bos=False,
            adds_space=adds_space,
            settings=settings,
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        if not text:
            return []
        text = (" " + text if self.adds_space else text).replace("▁", " ")
        parts = self._user_pattern.split(text) if self._user_defined else [text]
        known: dict[str, list[int]] = {piece: [token] for piece, token in self._user_defined.items()}
        ids: list[int] = []
        for part in parts:
            for word in [part] if part in self._user_defined else self._word.findall(part):
                if word not in known:
                    known[word] = self._encode_word(word)
                ids += known[word]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = []
        for symbol in merge(word, self._scores):
            token = self._ids.get(symbol)
            ids += [self._byte_ids[value] for value in symbol.encode()] if token is None else [token]
        return ids

    def _token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token) or self.pieces[token].encode()

    @cached_property
    def _user_pattern(self) -> re.Pattern[str]:
        return any_of(self._user_defined)


def merge(text: str, scores: Mapping[str, float]) -> list[str]:
    """Return the symbols that `text` ends in when neighbours are merged by score, single characters included."""
    symbols = list(text)
    before, after = list(range(-1, len(text) - 1)), list(range(1, len(text) + 1))

    def candidates(left: int, right: int) -> list[tuple[float, int, int, int]]:
        if left < 0 or right >= len(symbols):
            return []
        pair = symbols[left] + symbols[right]
        return [(-scores[pair], left, right, len(pair))] if pair in scores else []

    heap = [candidate for left in range(len(text)) for candidate in candidates(left, left + 1)]
    heapify(heap)
    while heap:
        _, left, right, length = heappop(heap)
        # Symbols only grow, or vanish into their left neighbour: the length tells whether both are as they were.
        if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        after[left] = after[right]
        if after[left] < len(symbols):
            before[after[left]] = left
        for pair in candidates(before[left], left) + candidates(left, after[left]):
            heappush(heap, pair)
    return [symbol for symbol in symbols if symbol]
