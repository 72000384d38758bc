"""What commands that write a model's folder share: its tokenizer's files, and whether the disk has room."""

import shutil
from pathlib import Path

from fastgen import flags
from fastgen.checkpoint.lazy import Checkpoint
from fastgen.checkpoint.own_tokenizer import own_tokenizer_files
from fastgen.errors import CapacityError
from fastgen.load import resolve_tokenizer
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.open import check_vocabulary, open_tokenizer
from fastgen.tokenizer.save import tokenizer_beside

MARGIN = 64 << 20  # for config, tokenizer and the file system's own needs


def tokenizer_files(config: flags.SourceFlags, checkpoint: Checkpoint) -> tuple[Tokenizer, dict[str, bytes]]:
    """Return the tokenizer of what is going to be written, and its files by name.

    Raises `ModelFileError` for one that is damaged or belongs to another model, `UsageError` if it has no such form.
    """
    named = resolve_tokenizer(config.tokenizer, config.offline) if config.tokenizer else None
    tokenizer = open_tokenizer(named) if named else checkpoint.open_tokenizer()
    check_vocabulary(tokenizer, checkpoint.config.vocab_size, named or checkpoint.path)
    return tokenizer, tokenizer_beside(named) if named else own_tokenizer_files(checkpoint, tokenizer)


def require_space(target: Path, needed: int) -> None:
    """Raise `CapacityError` unless the disk has room for `needed` bytes of weights beside what is replaced."""
    folder = target.resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + min(MARGIN, needed // 8):
        raise CapacityError(
            f"--out {target}: needs {needed / 1e6:.1f} MB, {folder} has {free / 1e6:.1f} MB free; nothing was written"
        )
