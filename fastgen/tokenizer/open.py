"""Opening a tokenizer from a folder or a file; what a file is, its content says.

Names do not tell: `tokenizer.model` is SentencePiece's protobuf for Llama 2 and tiktoken's lines for Llama 3. In a
folder `tokenizer.json` is preferred, since it also holds tokens that were added to the vocabulary afterwards. The
settings beside the file (`settings`) apply to every format.
"""

import codecs
import os
from pathlib import Path

from fastgen.errors import ModelFileError
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.hf_json import parse_hf_json
from fastgen.tokenizer.llama2c_bin import looks_like_llama2c, parse_llama2c
from fastgen.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fastgen.tokenizer.settings import read_settings, read_whole
from fastgen.tokenizer.tiktoken_ranks import TiktokenTokenizer, looks_like_ranks

NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
MAX_BYTES = 256 << 20  # the largest published ones are near 35 MB


class MissingTokenizerError(ModelFileError):
    """There is no tokenizer; any other `ModelFileError` says what is wrong with the one that is there."""


def open_tokenizer(path: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer in the folder or file `path`, checked against a model's `vocab_size` if given.

    Raises `ModelFileError` if it is damaged or of no known format, or does not fit the model, and
    `MissingTokenizerError` if the folder has none.
    """
    file = _find(path) if path.is_dir() else path
    data = read_whole(file, MAX_BYTES)
    settings = read_settings(file.parent)
    tokenizer: Tokenizer  # of one of the four formats below
    if data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        tokenizer = parse_hf_json(data, file, settings)
    elif looks_like_ranks(data):
        tokenizer = TiktokenTokenizer(data, file, settings)
    elif looks_like_llama2c(data):
        tokenizer = parse_llama2c(data, file, settings)
    elif data[:1] == b"\n":  # the protobuf's field 1, of which there is one for every piece
        tokenizer = SentencePieceTokenizer(data, file, settings)
    else:
        raise ModelFileError(
            f"{file}: no known tokenizer, its first bytes are {data[:8]!r}; expected a tokenizer.json, a SentencePiece "
            "model, tiktoken ranks or llama2.c's tokenizer.bin"
        )
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, file)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, source: Path) -> None:
    """Raise `ModelFileError` naming `source` if ids reach beyond the `vocab_size` rows of a model's embedding.

    Fewer ids than rows are usual: embeddings are padded to round sizes.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ModelFileError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model's embedding {vocab_size} rows: "
            "they do not belong together; --tokenizer names another"
        )


def _find(folder: Path) -> Path:
    for name in NAMES:
        if os.path.lexists(folder / name):  # a link to nowhere is an error, not a reason to take the next
            return folder / name
    raise MissingTokenizerError(
        f"{folder}: no tokenizer in this folder, expected {', '.join(NAMES[:-1])} or {NAMES[-1]}; "
        "--tokenizer names one elsewhere"
    )
