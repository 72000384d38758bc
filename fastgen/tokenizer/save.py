"""The files of a tokenizer that came out of another kind of file: a GGUF's as the `tokenizer.json` of a folder."""

import json

from fastgen.errors import UsageError
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.hf_json import HuggingFaceTokenizer


def tokenizer_as_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files, by name, from which `open_tokenizer` and transformers make this tokenizer again.

    Raises `UsageError` for a kind that has no such form.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UsageError("this model's tokenizer cannot be written as a file; pass one with --tokenizer")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        **tokenizer.template_tokens,
    }
    files = {
        "tokenizer.json": tokenizer.to_json().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
    }
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    return files
