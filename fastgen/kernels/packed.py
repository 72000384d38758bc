"""int4 and int8 weights in the order in which tensor cores take them: the layout in GPU memory, and the linear.

A matrix [n, K] is cut into tiles of 16 rows and units of 128 columns. Tile i holds rows 8i .. 8i + 7 and as many from
8 tiles + 8i on: the two halves of a matrix meet in a tile, a gate row and its up row in a lane. What the matrix lacks
to whole tiles and units is filled with zeros.

    tensor  shape                    dtype  content
    words   [tiles, units, record]   int32  a record is what a warp reads of a tile at once, whole lines of memory:
                [2, 32, 4]                  int4: eight 4-bit weights a word, see below
                [2, 2, 32, 4]               int8: four weights a word
    scales  [tiles, 8]               int32  int8: two scales in the model's dtype, of row g of the first half in the
                                            low bits, of the second in the high
            [tiles, units, tail]     int32  int4: a tail is what belongs to a record:
                groups x [8]                two scales as above; `groups` of 32, 64 or 128 columns in a unit (of 256:
                                            repeated in a second unit)
                groups x [2]                with zero points: 8 + zero point of row g in byte g, of the first half in
                                            the low four bits, of the second in the high
                [2]                         and, for one group, zeros that fill 16 bytes

Word i of lane 4g + t in part c of a record holds columns k .. k + 3 of a unit, k = 64c + 32 (i / 2) + 8t + 4 (i mod 2),
one a byte, from the lowest on: what the lane has of step 2c + i / 2 of four, each a product of 16 rows and 32 columns
(PTX ISA, mma.m16n8k32). In the low four bits of a byte stands row g of the first half, q + 8, in the high four that of
the second. int8 has a part [2, 32, 4] for each half of the rows instead, with q as it is. A weight takes its 4 or 8
bits, nothing more.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

TILE, UNIT = 16, 128
PLANE = 256  # words


class Form(NamedTuple):
    """What a record and its tail hold.

    Attributes:
        planes: of four bits: 1 for int4, 2 for int8.
        groups: of columns with a scale of their own in a unit; 0 for int8.
        zeros: whether groups have zero points.
    """

    planes: int
    groups: int
    zeros: bool


def form_of(words: Tensor, scales: Tensor) -> Form:
    """Return what `words` and `scales` hold, from the sizes of a record and of a tail: no two forms share both."""
    if words.shape[2] == 2 * PLANE:
        return Form(2, 0, False)
    size = scales.shape[2]
    zeros = size not in (8, 16, 32)
    return Form(1, size // (10 if zeros else 8), zeros)


class PackedLinear(nn.Module):
    """A linear [.., in] -> [.., out] whose weights lie in the kernels' layout; on CUDA.

    `fused` runs up to 16 tokens with the kernels of `packed_linear`. The module itself unpacks and multiplies, which
    serves any number of tokens.

    Args:
        words, scales: see above; `dtype` is that of the numbers in `scales`, bf16 or fp16.
        bias: [out] in `dtype`.
    """

    def __init__(
        self, words: Tensor, scales: Tensor, bias: Tensor | None,
        *, out_features: int, in_features: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self.words = nn.Parameter(words, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def multiply(self, factor: float) -> None:
        """Multiply the weights, in place, by way of their scales."""
        groups = form_of(self.words, self.scales).groups
        self.scales.view(self.dtype)[..., : TILE * max(1, groups)].mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [.., in] times the weights, plus the bias, [.., out]; x in `dtype`."""
        weight = unpack(self.words, self.scales, self.out_features, self.in_features, self.dtype)
        return F.linear(x, weight, self.bias)


def pack_int4(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> PackedLinear:
    """Return the linear of int4 weights as `quantize.int4` has them.

    packed [out, in / 8] int32, scale [out, groups] bf16 or fp16, zero_point [out, groups] int8, bias [out].
    """
    assert scale.dtype in (torch.bfloat16, torch.float16), "two scales lie in a word"
    n, width = packed.shape[0], 8 * packed.shape[1]
    tiles, units, group = triton.cdiv(n, TILE), triton.cdiv(width, UNIT), width // scale.shape[1]
    groups = max(1, UNIT // group)
    words = packed.new_empty(tiles, units, PLANE)
    pack_int4_kernel[(tiles, units)](packed.contiguous(), words, n, width)
    scales = _in_tiles(scale, tiles, units, group).view(torch.int32)
    if zero_point is not None:
        low, high = _in_tiles(zero_point.to(torch.uint8) + 8, tiles, units, group).unflatten(2, (-1, 2)).unbind(3)
        zeros = F.pad(low | high << 4, (0, max(16, 8 * groups) - 8 * groups))
        scales = torch.cat((scales, zeros.view(torch.int32)), 2)
    return PackedLinear(words, scales, bias, out_features=n, in_features=width, dtype=scale.dtype)


def pack_int8(weight: Tensor, scale: Tensor, bias: Tensor | None) -> PackedLinear:
    """Return the linear of int8 weights as `quantize.int8` has them: weight [out, in] int8, scale [out, 1] as above."""
    assert scale.dtype in (torch.bfloat16, torch.float16), "two scales lie in a word"
    n, width = weight.shape
    tiles, units = triton.cdiv(n, TILE), triton.cdiv(width, UNIT)
    words = torch.empty(tiles, units, 2 * PLANE, dtype=torch.int32, device=weight.device)
    pack_int8_kernel[(tiles, units)](weight.contiguous(), words, n, width)
    scales = _in_tiles(scale, tiles, 1, UNIT).view(torch.int32).view(tiles, 8)
    return PackedLinear(words, scales, bias, out_features=n, in_features=width, dtype=scale.dtype)


def _in_tiles(values: Tensor, tiles: int, units: int, group: int) -> Tensor:
    """Return values [n, groups] as [tiles, units, groups of a unit x 16], the two halves of the rows in turn."""
    a_unit = max(1, UNIT // group)
    values = values.repeat_interleave(max(1, group // UNIT), dim=1)
    filled = F.pad(values, (0, units * a_unit - values.shape[1], 0, tiles * TILE - values.shape[0]))
    return filled.view(2, tiles, 8, units, a_unit).permute(1, 3, 4, 2, 0).reshape(tiles, units, a_unit * TILE)


@torch.library.custom_op("fastgen::unpack", mutates_args=())
def unpack(words: Tensor, scales: Tensor, n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the weights [n, width] in `dtype`."""
    weight = torch.empty(n, width, dtype=dtype, device=words.device)
    form = form_of(words, scales)
    unpack_kernel[words.shape[:2]](
        words, scales.view(dtype), scales.view(torch.uint8), weight, n, width, scales.shape[-1],
        GROUPS=form.groups, ZEROS=form.zeros,
    )  # fmt: skip
    return weight


@unpack.register_fake
def _(words: Tensor, scales: Tensor, n: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, width, dtype=dtype, device=words.device)


@triton.jit
def _place():
    """Return the words of a part [2, 32, 4] and their bytes [256, 4]: row g of a half of the tile, column."""
    word, byte = tl.arange(0, 256)[:, None], tl.arange(0, 4)[None, :]
    g, column = _group_and_column(word)
    return word, byte, g, column + byte


@triton.jit
def _group_and_column(word):
    """Return which row g of a half of the tile, and from which column on, a word of a part [2, 32, 4] holds."""
    c, g, t, i = word // 128, word % 128 // 16, word // 4 % 4, word % 4
    return g, tl.program_id(1) * 128 + c * 64 + i // 2 * 32 + t * 8 + i % 2 * 4


@triton.jit
def _row(g, half):
    return half * (tl.num_programs(0) * 8) + tl.program_id(0) * 8 + g


@triton.jit
def pack_int4_kernel(packed, words, n, width):
    """Grid (tiles, units); packed [n, width / 8], weight 8j + i of a row in bits 4i of its word j."""
    word = tl.arange(0, 256)
    g, column = _group_and_column(word)
    bits = tl.zeros([256], tl.int32)
    for half in tl.static_range(2):
        row = _row(g, half)
        here = (row < n) & (column < width)
        q = tl.load(packed + row.to(tl.int64) * (width // 8) + column // 8, mask=here, other=0)
        q = (q >> (column % 8 * 4)) & 0xFFFF  # four weights, which go to a byte each
        q = (q | (q << 8)) & 0x00FF00FF
        bits |= ((q | (q << 4)) & 0x0F0F0F0F) << (4 * half)
    at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 256
    tl.store(words + at + word, bits)


@triton.jit
def pack_int8_kernel(weight, words, n, width):
    """Grid (tiles, units); weight [n, width] int8."""
    _word, byte, g, column = _place()
    at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 512 + tl.arange(0, 256)
    for half in tl.static_range(2):
        row = _row(g, half)
        q = tl.load(weight + row.to(tl.int64) * width + column, mask=(row < n) & (column < width), other=0)
        bits = (q.to(tl.int32) & 255).to(tl.uint32) << (byte * 8)
        tl.store(words + at + half * 256, tl.sum(bits, axis=1).to(tl.int32))


@triton.jit
def unpack_kernel(words, scales, zeros, weight, n, width, tail, GROUPS: tl.constexpr, ZEROS: tl.constexpr):
    """Grid (tiles, units); scales in the dtype of weight [n, width], zeros the same memory as uint8.

    A tail has `tail` words; GROUPS of a unit, 0: int8.
    """
    word, byte, g, column = _place()
    unit = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    for half in tl.static_range(2):
        if GROUPS == 0:
            q = tl.load(words + unit * 512 + half * 256 + word) << (24 - byte * 8) >> 24
            scale = tl.load(scales + tl.program_id(0) * 16 + g * 2 + half)
        else:
            q = (tl.load(words + unit * 256 + word) >> (byte * 8 + 4 * half)) & 15
            place = column % 128 // (128 // GROUPS) * 16 + g * 2 + half
            scale = tl.load(scales + unit * tail * 2 + place)
            if ZEROS:
                place = column % 128 // (128 // GROUPS) * 8 + g
                q -= tl.load(zeros + (unit * tail + 8 * GROUPS) * 4 + place).to(tl.int32) >> (4 * half) & 15
            else:
                q -= 8
        row = _row(g, half)
        value = (q.to(tl.float32) * scale.to(tl.float32)).to(weight.dtype.element_ty)
        tl.store(weight + row.to(tl.int64) * width + column, value, mask=(row < n) & (column < width))
