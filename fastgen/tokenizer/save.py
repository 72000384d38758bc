"""A tokenizer's files for the folder of a new model: copied from beside another, or made of a GGUF's metadata."""

import json
from pathlib import Path

from fastgen.errors import UsageError
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.hf_json import HuggingFaceTokenizer
from fastgen.tokenizer.llama2c_bin import looks_like_llama2c
from fastgen.tokenizer.open import MAX_BYTES, NAMES
from fastgen.tokenizer.score_bpe import ScoreBpeTokenizer
from fastgen.tokenizer.score_bpe_json import score_bpe_json
from fastgen.tokenizer.settings import read_whole

FILES = (
    *NAMES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def tokenizer_as_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files, by name, from which `open_tokenizer` and transformers make this tokenizer again.

    Raises `UsageError` for a kind that has no such form.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = tokenizer.to_json()
    elif isinstance(tokenizer, ScoreBpeTokenizer):
        content = score_bpe_json(tokenizer)
    else:
        raise UsageError("this model's tokenizer cannot be written as a file; pass one with --tokenizer")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        **tokenizer.template_tokens,
    }
    files = {
        "tokenizer.json": content.encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
    }
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    return files


def tokenizer_beside(path: Path) -> dict[str, bytes]:
    """Return the tokenizer's files in a folder, or a tokenizer's file and its settings beside it, by the names that
    they have in a model's folder."""
    if path.is_dir():
        return {name: read_whole(path / name, MAX_BYTES) for name in FILES if (path / name).exists()}
    data = read_whole(path, MAX_BYTES)
    name = "tokenizer.json" if data.lstrip()[:1] == b"{" else "tokenizer.model"
    if looks_like_llama2c(data):
        name = "tokenizer.bin"
    beside = tokenizer_beside(path.parent)
    return {name: data} | {other: content for other, content in beside.items() if other not in NAMES}
