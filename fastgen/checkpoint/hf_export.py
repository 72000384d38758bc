"""Any opened checkpoint as a Hugging Face folder, tensor by tensor: no more than one is ever in memory.

Plain tensors are written in one dtype. Linears that are quantized keep their integers and scales, whatever tool they
come from, in compressed-tensors' `pack-quantized` form.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint.compressed_tensors import quantization_config, stored_shapes
from fastgen.checkpoint.hf_save import INDEX, hf_config, hf_parts, write_description, write_json
from fastgen.checkpoint.lazy import Checkpoint, LazyTensor
from fastgen.checkpoint.names import HF, linear_parts
from fastgen.checkpoint.safetensors_writer import Entry, write_safetensors
from fastgen.errors import ModelFileError
from quantize import int4, int8
from quantize.format import INT8

SHARD_BYTES = 5_000_000_000  # as transformers cuts its own


def export_entries(checkpoint: Checkpoint, dtype: torch.dtype) -> list[Entry]:
    """Return what a folder of `checkpoint` holds, plain tensors in `dtype`."""
    entries: list[Entry] = []
    for ours, tensor in checkpoint.tensors.items():
        module, leaf = ours.rsplit(".", 1)
        for name, rows in hf_parts(checkpoint.config, module, tensor.shape[0]):
            if module in checkpoint.formats and leaf != "bias":
                entries += _quantized(name, leaf, tensor, rows, checkpoint, module)
            else:
                entries.append(_plain(f"{name}.{leaf}", tensor, rows, dtype, checkpoint.path))
    return entries


def write_export(
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    entries: Sequence[Entry],
    progress: Callable[[int, int], None],
) -> None:
    """Write the config and `entries` into the existing `folder`; `progress` is called with bytes done and in all.

    Raises `ModelFileError` for damage that shows while tensors are read, and for values that `dtype` cannot hold;
    `UsageError` for a model that no model type describes; `OSError` for a disk that is full.
    """
    _write_config(folder, checkpoint, dtype)
    shards, total, done = _shards(entries), sum(entry.nbytes for entry in entries), 0
    index: dict[str, str] = {}

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(folder / name, shard, advance)
        index |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _plain(name: str, tensor: LazyTensor, rows: slice, dtype: torch.dtype, source: Path) -> Entry:
    def read() -> Tensor:
        values = tensor[rows].to(dtype)
        if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
            raise ModelFileError(f"{source}: {name} holds values that are not finite in {dtype}")
        return values

    return Entry(name, (rows.stop - rows.start, *tensor.shape[1:]), dtype, read)


def _quantized(
    name: str, leaf: str, tensor: LazyTensor, rows: slice, checkpoint: Checkpoint, module: str
) -> Iterator[Entry]:
    """Yield the entries that stand for one tensor of a quantized linear, of these rows."""
    weight_format = checkpoint.formats[module]
    count = rows.stop - rows.start
    columns = tensor.shape[1] * (int4.PER_WORD if leaf == "weight_packed" else 1)
    if leaf in ("weight", "weight_packed"):
        shape = torch.tensor([count, columns])
        yield Entry(f"{name}.weight_shape", (2,), torch.int64, lambda: shape)
        packed = stored_shapes(weight_format, count, columns)["weight_packed"]
        if weight_format == INT8:
            yield Entry(f"{name}.weight_packed", packed, torch.int32, lambda: int8.pack(tensor[rows]))
        else:
            yield Entry(f"{name}.weight_packed", packed, torch.int32, lambda: tensor[rows])
    elif leaf == "weight_zero_point":
        words = (-(-count // int4.PER_WORD), tensor.shape[1])
        yield Entry(f"{name}.weight_zero_point", words, torch.int32, lambda: int4.pack_rows(tensor[rows]))
    else:
        yield Entry(f"{name}.{leaf}", (count, *tensor.shape[1:]), tensor.dtype, lambda: tensor[rows])


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_config(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    config, formats = checkpoint.config, checkpoint.formats
    description = hf_config(config, dtype)
    if formats:
        foreign = {part: formats.get(ours) for ours, parts in linear_parts(config, HF).items() for part in parts}
        description["quantization_config"] = quantization_config(foreign)
    write_description(folder, config, description)
