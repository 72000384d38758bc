"""The vocabulary in a GGUF file's metadata (`tokenizer.ggml.*`; ggml-org/ggml, `docs/gguf.md`).

`model` tells two kinds apart: `llama` is SentencePiece's BPE (pieces and scores: `score_bpe`), `gpt2` byte-level BPE
(tokens and merges), which is put together as a `tokenizer.json` for the `tokenizers` library. How text is split before
merging is not in the file: `pre` names it, and the expressions are in llama.cpp (`src/llama-vocab.cpp`). A name that
is not in the table below is refused, since a wrong split gives wrong ids without any other sign.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastgen.errors import ModelFileError
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.hf_json import HuggingFaceTokenizer
from fastgen.tokenizer.score_bpe import Kind, ScoreBpeTokenizer
from fastgen.tokenizer.settings import Settings
from fastgen.tokenizer.tiktoken_ranks import SPLIT as LLAMA3

T = TypeVar("T")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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

    def sequence(self, key: str, kind: type[T]) -> list[T]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
            raise self.error(key, value, f"a list of {kind.__name__}")
        return value

    def token(self, key: str, vocab_size: int) -> int | None:
        value = self.metadata.get(key)
        if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
            raise self.error(key, value, f"an id below {vocab_size}")
        return value


def _kinds(fields: _Fields, vocab_size: int) -> list[Kind]:
    key = "tokenizer.ggml.token_type"
    if key not in fields.metadata:
        kinds = [Kind.NORMAL] * vocab_size
    else:
        values = fields.sequence(key, int)
        if len(values) != vocab_size:
            raise fields.error(key, f"{len(values)} values", f"one for each of {vocab_size} tokens")
        if unknown := set(values) - set(Kind):
            raise fields.error(key, sorted(unknown), "values from 1 to 6")
        kinds = [Kind(value) for value in values]
    for role in ("bos", "eos"):  # some files leave even these two normal
        token = fields.token(f"tokenizer.ggml.{role}_token_id", vocab_size)
        if token is not None and kinds[token] is not Kind.UNKNOWN:
            kinds[token] = Kind.CONTROL
    return kinds


def _settings(fields: _Fields, tokens: list[str], *, add_bos: bool) -> Settings:
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "eot", "eom"):
        token = fields.token(f"tokenizer.ggml.{role}_token_id", len(tokens))
        if token is not None:
            ids[role] = token
    flag = fields.flag("tokenizer.ggml.add_bos_token")
    return Settings(
        source=str(fields.path),
        tokens={f"{role}_token": tokens[ids[role]] for role in ("bos", "eos") if role in ids},
        add_bos=add_bos if flag is None else flag,
        eos_ids=tuple(token for role, token in ids.items() if role != "bos"),
        chat_template=fields.text("tokenizer.chat_template", "") or None,
    )


def _score_bpe(fields: _Fields, tokens: list[str], kinds: list[Kind]) -> ScoreBpeTokenizer:
    scores = fields.sequence("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise fields.error("tokenizer.ggml.scores", f"{len(scores)} values", f"one for each of {len(tokens)} tokens")
    return ScoreBpeTokenizer(
        pieces=[token.replace("▁", " ") for token in tokens],
        scores=scores,
        kinds=kinds,
        adds_space=fields.flag("tokenizer.ggml.add_space_prefix") is not False,
        source=str(fields.path),
        settings=_settings(fields, tokens, add_bos=True),
    )


def _byte_level_bpe(fields: _Fields, tokens: list[str], kinds: list[Kind]) -> HuggingFaceTokenizer:
    pre = fields.text("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise fields.error("tokenizer.ggml.pre", pre, f"one of {', '.join(SPLITS)}")
    split = SPLITS[pre]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise fields.error("tokenizer.ggml.tokens", f"{len(tokens)} tokens", f"no two alike, not {len(vocabulary)}")
    pairs = []
    for merge in fields.sequence("tokenizer.ggml.merges", str):
        cut = merge.find(" ", 1)  # a token can begin with a space only in files that do not spell bytes
        pairs.append((merge[:cut], merge[cut + 1 :]))
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            _added_token(index, tokens[index], special=kind is not Kind.USER_DEFINED)
            for index, kind in enumerate(kinds)
            if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if split.normal_form_c else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs, "ignore_merges": split.whole_words},
    }
    settings = _settings(fields, tokens, add_bos=split.add_bos)
    return HuggingFaceTokenizer(content, fields.path, settings)


def _added_token(index: int, content: str, *, special: bool) -> dict[str, object]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **plain}
