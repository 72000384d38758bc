"""int8 weights: symmetric, one scale for each output channel.

    tensor          shape              dtype               content
    weight          [out, in]          int8                q in -128 .. 127, in memory
    weight_packed   [out, ceil(in/4)]  int32               q + 128, four bytes a word, the first weight lowest; on disk
    weight_scale    [out, 1]           bf16, fp16 or fp32  w = q * scale

The packed form is compressed-tensors' `pack-quantized` with 8 bits
(https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized); a row's last word ends in zeros.

Scales are rounded up, so that no weight of a channel is clipped: every one lies within scale / 2 of what comes back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.cpu import int8_product
from quantize.format import INT8, WeightFormat
from quantize.tokens import are_few

LEVELS = 127.5  # half the range of -128 .. 127
PER_WORD = 4


def quantize(
    weight: Tensor, scale_dtype: torch.dtype = torch.bfloat16, *, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return q [out, in] int8 and scale [out, 1] in `scale_dtype` of a weight [out, in] of any float dtype.

    `largest` [out, 1] fp32 is the largest magnitude of each channel, where `weight` is a part of its columns.
    """
    wide = weight.float()
    if largest is None:
        largest = wide.abs().amax(1, keepdim=True)
    scale = rounded_up(largest / LEVELS, scale_dtype)
    return (wide / scale.float()).round_().clamp_(-128, 127).to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [out, in] in `dtype`."""
    return q.to(dtype) * scale.to(dtype)


def pack(q: Tensor) -> Tensor:
    """Return q [out, in] int8 as int32 [out, ceil(in / 4)]."""
    unsigned, filling = q.view(torch.uint8) ^ 128, -q.shape[1] % PER_WORD
    if filling:
        unsigned = F.pad(unsigned, (0, filling))  # copies even where there is nothing to fill
    return unsigned.contiguous().view(torch.int32)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Return q [out, columns] int8 of what `pack` made."""
    return (packed.contiguous().view(torch.uint8)[:, :columns] ^ 128).view(torch.int8)


def rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `scale` (fp32) in `dtype`, not smaller than it was and never zero."""
    limits = torch.finfo(dtype)
    return (scale * (1 + limits.eps)).clamp_(min=limits.smallest_normal).to(dtype)


class Int8Linear(nn.Module):
    """A linear with int8 weights: [.., in] -> [.., out].

    A few tokens on a CPU go through a kernel that reads the weights as they are (`quantize.cpu`). Anything else is the
    definition: dequantize, then `F.linear`, which Inductor fuses on a GPU.
    """

    format: WeightFormat = INT8
    split_units = (1, 1)
    """Tensor parallelism may split rows, and columns, in multiples of these; the scales go with the rows."""

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.cpu_product = int8_product(weight, weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [.., in] times the weights, plus the bias, [.., out] in x's dtype."""
        if self.cpu_product is None or not are_few(x):
            return F.linear(x, dequantize(self.weight, self.weight_scale, x.dtype), self.bias)
        y = self.cpu_product(x.reshape(-1, self.in_features), self.weight)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
