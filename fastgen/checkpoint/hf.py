"""Hugging Face folders: `config.json` beside weights in safetensors or PyTorch files, whole or in shards.

Of several kinds of weights in one folder the first of `WEIGHTS` is read, as Transformers does. A sharded model's
index names its shards: these must be files of the same folder, whatever the index says.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from fastgen.checkpoint.gpt_fast import gpt_fast_linears, is_gpt_fast
from fastgen.checkpoint.hf_config import read_hf_config
from fastgen.checkpoint.lazy import Checkpoint, LazyTensor
from fastgen.checkpoint.names import HF, META, assemble, fused_formats, main_dtype, shortened
from fastgen.checkpoint.quantized import stored_linears
from fastgen.checkpoint.safetensors_file import read_safetensors
from fastgen.checkpoint.torch_bin import looks_like_torch, read_torch
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile
from fastgen.json_file import read_json
from fastgen.tokenizer.open import open_tokenizer

INDEX = ".index.json"
WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)


def open_hf(folder: Path, weights: Path | None = None) -> Checkpoint:
    """Open a Hugging Face folder; `weights` is the file to read in it, by default the first of `WEIGHTS`.

    Raises `ModelFileError` for whatever is missing, damaged or not supported, by file and field.
    """
    description = folder / "config.json"
    if not os.path.lexists(description):
        raise ModelFileError(f"{description}: is missing; it says what the model in the weights beside it is")
    config = read_hf_config(description)
    weights = weights or find_weights(folder)
    held, scheme = _read_weights(weights), HF
    notes: tuple[str, ...] = ()
    if is_gpt_fast(held):
        scheme = META
        held, stored, notes = gpt_fast_linears(config, held, weights)
    else:
        held, stored = stored_linears(config, held, description, weights)
    formats, lost = fused_formats(config, scheme, stored)
    tensors = assemble(config, held, scheme, weights, stored, formats)
    return Checkpoint(
        path=folder,
        format="hugging face",
        config=config,
        dtype=main_dtype(tensors.values()),
        tensors=tensors,
        open_tokenizer=lambda: open_tokenizer(folder),
        formats=formats,
        dequantized=bool(notes or lost),
        notes=(*notes, *lost),
    )


def find_weights(folder: Path) -> Path:
    """Return the weights' file or index in a folder: the first of `WEIGHTS`, else its one .safetensors file, which
    quantizers give names of their own. Raises `ModelFileError` where there is none."""
    for name in WEIGHTS:
        if os.path.lexists(folder / name):
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    found = f"{len(others)} other .safetensors files" if others else "no other .safetensors file"
    raise ModelFileError(f"{folder}: has a config.json, but none of {', '.join(WEIGHTS)}, and {found}")


def read_shards(index: Path) -> dict[str, str]:
    """Return the shard of every tensor. Raises `ModelFileError` for names that are no plain files."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelFileError(f"{index}: no 'weight_map' from tensors to files")
    for tensor, name in shards.items():
        if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
            raise ModelFileError(f"{index}: {tensor!r:.100} is put into {name!r:.100}, which is no plain file name")
    return shards


def _read_weights(path: Path) -> Mapping[str, LazyTensor]:
    """Return the tensors of one weight file, or of all shards of an index."""
    if not path.name.endswith(INDEX):
        return _read_file(path)
    shards = read_shards(path)
    files = {name: _read_file(_within(path, name)) for name in dict.fromkeys(shards.values())}
    lost = [f"{tensor} (in {name})" for tensor, name in shards.items() if tensor not in files[name]]
    if lost:
        raise ModelFileError(
            f"{path}: tensors that are not in the file the index names ({len(lost)}): {shortened(lost)}"
        )
    return {tensor: files[name][tensor] for tensor, name in shards.items()}


def _read_file(path: Path) -> Mapping[str, LazyTensor]:
    """Return the tensors of one file of weights: its content decides what it is, not its name."""
    file = RandomAccessFile(path)
    start = bytes(file.read(0, min(9, file.size)))
    return read_torch(path) if looks_like_torch(start) else read_safetensors(path)


def _within(index: Path, name: str) -> Path:
    """Return the path of shard `name` beside `index`, once it is sure to lie there.

    A link must not lead out of the folder. In the Hub's cache every file is a link to `../../blobs`, so there the
    bounds are those of the model's own part of the cache: models--*/snapshots/<revision>/ may reach models--*/.
    """
    folder = index.parent.resolve()
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    root = folder.parent.parent if in_cache else folder
    path = index.parent / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: a name that has no form in the file system
        raise ModelFileError(f"{index}: names the file {name!r:.100}, which is not there, or a broken link") from error
    if not target.is_relative_to(root):
        raise ModelFileError(f"{index}: the file {name!r} is a link that leads out of {root}, to {target}")
    return path
