"""Llama 3's own `tokenizer.model`: tiktoken ranks, one line `base64(bytes) rank` a token.

The file holds the 128,000 ordinary tokens only. The split pattern and the 256 special tokens that follow them are in
Meta's code (meta-llama/llama-models, `models/llama3/tokenizer.py`), as here; Llama 3 and 3.1 share them but for the
names of ids that Llama 3 never uses. The `tiktoken` library is an optional extra, needed for this format only.
"""

import base64
import binascii
import importlib
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from fastgen.errors import ModelFileError, UsageError
from fastgen.tokenizer.base import SegmentedTokenizer
from fastgen.tokenizer.settings import Settings

RANKS = 128_000
SPECIAL = 256
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
# The library's regular expressions run out of stack on runs of some 10^6 blanks; Meta's code cuts them at this length.
BLANK_RUN = re.compile(r"\s{25000}")


class TiktokenTokenizer(SegmentedTokenizer):
    """Llama 3's vocabulary.

    Raises `ModelFileError` naming `path` if `data` is not that, `UsageError` if the library is not installed.
    """

    def __init__(self, data: bytes, path: Path, settings: Settings) -> None:
        tiktoken = _library(path)
        ranks = _parse(data, path)
        self._tokens = list(ranks)
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=RANKS
        )
        reserved = [f"<|reserved_special_token_{n}|>" for n in range(2, 2 + SPECIAL - len(NAMED))]
        special = {text: RANKS + n for n, text in enumerate([*NAMED, *reserved])}
        super().__init__(
            vocab_size=RANKS + SPECIAL,
            special=special,
            bos_id=special["<|begin_of_text|>"],
            eos_id=special["<|end_of_text|>"],
            add_bos=True,
            adds_space=False,
            settings=settings,
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        cuts = [0, *(run.end() for run in BLANK_RUN.finditer(text)), len(text)]
        ids: list[int] = []
        for start, stop in pairwise(cuts):
            ids += self._encoding.encode_ordinary(text[start:stop])
        return ids

    def _token_bytes(self, token: int) -> bytes:
        return self._tokens[token]


def looks_like_ranks(data: bytes) -> bool:
    """Return whether `data` begins with a line of base64 and a number."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data) is not None


def _library(path: Path) -> ModuleType:
    try:
        return importlib.import_module("tiktoken")
    except ImportError as error:
        raise UsageError(
            f"{path}: tiktoken ranks (Meta's own Llama 3 tokenizer) need the tiktoken library: pip install "
            "'fastgen[tiktoken]', or use the tokenizer.json of the Hugging Face checkpoint"
        ) from error


def _parse(data: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = number
        except binascii.Error as error:
            raise ModelFileError(f"{path}: line {number + 1} is no base64; damaged, fetch it again") from error
        if rank != b"%d" % number:
            raise ModelFileError(f"{path}: line {number + 1} has rank {rank[:20]!r}, expected {number}; fetch it again")
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if len(ranks) != RANKS or missing:
        raise ModelFileError(
            f"{path}: {len(ranks)} distinct tokens, {missing} of the 256 bytes missing; Llama 3 has {RANKS} and all: "
            "truncated, damaged or another model's; its tokenizer.json would serve"
        )
    return ranks
