"""llama2.c's `tokenizer.bin` (karpathy/llama2.c, `tokenizer.py`, method `export`).

    int32  length of the longest token
    then for every id:  float32 score, int32 length, `length` bytes

Spaces are plain, ids 0 to 2 are `<unk>`, `<s>` and `</s>` (the latter two between newlines), ids 3 to 258 the bytes:
spelled `<0x00>` in the present form, as the character of that code in the older one. The number of ids is not stored:
the file's end is the vocabulary's.
"""

import struct
from dataclasses import replace
from pathlib import Path

from fastgen.errors import ModelFileError
from fastgen.tokenizer.score_bpe import Kind, ScoreBpeTokenizer
from fastgen.tokenizer.settings import Settings

UNKNOWN, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
LONGEST = 1 << 16  # far above any token; a SentencePiece model's first four bytes are a larger number
ENTRY = struct.Struct("<fi")


def parse_llama2c(data: bytes, path: Path, settings: Settings) -> ScoreBpeTokenizer:
    """Return the tokenizer in `data`. Raises `ModelFileError` naming `path` if it is damaged."""
    scores, pieces = _entries(data, path)
    kinds = [Kind.NORMAL] * len(pieces)
    spelled = [f"<0x{value:02X}>" for value in range(256)]
    stored = pieces[FIRST_BYTE : FIRST_BYTE + 256]
    if stored not in (spelled, [chr(value) for value in range(256)]):
        raise ModelFileError(f"{path}: ids {FIRST_BYTE} to {FIRST_BYTE + 255} are not the 256 bytes; fetch it again")
    pieces[FIRST_BYTE : FIRST_BYTE + 256] = spelled
    kinds[FIRST_BYTE : FIRST_BYTE + 256] = [Kind.BYTE] * 256
    pieces[:FIRST_BYTE] = ["<unk>", "<s>", "</s>"]
    kinds[:FIRST_BYTE] = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL]
    return ScoreBpeTokenizer(
        pieces=pieces,
        scores=scores,
        kinds=kinds,
        adds_space=True,
        source=str(path),
        settings=replace(
            settings,
            tokens={"bos_token": "<s>", "eos_token": "</s>", **settings.tokens},
            add_bos=settings.add_bos is not False,
            # Its models were trained on stories that begin with BOS and end with nothing: as in run.c, BOS ends one.
            eos_ids=(BOS, EOS, *settings.eos_ids),
        ),
    )


def looks_like_llama2c(data: bytes) -> bool:
    """Return whether `data` begins with a plausible longest length and a first token within it."""
    if len(data) < 4 + ENTRY.size:
        return False
    longest, _, length = struct.unpack_from("<ifi", data)
    return 0 <= length <= longest < LONGEST


def _entries(data: bytes, path: Path) -> tuple[list[float], list[str]]:
    scores: list[float] = []
    pieces: list[str] = []
    (longest,) = struct.unpack_from("<i", data)
    offset = 4
    while offset < len(data):
        end = offset + ENTRY.size
        score, length = ENTRY.unpack_from(data, offset) if end <= len(data) else (0.0, -1)
        if not 0 <= length <= longest or end + length > len(data):
            raise ModelFileError(f"{path}: id {len(pieces)}, at byte {offset}, is cut off or damaged; fetch it again")
        offset = end + length
        scores.append(score)
        try:
            pieces.append(data[end:offset].decode())
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path}: id {len(pieces)}, at byte {end}, is not UTF-8; fetch it again") from error
    return scores, pieces
