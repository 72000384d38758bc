"""The tokenizer that came with a checkpoint, as files for another folder: where each format keeps it."""

from fastgen.checkpoint import llama2c, meta
from fastgen.checkpoint.lazy import Checkpoint
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.save import tokenizer_as_files, tokenizer_beside


def own_tokenizer_files(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files, by name, of the `tokenizer` that `checkpoint.open_tokenizer` gave.

    Raises `UsageError` for one that is in no file of its own and has no form as one.
    """
    path = checkpoint.path
    match checkpoint.format:
        case "gguf":
            return tokenizer_as_files(tokenizer)
        case "meta":
            return tokenizer_beside(meta.tokenizer_place(path))
        case "llama2.c v0":
            return tokenizer_beside(llama2c.tokenizer_place(path))
    return tokenizer_beside(path)
