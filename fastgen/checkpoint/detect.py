"""`open_checkpoint()`: what a path holds, told from its content, opened by the reader of that format."""

import difflib
import os
import stat
from pathlib import Path

from fastgen.checkpoint.gguf import open_gguf
from fastgen.checkpoint.gguf_header import MAGIC as GGUF_MAGIC
from fastgen.checkpoint.hf import WEIGHTS, open_hf
from fastgen.checkpoint.lazy import Checkpoint
from fastgen.checkpoint.llama2c import looks_like_llama2c, open_llama2c
from fastgen.checkpoint.meta import PARAMS, SHARD, open_meta
from fastgen.checkpoint.safetensors_file import looks_like_safetensors
from fastgen.checkpoint.torch_bin import looks_like_torch
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile

LLAMA2C_MAGIC = b"24ka"  # of its later formats: "ak42" as a little-endian integer
SHOWN = 5


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at `path`: a folder of Hugging Face or Meta, one with a GGUF file, or a single file.

    Only headers are read. Raises `ModelFileError` for a path that is missing or holds no checkpoint that can be
    used, naming the file and what is wrong with it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file or folder{_suggestion(path)}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"{path}: cannot be opened: {reason}") from error
    return _open_folder(path) if stat.S_ISDIR(mode) else _open_file(path)


def _open_folder(folder: Path) -> Checkpoint:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ModelFileError(f"{folder}: cannot be read: {error.strerror}") from error
    if not names:
        raise ModelFileError(f"{folder}: the folder is empty")
    ggufs = [name for name in names if name.endswith(".gguf")]
    described = "config.json" in names and (not ggufs or any(name.endswith(".safetensors") for name in names))
    if described or not set(WEIGHTS).isdisjoint(names):
        return open_hf(folder)
    if len(ggufs) == 1:
        return open_gguf(folder / ggufs[0])
    if ggufs:
        raise ModelFileError(f"{folder}: {len(ggufs)} GGUF files, name one: {_listed(ggufs)}")
    if PARAMS in names:
        return open_meta(folder)
    raise ModelFileError(
        f"{folder}: no checkpoint among {_listed(names)}; expected config.json beside {' or '.join(WEIGHTS[::2])}, "
        f"{PARAMS} beside consolidated.00.pth, or a .gguf file; a file of another kind must be named itself"
    )


def _open_file(path: Path) -> Checkpoint:
    file = RandomAccessFile(path)
    start = bytes(file.read(0, min(28, file.size)))
    if start.startswith(GGUF_MAGIC):
        return open_gguf(path)
    if SHARD.fullmatch(path.name) and (path.parent / PARAMS).exists():
        return open_meta(path.parent)
    if path.name in WEIGHTS or looks_like_safetensors(start) or looks_like_torch(start):
        return open_hf(path.parent, path)
    if start.startswith(LLAMA2C_MAGIC):
        raise ModelFileError(f"{path}: versions 1 and 2 of llama2.c's format are not supported yet")
    if looks_like_llama2c(start):
        return open_llama2c(path)
    raise ModelFileError(
        f"{path}: {file.size} bytes of no known format (safetensors, PyTorch, GGUF, llama2.c): not a model, or damaged"
    )


def _suggestion(path: Path) -> str:
    """Return a hint at the sibling with the most similar name, if there is one."""
    try:
        siblings = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    similar = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / similar[0]}?" if similar else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
