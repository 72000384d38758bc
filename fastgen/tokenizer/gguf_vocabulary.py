"""The vocabulary in a GGUF file's metadata (`tokenizer.ggml.*`; ggml-org/ggml, `docs/gguf.md`).

`model` tells two kinds apart: `llama` is SentencePiece's BPE (pieces and scores: `score_bpe`), `gpt2` byte-level BPE
(tokens and merges), which is put together as a `tokenizer.json` for the `tokenizers` library. How text is split before
merging is not in the file: `pre` names it, and the expressions are in llama.cpp (`src/llama-vocab.cpp`). A name that
is not in the table below is refused, since a wrong split gives wrong ids without any other sign.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import ModelFileError
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.hf_json import HuggingFaceTokenizer
from fastgen.tokenizer.score_bpe import Kind, ScoreBpeTokenizer
from fastgen.tokenizer.settings import Settings

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """How one family splits text before merging."""

    patterns: tuple[str, ...]  # one after the other, each on what the one before left
    add_bos: bool = False  # where the file does not say
    whole_words: bool = False  # a word that is a token is one, whatever the merges
    normal_form_c: bool = False


_LLAMA3 = _Split((LLAMA3,), add_bos=True, whole_words=True)
_QWEN2 = _Split((QWEN2,), normal_form_c=True)
_DIGITS = _Split((r"\p{N}", GPT2))
SPLITS: Mapping[str, _Split] = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Split((GPT2,)),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _Split((LLAMA3,)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": _Split((TEKKEN,), add_bos=True, whole_words=True),
}


def tokenizer_from_gguf(metadata: Mapping[str, object], path: Path) -> Tokenizer:
    """Return the tokenizer that a GGUF file's `metadata` describes.

    Raises `ModelFileError` naming `path` and the key for metadata that are missing, of the wrong type, contradict each
    other, or name an unknown model or split.
    """
    fields = _Fields(metadata, path)
    model = fields.text("tokenizer.ggml.model")
    tokens = fields.sequence("tokenizer.ggml.tokens", str)
    kinds = _kinds(fields, len(tokens))
    if model == "llama":
        return _score_bpe(fields, tokens, kinds)
    if model == "gpt2":
        return _byte_level_bpe(fields, tokens, kinds)
    raise fields.error("tokenizer.ggml.model", model, "llama or gpt2")


class _Fields:
    """Metadata of a file, checked as they are read."""

    def __init__(self, metadata: Mapping[str, object], path: Path) -> None:
        self.metadata, self.path = metadata, path

    def error(self, key: str, value: object, expected: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {key} is {str(value)[:60]!r}, expected {expected}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.metadata.get(key)
        if not isinstance(value, bool | None):
            raise self.error(key, value, "true or false")
        return value

    def sequence[T](self, key: str, kind: type[T]) -> list[T]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
            raise self.error(key, value, f"a list of {kind.__name__}")
        return value

    def token(self, key: str, vocab_size: int) -> int | None:
        value = self.metadata.get(key)
        if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
            raise self.error(key, value, f"an id below {vocab_size}")
        return value
