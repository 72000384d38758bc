"""From a weight and a format to a quantized linear, whatever the format; the method is round to nearest (rtn).

stored = quantize_weight("layers.0.wo", weight, INT8)     # tensors by the names of the module's parameters
linear = make_linear(INT8, stored, bias, torch.bfloat16)
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fastgen.errors import ModelFileError
from quantize import int4, int8
from quantize.format import WeightFormat

BLOCK = 1 << 20
"""Weights that are quantized at a time: fp32 copies of them are all that a large matrix needs beside itself."""


class Rows(Protocol):
    """A matrix, in memory or in a file, whose rows can be sliced."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: slice) -> Tensor: ...


def scale_dtype(weights: torch.dtype) -> torch.dtype:
    """Return the dtype of scales for a checkpoint of these weights: fp16 stays, all else has bf16.

    It does not depend on where the model runs, so quantizing at load and beforehand give the same weights.
    """
    return torch.float16 if weights is torch.float16 else torch.bfloat16


def quantize_weight(
    name: str,
    weight: Rows,
    weight_format: WeightFormat,
    *,
    scales: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    largest: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the tensors that stand for `weight` [out, in], by the names of the module's parameters, on `device`.

    `largest` [out, 1] fp32 on `device`: see `int8.quantize`; other formats do not need it.

    Raises `ModelFileError` for values that are not finite; `name` stands in the message.
    """
    rows, columns = weight.shape
    step = max(1, BLOCK // columns)
    stored: dict[str, Tensor] = {}
    for start in range(0, rows, step):
        part = None if largest is None else largest[start : start + step]
        block_of_rows = weight[start : start + step].to(device)
        for leaf, block in _quantize_rows(block_of_rows, weight_format, scales, part).items():
            if leaf not in stored:
                stored[leaf] = block.new_empty(rows, block.shape[1])
            stored[leaf][start : start + step] = block
    if not stored["weight_scale"].isfinite().all():
        row = int((~stored["weight_scale"].isfinite()).any(1).nonzero()[0])
        raise ModelFileError(
            f"{name}: row {row} holds a weight that is not finite, or too large for a scale in {scales}; "
            "the checkpoint is damaged"
        )
    return stored


def dequantize_weight(stored: Mapping[str, Tensor], weight_format: WeightFormat, dtype: torch.dtype) -> Tensor:
    """Return the weights [out, in] that these tensors stand for."""
    if weight_format.bits == 8:
        return int8.dequantize(stored["weight"], stored["weight_scale"], dtype)
    return int4.dequantize(stored["weight_packed"], stored["weight_scale"], stored.get("weight_zero_point"), dtype)


def make_linear(
    weight_format: WeightFormat, stored: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> nn.Module:
    """Return the linear of these tensors, with scales and bias in `dtype`."""
    scale, bias = stored["weight_scale"].to(dtype), None if bias is None else bias.to(dtype)
    if weight_format.bits == 8:
        return int8.Int8Linear(stored["weight"], scale, bias)
    return int4.Int4Linear(stored["weight_packed"], scale, stored.get("weight_zero_point"), bias)


def _quantize_rows(
    rows: Tensor, weight_format: WeightFormat, scales: torch.dtype, largest: Tensor | None
) -> dict[str, Tensor]:
    if weight_format.group_size is None:
        q, scale = int8.quantize(rows, scales, largest=largest)
        return {"weight": q, "weight_scale": scale}
    q, scale, zero_point = int4.quantize(
        rows, weight_format.group_size, symmetric=weight_format.symmetric, scale_dtype=scales
    )
    stored = {"weight_packed": int4.pack(q), "weight_scale": scale}
    return stored if zero_point is None else stored | {"weight_zero_point": zero_point}
