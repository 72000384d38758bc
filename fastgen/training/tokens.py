"""Texts as one long array of tokens, and the token files of llm.c that keep one.

A text file is one document, or several with lines that read `<|endoftext|>` between them (as TinyStories is
published). Every document becomes bos + tokens + eos, where the tokenizer has these, and all follow one another.

A token file (llm.c, dev/data/data_common.py, github.com/karpathy/llm.c) is little-endian throughout:

    bytes 0 .. 1023    256 int32: 20240520, version 1, number of tokens, zeros
    then               the tokens, uint16 each, to the end of the file
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastgen.errors import ModelFileError, UsageError
from fastgen.files import RandomAccessFile
from fastgen.staged import staged_file
from fastgen.tokenizer.base import Tokenizer

Tokens = npt.NDArray[np.integer]
"""One dimension; uint16 where the vocabulary allows, else int32."""

SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}[ \t\r]*$", re.MULTILINE)
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
LLAMA3_MAGIC = 20240801  # the same header before uint32 tokens
MAX_VALIDATION_TOKENS = 1 << 20


@dataclass(frozen=True)
class TokenData:
    """Tokens to learn from, and later ones of the same source to measure on."""

    training: Tokens
    validation: Tokens

    def whole(self) -> Tokens:
        """Return all tokens in their order."""
        return np.concatenate((self.training, self.validation))

    def fingerprint(self) -> str:
        """Return what tells these tokens, and their division, from others."""
        parts = (self.training, self.validation)
        return " and ".join(f"{part.size} (crc32 {zlib.crc32(part.data):08x})" for part in parts)


def read_documents(paths: Sequence[Path]) -> list[str]:
    """Return the documents of text files; raises `ModelFileError` where one cannot be read or is not UTF-8."""
    documents = []
    for path in paths:
        file = RandomAccessFile(path)
        try:
            text = file.read(0, file.size).decode("utf-8-sig")  # without the mark that Windows puts in front
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
        documents += [document.strip() for document in SEPARATOR_LINE.split(text)]
    return [document for document in documents if document]


def encode_documents(documents: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """Return all documents as one array of tokens, uint16 where the vocabulary allows."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    arrays: list[Tokens] = [np.array(tokenizer.encode(document) + end, dtype=dtype) for document in documents]
    return np.concatenate([np.empty(0, dtype), *arrays])


def read_token_file(path: Path) -> Tokens:
    """Return the tokens of a token file; raises `ModelFileError` if it is none, or not as long as it says."""
    file = RandomAccessFile(path)
    header = np.frombuffer(file.read(0, min(file.size, HEADER_BYTES)), dtype="<i4", count=3 if file.size >= 12 else 0)
    if header.size == 0 or header[0] != MAGIC or header[1] != VERSION:
        found = f"it begins with {list(map(int, header[:2]))}" if header.size else f"it has {file.size} bytes"
        kind = "uint32 tokens, which are not supported" if LLAMA3_MAGIC in header[:1] else "no token file"
        raise ModelFileError(f"{path}: {kind}: {found}, expected {MAGIC} and version {VERSION} (llm.c's uint16 form)")
    count = int(header[2])
    if count < 0 or file.size != HEADER_BYTES + 2 * count:
        raise ModelFileError(
            f"{path}: the header announces {count} tokens, {HEADER_BYTES + 2 * count} bytes in all, but the file has "
            f"{file.size}: it is truncated or damaged"
        )
    return np.frombuffer(file.read(HEADER_BYTES, 2 * count), dtype="<u2").astype(np.uint16, copy=False)


def write_token_file(path: Path, tokens: Tokens) -> None:
    """Write a token file, whole or not at all; raises `UsageError` for tokens that uint16 cannot hold."""
    if tokens.size and int(tokens.max()) >= 1 << 16:
        raise UsageError(f"{path}: token {int(tokens.max())} does not fit the 16 bits of a token file")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with staged_file(path) as staging, staging.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())
        file.flush()


def check_target(path: Path, folder: Path) -> None:
    """Raise `UsageError` if tokens cannot go to `path`: it is the run's `folder`, or something else that is there.

    Only a token file is replaced by another.
    """
    if path.resolve() == folder.resolve():
        raise UsageError(f"--save-tokens {path}: is the folder --out; name a file")
    if path.exists():
        file = RandomAccessFile(path)
        if bytes(file.read(0, min(file.size, 4))) != MAGIC.to_bytes(4, "little"):
            raise UsageError(f"--save-tokens {path}: exists and is no token file; name another file")


def check_tokens(tokens: Tokens, vocab_size: int, source: str) -> None:
    """Raise `ModelFileError` naming `source` if a token lies outside a vocabulary of `vocab_size`."""
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if outside.size:
        raise ModelFileError(
            f"{source}: token {int(tokens[outside[0]])} at place {int(outside[0])} lies outside the vocabulary of "
            f"{vocab_size}\nThe tokens belong to another tokenizer: name theirs with --tokenizer, or set vocab_size"
        )


def split(tokens: Tokens, share: float, context: int, source: str) -> TokenData:
    """Return the tokens divided into training and, from their end, a `share` for validation.

    Raises `ModelFileError` naming `source` if either part has no window of `context` tokens and the one after them.
    """
    kept = min(int(tokens.size * share), MAX_VALIDATION_TOKENS)
    data = TokenData(tokens[: tokens.size - kept], tokens[tokens.size - kept :])
    shortest = min(data.training.size, data.validation.size)
    if shortest < context + 1:
        raise ModelFileError(
            f"{source}: too short: {data.training.size} tokens for training and {data.validation.size} for validation, "
            f"each needs {context + 1}\nGive more text, or a smaller --context ({context})"
        )
    return data
