"""Meta's own folders: `params.json` beside `consolidated.00.pth`, `.01.pth`, ... one for each model-parallel rank.

The files of one model hold slices of the same tensors, as fairscale's layers split them
(https://github.com/meta-llama/llama/blob/main/llama/model.py): rows of wq, wk, wv, w1, w3 and output, columns of wo
and w2; norms are in every file whole. The embedding is split by columns in Llama 1 and 2, by rows from Llama 3 on;
its shape tells. They are merged as they are read, so no more than what is asked for is ever in memory.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgen.checkpoint.fields import Fields
from fastgen.checkpoint.lazy import Checkpoint, Concat, LazyTensor
from fastgen.checkpoint.meta_config import EMBEDDING, config_from_params
from fastgen.checkpoint.names import META, assemble, main_dtype, shortened
from fastgen.checkpoint.torch_bin import read_torch
from fastgen.errors import ModelFileError
from fastgen.files import naming
from fastgen.json_file import read_json
from fastgen.tokenizer.open import NAMES, open_tokenizer

PARAMS = "params.json"
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
SPLIT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def open_meta(folder: Path) -> Checkpoint:
    """Open Meta's folder. Raises `ModelFileError` for whatever is missing, damaged or not supported, by file."""
    params = folder / PARAMS
    with naming(params):
        fields = Fields(read_json(params))
        dim = fields.integer("dim")
    tensors = _merge(_shards(folder), dim, folder)
    with naming(params):
        config = config_from_params(fields, tensors)
    assembled = assemble(config, tensors, META, folder)
    return Checkpoint(
        path=folder,
        format="meta",
        config=config,
        dtype=main_dtype(assembled.values()),
        tensors=assembled,
        open_tokenizer=lambda: open_tokenizer(tokenizer_place(folder)),
    )


def _shards(folder: Path) -> dict[str, Mapping[str, LazyTensor]]:
    """Return the tensors of every shard by its file's name, in the order of the ranks."""
    names = sorted(name for name in os.listdir(folder) if SHARD.fullmatch(name))
    expected = [f"consolidated.{rank:02}.pth" for rank in range(len(names))]
    if not names or names != expected:
        raise ModelFileError(
            f"{folder}: of the shards consolidated.00.pth, .01.pth, ... beside {PARAMS} it has "
            f"{', '.join(names) or 'none'}; expected all of them"
        )
    return {name: read_torch(folder / name) for name in names}


def _merge(shards: Mapping[str, Mapping[str, LazyTensor]], dim: int, folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors that the shards hold slices of."""
    (first_name, first), *others = shards.items()
    for name, tensors in others:
        lost = [tensor for tensor in first.keys() ^ tensors.keys() if not tensor.endswith(META.ignored)]
        if lost:
            raise ModelFileError(
                f"{folder / name}: tensors that only one of it and {first_name} has ({len(lost)}): "
                f"{shortened(sorted(lost))}; the shards are not of one model"
            )
    merged = {}
    for name, slice_ in first.items():
        if name.endswith(META.ignored):
            continue
        slices = [tensors[name] for tensors in shards.values()]
        if any(other.shape != slice_.shape or other.dtype != slice_.dtype for other in slices):
            shapes = ", ".join(str(list(other.shape)) for other in slices)
            raise ModelFileError(f"{folder}: {name:.100} has slices of {shapes}, expected all of one shape and dtype")
        merged[name] = _whole(name, slices, dim)
    return merged


def _whole(name: str, slices: Sequence[LazyTensor], dim: int) -> LazyTensor:
    if len(slices) == 1 or len(slices[0].shape) != 2:
        return slices[0]
    by_columns = name.endswith(SPLIT_BY_COLUMNS) or (name == EMBEDDING and slices[0].shape[1] != dim)
    return Concat(slices, dimension=int(by_columns))


def tokenizer_place(folder: Path) -> Path:
    """Return the folder, if it has a tokenizer, else the file above it, which the sizes of Llama 1 and 2 share."""
    shared = folder.parent / "tokenizer.model"
    return folder if any((folder / name).exists() for name in NAMES) or not shared.exists() else shared
