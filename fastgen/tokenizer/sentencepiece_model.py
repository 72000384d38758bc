"""SentencePiece `.model` files (Llama 1 and 2, Mistral, stories260K's tok512), through the `sentencepiece` library.

The file is a protobuf of pieces with scores, types and the normalizer's rules
(google/sentencepiece, `src/sentencepiece_model.proto`). The library knows control tokens such as `<s>` by type and
never reads them from text, so they are split off here where a caller asks for it.
"""

import re
from pathlib import Path

import sentencepiece

from fastgen.errors import ModelFileError
from fastgen.tokenizer.base import SegmentedTokenizer
from fastgen.tokenizer.settings import Settings

SPACE = "▁"  # how pieces spell a space
BYTE = re.compile("<0x[0-9A-F]{2}>")


class SentencePieceTokenizer(SegmentedTokenizer):
    """A SentencePiece model. Raises `ModelFileError` naming `path` if `data` is none."""

    def __init__(self, data: bytes, path: Path, settings: Settings) -> None:
        self._model = _load(data, path)
        size = self._model.get_piece_size()
        first = self._model.encode("a", out_type=str)
        super().__init__(
            vocab_size=size,
            special={
                self._model.id_to_piece(token): token
                for token in range(size)
                if self._model.is_control(token) or self._model.is_unknown(token)
            },
            bos_id=_present(self._model.bos_id()),
            eos_id=_present(self._model.eos_id()),
            add_bos=True,
            adds_space=bool(first) and first[0].startswith(SPACE),
            settings=settings,
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _token_bytes(self, token: int) -> bytes:
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # spelled <0x41>
        return piece.replace(SPACE, " ").encode()


def _load(data: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    advice = "damaged or no SentencePiece model; fetch it again"
    if not data:
        raise ModelFileError(f"{path}: empty, {advice}")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        pieces = [model.id_to_piece(token) for token in range(model.get_piece_size())]
    except (RuntimeError, ValueError) as error:  # ValueError: pieces or messages that are not UTF-8
        raise ModelFileError(f"{path}: {advice}") from error
    wrong = [piece for token, piece in enumerate(pieces) if model.is_byte(token) and not BYTE.fullmatch(piece)]
    if not pieces or wrong:
        raise ModelFileError(f"{path}: {len(pieces)} pieces, {len(wrong)} of them malformed bytes: {advice}")
    return model


def _present(token: int) -> int | None:
    return token if token >= 0 else None
