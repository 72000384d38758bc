"""int4 weights: groups of 32, 64, 128 or 256 along a row share a scale and, if asymmetric, a zero point.

    tensor             shape                 dtype               content
    weight_packed      [out, in / 8]         int32               q + 8 in 0 .. 15, eight a word: weight 8j + i of a row
                                                                 in bits 4i .. 4i + 3 of its word j
    weight_scale       [out, in / group]     bf16, fp16 or fp32  w = (q - zero_point) * scale
    weight_zero_point  [out, in / group]     int8                -8 .. 7, in memory; absent when symmetric
    weight_zero_point  [out / 8, in / group] int32               z + 8, packed along dim 0 (rows 8j .. 8j + 7 of a
                                                                 column in its word j, the last filled up); on disk

Groups lie along `in`. This is compressed-tensors' `pack-quantized` with 4 bits
(https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized).

Scales are rounded up, so that no weight is clipped: every one lies within scale / 2 of what comes back. A group's range
includes zero, which is always represented exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.cpu import int4_product
from quantize.format import WeightFormat
from quantize.int8 import rounded_up
from quantize.tokens import are_few

LEVELS = 7.5  # half the range of -8 .. 7
PER_WORD = 8


def quantize(
    weight: Tensor, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q [out, in] int8, scale [out, groups] in `scale_dtype`, and zero_point [out, groups] int8 if asymmetric.

    `weight` is [out, in] of any float dtype; `group_size` divides `in`.
    """
    grouped = weight.float().unflatten(1, (-1, group_size))
    if symmetric:
        scale = rounded_up(grouped.abs().amax(2) / LEVELS, scale_dtype)
        q = (grouped / scale.float()[:, :, None]).round_()
        return q.clamp_(-8, 7).to(torch.int8).flatten(1), scale, None
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    scale = rounded_up((high - low) / (2 * LEVELS), scale_dtype)
    zero_point = (-8 - low / scale.float()).round_().clamp_(-8, 7)
    q = (grouped / scale.float()[:, :, None] + zero_point[:, :, None]).round_()
    return q.clamp_(-8, 7).to(torch.int8).flatten(1), scale, zero_point.to(torch.int8)


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the weights [out, in] in `dtype`, computed in it, from q packed as int32 [out, in / 8]."""
    q = unpack(packed).unflatten(1, (scale.shape[1], -1)).to(dtype)
    if zero_point is not None:
        q = q - zero_point.to(dtype)[:, :, None]
    return (q * scale.to(dtype)[:, :, None]).flatten(1)


def pack(q: Tensor) -> Tensor:
    """Return q [out, in] int8 in -8 .. 7 as int32 [out, ceil(in / 8)]."""
    nibbles = F.pad((q + 8).view(torch.uint8), (0, -q.shape[1] % PER_WORD))
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """Return q [out, 8 words] int32 of what `pack` made, its filling included."""
    shifts = torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32, device=packed.device)
    return ((packed[:, :, None] >> shifts & 15) - 8).flatten(1)


def pack_rows(zero_point: Tensor) -> Tensor:
    """Return zero points [out, groups] int8 in -8 .. 7 as int32 [ceil(out / 8), groups]."""
    return pack(zero_point.T).T.contiguous()


def unpack_rows(packed: Tensor, rows: int) -> Tensor:
    """Return zero points [rows, groups] int8 of what `pack_rows` made."""
    return unpack(packed.T)[:, :rows].T.to(torch.int8).contiguous()


class Int4Linear(nn.Module):
    """A linear with int4 weights: [.., in] -> [.., out].

    A few tokens on a CPU go through a kernel that reads packed weights (`quantize.cpu`). Anything else is the
    definition: dequantize, then `F.linear`, which Inductor fuses on a GPU.
    """

    weight_zero_point: Tensor | None

    def __init__(
        self, weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_packed.shape[0], PER_WORD * weight_packed.shape[1]
        self.format = WeightFormat(
            bits=4, group_size=self.in_features // weight_scale.shape[1], symmetric=weight_zero_point is None
        )
        self.weight_packed = nn.Parameter(weight_packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        zero_point = None if weight_zero_point is None else nn.Parameter(weight_zero_point, requires_grad=False)
        self.register_parameter("weight_zero_point", zero_point)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.cpu_product = int4_product(weight_packed, lambda: unpack(weight_packed), weight_scale, weight_zero_point)

    @property
    def split_units(self) -> tuple[int, int]:
        """Tensor parallelism may split rows and columns in multiples of these; scales and zero points go with both."""
        assert self.format.group_size is not None, "int4 weights have groups"
        return 1, self.format.group_size

    def forward(self, x: Tensor) -> Tensor:
        """Return x [.., in] times the weights, plus the bias, [.., out] in x's dtype."""
        if self.cpu_product is None or not are_few(x):
            weight = dequantize(self.weight_packed, self.weight_scale, self.weight_zero_point, x.dtype)
            return F.linear(x, weight, self.bias)
        y = self.cpu_product(x.reshape(-1, self.in_features), self.weight_packed)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
