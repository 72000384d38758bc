"""int8 and int4 weights: what is packed how, how far from the original, and that the linears compute just that."""

import random

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from quantize import int4, int8
from quantize.format import GROUP_SIZES, INT8, WeightFormat
from quantize.format import int4 as int4_format
from quantize.linear import dequantize_weight, make_linear, quantize_weight

FORMATS = [INT8] + [
    WeightFormat(bits=4, group_size=size, symmetric=symmetric) for size in GROUP_SIZES for symmetric in (True, False)
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, off center, with some of zeros, of one sign and of one large value."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None] + 0.01
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2, columns // 2] = 100.0
    return weight


@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_every_weight_lies_within_half_a_scale_of_what_comes_back(
    weight_format: WeightFormat, scales: torch.dtype
) -> None:
    weight = weights(24, 512)
    stored = quantize_weight("w", weight, weight_format, scales=scales)
    scale = stored["weight_scale"].float()
    assert stored["weight_scale"].dtype is scales
    error = (dequantize_weight(stored, weight_format, torch.float32) - weight).abs()
    assert (error.view(24, scale.shape[1], -1) <= scale[:, :, None] * (0.5 + 1e-5)).all()


def test_zeros_come_back_as_zeros() -> None:
    for weight_format in FORMATS:
        stored = quantize_weight("w", torch.zeros(16, 256), weight_format)
        assert not dequantize_weight(stored, weight_format, torch.float32).any()


def test_packing_is_bit_exact_with_compressed_tensors_over_1000_shapes() -> None:
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        rows, columns = chance.randint(1, 70), chance.randint(1, 200)
        q = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
        packed = int8.pack(q)
        assert torch.equal(packed, pack_to_int32(q, 8))
        assert torch.equal(int8.unpack(packed, columns), q)
        q = q >> 4
        packed = int4.pack(q)
        assert torch.equal(packed, pack_to_int32(q, 4))
        assert torch.equal(int4.unpack(packed)[:, :columns], q.int())
        packed = int4.pack_rows(q)
        assert torch.equal(packed, pack_to_int32(q, 4, packed_dim=0))
        assert torch.equal(int4.unpack_rows(packed, rows), q)
        assert torch.equal(unpack_from_int32(packed, 4, q.shape, packed_dim=0), q)


def test_golden_bytes() -> None:
    q = torch.arange(-8, 8, dtype=torch.int8).view(1, 16)
    assert int4.pack(q).numpy().tobytes().hex() == "1032547698badcfe"
    assert int4.pack_rows(q.T)[:, 0].numpy().tobytes().hex() == "1032547698badcfe"
    q = torch.tensor([[-128, -1, 0, 127, 5]], dtype=torch.int8)
    assert int8.pack(q).numpy().tobytes().hex() == "007f80ff85000000"
    q, scale, zero_point = int4.quantize(torch.linspace(-1, 14, 32)[None], 32, symmetric=False)
    assert (scale.item(), zero_point.item()) == (1.0078125, -7)
    assert q[0].tolist()[:5] == [-8, -8, -7, -7, -6]


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_compute_what_their_weights_say(weight_format: WeightFormat, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(48, 512, generator=generator), torch.randn(48, generator=generator)
    stored = quantize_weight("w", weight, weight_format)
    linear = make_linear(weight_format, stored, bias, dtype)
    assert linear.format == weight_format
    exact = dequantize_weight(stored, weight_format, torch.float32)
    for tokens in (1, 5, 16, 17):
        x = torch.randn(2, tokens, 512, generator=generator).to(dtype)
        expected = F.linear(x.float(), exact, bias)
        error = (linear(x).float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
        rounded = 1e-4 if tokens <= 16 else 1e-5  # a few tokens of each text go through kernels of 16 bits
        assert error < (rounded if dtype is torch.float32 else 1e-2)
        assert linear(x).dtype is dtype


@pytest.mark.parametrize("weight_format", [INT8, FORMATS[1], FORMATS[6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_gives_the_same_bits_alone_and_among_others(weight_format: WeightFormat, dtype: torch.dtype) -> None:
    linear = make_linear(weight_format, quantize_weight("w", weights(64, 512), weight_format), None, dtype)
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    alone = torch.cat([linear(x[row : row + 1]) for row in range(16)])
    for count in (2, 5, 16):
        assert torch.equal(linear(x[:count]), alone[:count])


@pytest.mark.parametrize("weight_format", [INT8, FORMATS[1], FORMATS[6]], ids=str)
def test_without_a_compiler_pytorchs_kernels_give_the_same_up_to_bf16(
    weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = quantize_weight("w", weights(64, 512), weight_format)
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    exact = F.linear(x, dequantize_weight(stored, weight_format, torch.float32))
    monkeypatch.setattr("quantize.cpu._library", lambda: None)
    linear = make_linear(weight_format, stored, None, torch.float32)
    assert type(linear.cpu_product).__name__.startswith("Aten")
    assert (linear(x) - exact).norm() / exact.norm() < 1e-2
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


@pytest.mark.parametrize(("rows", "columns"), [(7, 33), (1, 1), (40, 31), (17, 96)])
def test_odd_shapes_fall_back_to_the_definition(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight_format = int4_format(columns, 128, symmetric=False)
    assert weight_format.bits == (4 if columns == 96 else 8)
    stored = quantize_weight("w", weight, weight_format)
    linear = make_linear(weight_format, stored, None, torch.float32)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x, dequantize_weight(stored, weight_format, torch.float32))
    torch.testing.assert_close(linear(x), expected)


def test_a_width_takes_the_largest_group_that_divides_it() -> None:
    def group(columns: int, asked: int) -> int | None:
        return int4_format(columns, asked, symmetric=True).group_size

    assert [group(columns, 256) for columns in (512, 384, 576, 288, 100)] == [256, 128, 64, 32, None]
    assert group(4096, 32) == 32
    assert int4_format(100, 128, symmetric=False) == INT8


def test_a_large_matrix_is_quantized_in_blocks_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(50, 128)
    whole = quantize_weight("w", weight, FORMATS[4])
    monkeypatch.setattr("quantize.linear.BLOCK", 7 * 128)
    blocks = quantize_weight("w", weight, FORMATS[4])
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)
