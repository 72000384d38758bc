"""linear_add: the fused kernel against the reference."""

from collections.abc import Callable

import pytest
import torch

from fastgen.kernels import fused, reference
from fastgen.kernels.launch import Shape
from fastgen.kernels.linear_add import linear_add, linear_add_kernel, partial_linear
from tests.kernels import support
from tests.kernels.support import compiled_ahead, on_gpu

SHAPES = [(64, 96, True), (63, 120, False), (1000, 1024, True), (4096, 11008, False)]


def stage(out: int, width: int, tokens: int, dtype: torch.dtype, device: str, bias: bool = False):
    torch.manual_seed(out + width + tokens)
    x = torch.randn(1, tokens, width, device=device).to(dtype)
    residual = torch.randn(1, tokens, out, device=device).to(dtype)
    return x, support.linear(out, width, bias=bias, dtype=dtype, device=device), residual


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize(("out", "width", "bias"), SHAPES)
def test_error_is_at_most_twice_torchs(out: int, width: int, bias: bool, tokens: int, dtype: torch.dtype) -> None:
    x, linear, residual = stage(out, width, tokens, dtype, "cuda", bias)
    actual = support.poisoned(fused.linear_add, x, linear, residual)
    exact = reference.linear_add(x.double(), support.in_fp64(linear), residual.double())
    support.assert_as_good_as(actual, reference.linear_add(x, linear, residual), exact, "linear_add")


@on_gpu
@pytest.mark.parametrize(("out", "width"), [(63, 120), (256, 512), (2048, 2048), (4096, 11008)])
def test_a_token_has_the_same_bits_among_others(out: int, width: int) -> None:
    x, linear, residual = stage(out, width, 16, torch.bfloat16, "cuda")
    together = fused.linear_add(x, linear, residual)
    for tokens in (1, 2, 3, 4, 8, 13):
        alone = fused.linear_add(x[:, :tokens], linear, residual[:, :tokens])
        assert torch.equal(alone, together[:, :tokens]), f"{tokens} tokens"


@on_gpu
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_a_part_of_a_sum_is_not_rounded(tokens: int) -> None:
    x, linear, _ = stage(4096, 2752, tokens, torch.bfloat16, "cuda", True)
    actual = support.poisoned(fused.partial_linear, x, linear)
    assert actual.dtype is torch.float32
    assert support.distance(actual, reference.partial_linear(x.double(), support.in_fp64(linear))) < 1e-5


@on_gpu
def test_compiles_in_one_graph_and_passes_opcheck() -> None:
    x, linear, residual = stage(512, 256, 3, torch.bfloat16, "cuda", True)
    compiled = torch.compile(lambda x: fused.linear_add(x, linear, residual) * 2, fullgraph=True)
    assert torch.equal(compiled(x), fused.linear_add(x, linear, residual) * 2)
    torch.library.opcheck(linear_add, (x, linear.weight, linear.bias, residual))


@compiled_ahead
@pytest.mark.parametrize(("capability", "element"), [(80, "*fp16"), (90, "*bf16")])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_memory_never_idles(tokens: int, capability: int, element: str, assert_streams: Callable[..., None]) -> None:
    assert_streams(linear_add_kernel, "linear_add", tokens, capability, element)


@compiled_ahead
def test_on_the_machine_it_is_as_good_as_torch_with_the_same_bits_for_any_tokens(
    on_machine: Callable[..., None],
) -> None:
    x, linear, residual = stage(107, 584, 16, torch.bfloat16, "cpu", True)
    exact = reference.linear_add(x.double(), support.in_fp64(linear), residual.double())
    together = linear_add(x, linear.weight, linear.bias, residual)
    support.assert_as_good_as(together, reference.linear_add(x, linear, residual), exact, "linear_add")
    for tokens, shape in ((9, Shape(1, 2, 1, 0)), (5, Shape(1, 1, 1, 40)), (1, Shape(1, 2, 3, 0))):
        on_machine(shape)
        some = linear_add(x[:, :tokens], linear.weight, linear.bias, residual[:, :tokens])
        assert torch.equal(some, together[:, :tokens]), f"{tokens} tokens"


@compiled_ahead
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float16), (5, torch.bfloat16)])
def test_on_the_machine_a_part_of_a_sum_is_not_rounded(
    tokens: int, dtype: torch.dtype, on_machine: Callable[..., None]
) -> None:
    x, linear, _ = stage(40, 584, tokens, dtype, "cpu", True)
    actual = partial_linear(x, linear.weight, linear.bias)
    assert actual.dtype is torch.float32
    assert support.distance(actual, reference.partial_linear(x.double(), support.in_fp64(linear))) < 1e-6
