"""The layout of int4 and int8 weights in GPU memory: golden bytes, and back to what was packed."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastgen.kernels.packed import Form, PackedLinear, form_of, pack_int4, pack_int8, unpack
from quantize import int4, int8
from tests.kernels.support import INTERPRETED, in_interpreter, on_gpu

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(16, 128, 128), (40, 96, 32), (111, 192, 64), (24, 512, 256), (256, 1024, 128)]


def random_int4(out: int, width: int, group: int, zeros: bool) -> tuple[PackedLinear, torch.Tensor]:
    """A linear, and its weights."""
    torch.manual_seed(out + width)
    weight = torch.randn(out, width, device=DEVICE)
    q, scale, zero_point = int4.quantize(weight, group, symmetric=not zeros, scale_dtype=torch.float16)
    stored = int4.pack(q)
    exact = int4.dequantize(stored, scale.float(), zero_point, torch.float32)
    return pack_int4(stored, scale, zero_point, None), exact


def random_int8(out: int, width: int) -> tuple[PackedLinear, torch.Tensor]:
    """A linear, and its weights."""
    torch.manual_seed(out + width)
    q, scale = int8.quantize(torch.randn(out, width, device=DEVICE), torch.float16)
    return pack_int8(q, scale, None), int8.dequantize(q, scale.float(), torch.float32)


def weights_of(linear: PackedLinear) -> torch.Tensor:
    return unpack(linear.words, linear.scales, linear.out_features, linear.in_features, linear.dtype)


def check_golden_bytes() -> None:
    """Weight (row, column) holds (row + column) mod 16 in a tile of 16 x 128; the module's docstring gives the rest."""
    row, column = torch.arange(16, device=DEVICE)[:, None], torch.arange(128, device=DEVICE)
    q = ((row + column) % 16 - 8).to(torch.int8)
    scale = torch.arange(1, 17, device=DEVICE, dtype=torch.float16)[:, None]
    zero_point = torch.arange(-8, 8, device=DEVICE, dtype=torch.int8)[:, None]
    linear = pack_int4(int4.pack(q), scale, zero_point, None)
    assert linear.words.shape == (1, 1, 256) and linear.scales.shape == (1, 1, 8 + 4)
    words, tail = linear.words[0, 0].cpu().view(2, 32, 4), linear.scales[0, 0].cpu()
    # Lane 0: columns 0 to 3, row 0 in the low four bits of a byte, row 8 in the high four.
    assert words[0, 0, 0].item() & 0xFFFFFFFF == 0xB3A29180
    # Lane 6 is g = 1, t = 2, word 3 of part 1: columns 64 + 32 + 16 + 4 .. + 7 of rows 1 and 9.
    assert words[1, 6, 3].item() & 0xFFFFFFFF == 0x08F7E6D5
    scales = tail[:8].view(torch.float16).tolist()
    assert scales[:4] == [1.0, 9.0, 2.0, 10.0] and scales[-1] == 16.0
    assert tail[8:].view(torch.uint8).tolist() == [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7] + [0] * 8
    linear = pack_int8(q * 16 + 5, scale, None)
    # Row 8 of the tile, part 1, lane 1, word 2: columns 64 + 32 + 8 .. + 3 of the second half.
    assert linear.words.shape == (1, 1, 512)
    word = linear.words[0, 0].cpu().view(2, 2, 32, 4)[1, 1, 1, 2].item()
    assert [word >> 8 * i & 255 for i in range(4)] == [((8 + 104 + i) % 16 - 8) * 16 + 5 & 255 for i in range(4)]
    assert linear.scales.cpu().view(torch.float16).flatten().tolist()[:4] == [1.0, 9.0, 2.0, 10.0]


def check_every_byte_of_many_tiles() -> None:
    """A matrix of 24 x 192, groups of 64, as the module's docstring has it: two tiles, two units, filled with zeros."""
    torch.manual_seed(0)
    q = torch.randint(-8, 8, (24, 192), dtype=torch.int8, device=DEVICE)
    scale = torch.rand(24, 3, device=DEVICE, dtype=torch.float16)
    zero_point = torch.randint(-8, 8, (24, 3), dtype=torch.int8, device=DEVICE)
    linear = pack_int4(int4.pack(q), scale, zero_point, None)
    assert linear.words.shape == (2, 2, 256) and linear.scales.shape == (2, 2, 2 * 8 + 2 * 2)
    weights, scales, zeros = (
        F.pad(q + 8, (0, 64, 0, 8)),
        F.pad(scale, (0, 1, 0, 8)),
        F.pad(zero_point + 8, (0, 1, 0, 8)),
    )
    found, tails = linear.words.cpu().view(torch.uint8).view(2, 2, 2, 8, 4, 4, 4), linear.scales.cpu()
    for tile, unit, g in itertools.product(range(2), range(2), range(8)):
        low, high = 8 * tile + g, 16 + 8 * tile + g
        for c, t, i, byte in itertools.product(range(2), range(4), range(4), range(4)):
            k = 128 * unit + 64 * c + 32 * (i // 2) + 8 * t + 4 * (i % 2) + byte
            assert found[tile, unit, c, g, t, i, byte] == weights[low, k].item() | weights[high, k].item() << 4
        tail = tails[tile, unit]
        for group in range(2):
            place, of_unit = 16 * group + 2 * g, 2 * unit + group
            assert tail[:16].view(torch.float16)[place] == scales[low, of_unit].item()
            assert tail[:16].view(torch.float16)[place + 1] == scales[high, of_unit].item()
            both = zeros[low, of_unit].item() | zeros[high, of_unit].item() << 4
            assert tail[16:].view(torch.uint8)[8 * group + g] == both


def check_round_trip(out: int, width: int, group: int) -> None:
    for zeros in (False, True):
        linear, exact = random_int4(out, width, group, zeros)
        assert torch.equal(weights_of(linear), exact.half()), f"int4, zero points {zeros}"
    linear, exact = random_int8(out, width)
    assert torch.equal(weights_of(linear), exact.half()), "int8"


def test_every_form_has_sizes_of_its_own() -> None:
    forms = [Form(1, groups, zeros) for groups in (1, 2, 4) for zeros in (False, True)]
    sizes = [8 * form.groups + (max(4, 2 * form.groups) if form.zeros else 0) for form in forms]
    assert [form_of(torch.empty(1, 1, 256), torch.empty(1, 1, size)) for size in sizes] == forms
    assert form_of(torch.empty(1, 1, 512), torch.empty(1, 8)) == Form(2, 0, False)


@in_interpreter
def test_golden_bytes_in_the_interpreter() -> None:
    check_golden_bytes()


@in_interpreter
def test_every_byte_of_many_tiles_in_the_interpreter() -> None:
    check_every_byte_of_many_tiles()


@in_interpreter
@pytest.mark.parametrize(("out", "width", "group"), SHAPES[:4])
def test_packed_weights_come_back_in_the_interpreter(out: int, width: int, group: int) -> None:
    check_round_trip(out, width, group)


@on_gpu
def test_golden_bytes() -> None:
    check_golden_bytes()


@on_gpu
def test_every_byte_of_many_tiles() -> None:
    check_every_byte_of_many_tiles()


@on_gpu
@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
def test_packed_weights_come_back(out: int, width: int, group: int) -> None:
    check_round_trip(out, width, group)


@on_gpu
def test_many_tokens_are_unpacked_and_multiplied() -> None:
    linear, exact = random_int4(256, 1024, 128, True)
    x = torch.randn(3, 40, 1024, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, exact.half()))
