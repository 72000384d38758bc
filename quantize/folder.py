"""Quantizing a checkpoint into a folder, layer by layer: Hugging Face's layout, compressed-tensors' form.

A shard holds the embedding, one layer, or what follows the last, so that no more than that is ever in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint.compressed_tensors import quantization_config, stored_shapes
from fastgen.checkpoint.hf_save import INDEX, hf_config, hf_parts, write_description, write_json
from fastgen.checkpoint.lazy import Checkpoint, LazyTensor
from fastgen.checkpoint.names import HF, linear_parts
from fastgen.checkpoint.safetensors_writer import Entry, write_safetensors
from fastgen.config import ModelConfig
from fastgen.errors import ModelFileError
from fastgen.model import tensor_bytes
from quantize import int4, int8
from quantize.format import WeightFormat
from quantize.linear import BLOCK, dequantize_weight, quantize_weight, scale_dtype


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """What became of one linear."""

    name: str
    format: str
    bytes: int
    bits: float  # effective, a weight
    relative_error: float  # |w - dequantized| / |w|, Frobenius norms


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written: a checkpoint, its linears' formats, and the dtype of everything else."""

    checkpoint: Checkpoint
    formats: Mapping[str, WeightFormat]
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelConfig:
        """The config of the source."""
        return self.checkpoint.config

    @property
    def tied(self) -> bool:
        """Whether the head is still the embedding; one that is quantized is a matrix of its own."""
        return self.config.tie_embeddings and "lm_head" not in self.formats

    def tensors(self) -> dict[str, LazyTensor]:
        """Return the source's tensors by our names, with those of a head that is to be untied."""
        tensors = dict(self.checkpoint.tensors)
        if "lm_head" in self.formats:
            tensors.setdefault("lm_head.weight", tensors["embedding.weight"])
        return tensors

    def bytes(self) -> int:
        """Return how many bytes of weights will be written."""
        total = 0
        for name, tensor in self.tensors().items():
            weight_format = self.formats.get(name.removesuffix(".weight"))
            count = torch.Size(tensor.shape).numel()
            if weight_format is None:
                total += count * self.dtype.itemsize
                continue
            for leaf, shape in stored_shapes(weight_format, *tensor.shape).items():
                total += torch.Size(shape).numel() * (self.dtype.itemsize if leaf == "weight_scale" else 4)
        return total


def write_folder(folder: Path, job: Job, progress: Callable[[int, int], None]) -> list[LinearReport]:
    """Write config and weights into the existing `folder`, and return what became of every linear.

    Raises `ModelFileError` for weights that are not finite, by name, and `OSError` for a disk that is full.
    """
    reports: list[LinearReport] = []
    shards = _shards(job.tensors())
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards):
        progress(number, len(shards))
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, source in names.items():
            tensors |= dict(_stored(name, source, job, reports))
        write_safetensors(folder / file, [Entry.of(name, tensor) for name, tensor in tensors.items()])
        index |= dict.fromkeys(tensors, file)
        total += sum(map(tensor_bytes, tensors.values()))
    progress(len(shards), len(shards))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    _write_config(folder, job)
    return reports


def _write_config(folder: Path, job: Job) -> None:
    foreign = {part: job.formats.get(ours) for ours, parts in linear_parts(job.config, HF).items() for part in parts}
    description = hf_config(job.config, job.dtype) | {
        "tie_word_embeddings": job.tied,
        "quantization_config": quantization_config(foreign),
    }
    write_description(folder, job.config, description)


def _shards(tensors: Mapping[str, LazyTensor]) -> list[dict[str, LazyTensor]]:
    """Return the tensors of every shard: the embedding, each layer, the rest."""
    shards: dict[str, dict[str, LazyTensor]] = {"embedding": {}}
    for name, tensor in tensors.items():
        first, second, *_ = name.split(".")
        key = f"layers.{second}" if first == "layers" else "embedding" if first == "embedding" else "rest"
        shards.setdefault(key, {})[name] = tensor
    rest = shards.pop("rest")
    return [*shards.values(), rest]


def _stored(name: str, source: LazyTensor, job: Job, reports: list[LinearReport]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on disk, by their foreign names, that hold our tensor `name`."""
    module, leaf = name.rsplit(".", 1)
    parts = list(hf_parts(job.config, module, source.shape[0]))
    weight_format = job.formats.get(module) if leaf == "weight" else None
    if weight_format is None:
        tensor = source[:].to(job.dtype)
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ModelFileError(f"{job.checkpoint.path}: {name} holds values that are not finite in {job.dtype}")
        for part, rows in parts:
            yield f"{part}.{leaf}", tensor[rows].clone() if len(parts) > 1 else tensor
        return
    scales = scale_dtype(job.checkpoint.dtype)
    stored = quantize_weight(
        f"{job.checkpoint.path}: {module}", source, weight_format, scales=scales, device=job.device
    )
    error = _relative_error(source, stored, weight_format, job.device)
    stored = {leaf: tensor.cpu() for leaf, tensor in stored.items()}
    size = 0
    for part, rows in parts:
        piece = {leaf: tensor[rows] for leaf, tensor in stored.items()}
        yield f"{part}.weight_shape", torch.tensor([rows.stop - rows.start, source.shape[1]])
        for foreign, tensor in _on_disk(piece, job.dtype).items():
            yield f"{part}.{foreign}", tensor
            size += tensor_bytes(tensor)
    bits = 8 * size / (source.shape[0] * source.shape[1])
    reports.append(LinearReport(name=module, format=str(weight_format), bytes=size, bits=bits, relative_error=error))


def _on_disk(piece: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a linear's tensors in the form that they have on disk, in memory of their own.

    Scales have the dtype of the folder's other tensors: whoever dequantizes computes in it.
    """
    stored = {"weight_scale": piece["weight_scale"].to(dtype, copy=True)}
    if "weight" in piece:
        return stored | {"weight_packed": int8.pack(piece["weight"])}
    stored["weight_packed"] = piece["weight_packed"].clone()
    if "weight_zero_point" in piece:
        stored["weight_zero_point"] = int4.pack_rows(piece["weight_zero_point"])
    return stored


def _relative_error(
    source: LazyTensor, stored: Mapping[str, Tensor], weight_format: WeightFormat, device: torch.device
) -> float:
    rows, columns = source.shape
    step = max(1, BLOCK // columns)
    error = total = 0.0
    for start in range(0, rows, step):
        weight = source[start : start + step].to(device).float()
        block = {leaf: tensor[start : start + step] for leaf, tensor in stored.items()}
        error += (dequantize_weight(block, weight_format, torch.float32) - weight).square().sum().item()
        total += weight.square().sum().item()
    return float((error / total) ** 0.5) if total else 0.0
