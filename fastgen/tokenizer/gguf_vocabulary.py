"""The vocabulary in a GGUF file's metadata (`tokenizer.ggml.*`; ggml-org/ggml, `docs/gguf.md`).

`model` tells two kinds apart: `llama` is SentencePiece's BPE (pieces and scores: `score_bpe`), `gpt2` byte-level BPE
(tokens and merges), which is put together as a `tokenizer.json` for the `tokenizers` library. How text is split before
merging is not in the file: `pre` names it, and the expressions are in llama.cpp (`src/llama-vocab.cpp`). A name that
is not in the table below is refused, since a wrong split gives wrong ids without any other sign.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastgen.files import naming
from fastgen.gguf_fields import GgufFields
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.hf_json import HuggingFaceTokenizer
from fastgen.tokenizer.score_bpe import Kind, ScoreBpeTokenizer
from fastgen.tokenizer.settings import Settings
from fastgen.tokenizer.tiktoken_ranks import SPLIT as LLAMA3

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
    fields = GgufFields(metadata)
    with naming(path):
        model = fields.required("tokenizer.ggml.model", str)
        tokens = fields.sequence("tokenizer.ggml.tokens", str)
        kinds = _kinds(fields, len(tokens))
        if model == "llama":
            return _score_bpe(fields, tokens, kinds, path)
        if model == "gpt2":
            return _byte_level_bpe(fields, tokens, kinds, path)
        raise fields.error("tokenizer.ggml.model", "llama or gpt2")


def _kinds(fields: GgufFields, vocab_size: int) -> list[Kind]:
    key = "tokenizer.ggml.token_type"
    if key not in fields.metadata:
        kinds = [Kind.NORMAL] * vocab_size
    else:
        values = fields.sequence(key, int)
        if len(values) != vocab_size:
            raise fields.error(key, f"one for each of {vocab_size} tokens", f"{len(values)} values")
        if unknown := set(values) - set(Kind):
            raise fields.error(key, "values from 1 to 6", sorted(unknown))
        kinds = [Kind(value) for value in values]
    for role in ("bos", "eos"):  # some files leave even these two normal
        token = fields.token(role, vocab_size)
        if token is not None and kinds[token] is not Kind.UNKNOWN:
            kinds[token] = Kind.CONTROL
    return kinds


def _settings(fields: GgufFields, tokens: list[str], path: Path, *, add_bos: bool) -> Settings:
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "eot", "eom"):
        token = fields.token(role, len(tokens))
        if token is not None:
            ids[role] = token
    return Settings(
        source=str(path),
        tokens={f"{role}_token": tokens[ids[role]] for role in ("bos", "eos") if role in ids},
        add_bos=fields.get("tokenizer.ggml.add_bos_token", bool, add_bos),
        eos_ids=tuple(token for role, token in ids.items() if role != "bos"),
        chat_template=fields.get("tokenizer.chat_template", str, "") or None,
    )


def _score_bpe(fields: GgufFields, tokens: list[str], kinds: list[Kind], path: Path) -> ScoreBpeTokenizer:
    scores = fields.sequence("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise fields.error("tokenizer.ggml.scores", f"one for each of {len(tokens)} tokens", f"{len(scores)} values")
    return ScoreBpeTokenizer(
        pieces=[token.replace("▁", " ") for token in tokens],
        scores=scores,
        kinds=kinds,
        adds_space=fields.get("tokenizer.ggml.add_space_prefix", bool, True),
        source=str(path),
        settings=_settings(fields, tokens, path, add_bos=True),
    )


def _byte_level_bpe(fields: GgufFields, tokens: list[str], kinds: list[Kind], path: Path) -> HuggingFaceTokenizer:
    pre = fields.get("tokenizer.ggml.pre", str, "default")
    if pre not in SPLITS:
        raise fields.error("tokenizer.ggml.pre", f"one of {', '.join(SPLITS)}")
    split = SPLITS[pre]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise fields.error("tokenizer.ggml.tokens", "no two alike", f"{len(vocabulary)} in {len(tokens)} places")
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
    settings = _settings(fields, tokens, path, add_bos=split.add_bos)
    return HuggingFaceTokenizer(content, path, settings)


def _added_token(index: int, content: str, *, special: bool) -> dict[str, object]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **plain}
