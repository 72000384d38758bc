"""The kernels for few tokens on CPUs: within the rounding of activations that they state, whatever the activations."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantize import cpu
from quantize.format import INT8, WeightFormat
from quantize.linear import dequantize_weight, make_linear, quantize_weight

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

ROWS = 24
HALF_STEP = 0.5 / 32767  # of the largest activation of a step
WIDTHS = (32, 96, 128, 160, 384, 1056)
FORMATS = [(INT8, width, 128 if width % 128 == 0 else 32) for width in WIDTHS] + [
    (WeightFormat(bits=4, group_size=group, symmetric=symmetric), width, max(group, 64))
    for group, width in ((32, 64), (32, 448), (64, 192), (128, 128), (128, 640), (256, 256), (256, 768))
    for symmetric in (True, False)
]
KINDS = pytest.mark.parametrize(("weight_format", "columns", "step"), FORMATS, ids=str)


def linear_of(weight_format: WeightFormat, columns: int) -> tuple[nn.Module, Tensor]:
    """A linear of random weights, and the weights [out, in] in float64 that it stands for."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(ROWS, columns, generator=generator) + torch.linspace(-1, 1, ROWS)[:, None]
    stored = quantize_weight("w", weight, weight_format)
    linear = make_linear(weight_format, stored, None, torch.float32)
    assert type(linear.cpu_product).__name__.startswith("Native")
    return linear, dequantize_weight(stored, weight_format, torch.float32).double()


def activations(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def bound(x: Tensor, weight: Tensor, step: int) -> Tensor:
    """How far [tokens, out] may lie from the exact product: half a step of 16 bits each, and sums in fp32."""
    steps = x.double().abs().unflatten(1, (-1, step)).amax(2, keepdim=True).expand(-1, -1, step).flatten(1)
    return (HALF_STEP * steps + 4e-7 * (x.double().abs() + steps / 16)) @ weight.abs().T


@KINDS
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 70])
def test_products_are_within_half_a_step_of_16_bits(
    weight_format: WeightFormat, columns: int, step: int, tokens: int
) -> None:
    linear, weight = linear_of(weight_format, columns)
    x = activations(tokens, columns)
    assert ((linear(x).double() - x.double() @ weight.T).abs() <= bound(x, weight, step)).all()


@KINDS
def test_outliers_and_tiny_activations_keep_to_the_same_bound(
    weight_format: WeightFormat, columns: int, step: int
) -> None:
    linear, weight = linear_of(weight_format, columns)
    x = activations(5, columns)
    x[1, 3], x[2, -1], x[3] = 1e30, -1e4, x[3] * 1e-30
    assert ((linear(x).double() - x.double() @ weight.T).abs() <= bound(x, weight, step)).all()


@KINDS
def test_zeros_and_what_is_next_to_zero_give_zero(weight_format: WeightFormat, columns: int, step: int) -> None:
    linear, _ = linear_of(weight_format, columns)
    x = torch.zeros(3, columns)
    x[1], x[2, 1] = 1e-37, -1e-42
    assert (linear(x).abs() < 1e-30).all()
    x[0, 7] = 2.0
    assert torch.equal(linear(x)[0], linear(x[:1])[0]) and linear(x)[0].any()


@KINDS
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [0, 17, -1])
def test_an_activation_that_is_not_finite_is_never_lost(
    weight_format: WeightFormat, columns: int, step: int, value: float, place: int
) -> None:
    linear, _ = linear_of(weight_format, columns)
    x = activations(5, columns)
    clean = linear(x)
    x[3, place] = value
    spoilt = linear(x)
    assert not spoilt[3].isfinite().any()
    others = [0, 1, 2, 4]
    assert torch.equal(spoilt[others], clean[others])
    assert not linear(x[3:4]).isfinite().any()


@KINDS
def test_without_avx2_the_bits_are_the_same(
    weight_format: WeightFormat, columns: int, step: int, plain_library: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, _ = linear_of(weight_format, columns)
    x = activations(5, columns)
    expected = linear(x)
    monkeypatch.setattr("quantize.cpu._library", lambda: plain_library)
    assert torch.equal(linear(x), expected)


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The kernels as they are compiled for a processor without AVX2."""
    cache: Path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr("quantize.cpu.FLAGS", tuple(flag for flag in cpu.FLAGS if flag != "-march=native"))
        library = cpu._library.__wrapped__()
    assert library is not None and len(list(cache.glob("fastgen/*.so"))) == 1
    return library


def test_the_default_dtype_does_not_change_a_product() -> None:
    linear, _ = linear_of(INT8, 128)
    x = activations(2, 128)
    expected = linear(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(linear(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@KINDS
def test_a_token_has_the_same_bits_among_others_of_its_text_and_beside_whatever_texts(
    weight_format: WeightFormat, columns: int, step: int
) -> None:
    linear, _ = linear_of(weight_format, columns)
    x = activations(20 * 16, columns).view(20, 16, columns)
    together = linear(x)
    assert torch.equal(linear(x[:, :1]), together[:, :1])
    assert torch.equal(linear(x[:, 0]), together[:, 0])
    assert torch.equal(linear(x[3:4, 5:7]), together[3:4, 5:7])
