"""norm_linear: the fused kernel against the reference."""

from collections.abc import Callable

import pytest
import torch

from fastgen.kernels import fused, launch, reference
from fastgen.kernels.launch import Shape
from fastgen.kernels.norm_linear import norm_linear, norm_linear_kernel
from tests.kernels import support
from tests.kernels.support import compiled_ahead, on_gpu

SHAPES = [(96, 64, True), (111, 72, False), (1024, 1000, True), (6144, 4096, False)]


def stage(out: int, width: int, tokens: int, dtype: torch.dtype, device: str, bias: bool = False):
    torch.manual_seed(out + width + tokens)
    x = torch.randn(1, tokens, width, device=device).to(dtype)
    return (
        x,
        support.norm(width, dtype=dtype, device=device),
        support.linear(out, width, bias=bias, dtype=dtype, device=device),
    )


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize(("out", "width", "bias"), SHAPES)
def test_error_is_at_most_twice_torchs(out: int, width: int, bias: bool, tokens: int, dtype: torch.dtype) -> None:
    x, norm, linear = stage(out, width, tokens, dtype, "cuda", bias)
    actual = support.poisoned(fused.norm_linear, x, norm, linear)
    exact = reference.norm_linear(x.double(), support.in_fp64(norm), support.in_fp64(linear))
    support.assert_as_good_as(actual, reference.norm_linear(x, norm, linear), exact, "norm_linear")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "width"), [(111, 72), (512, 256), (4096, 2048), (6144, 4096), (1000, 5000)])
def test_a_token_has_the_same_bits_among_others(out: int, width: int, dtype: torch.dtype) -> None:
    x, norm, linear = stage(out, width, 16, dtype, "cuda")
    together = fused.norm_linear(x, norm, linear)
    for tokens in (1, 2, 3, 4, 8, 13):
        assert torch.equal(fused.norm_linear(x[:, :tokens], norm, linear), together[:, :tokens]), f"{tokens} tokens"


@on_gpu
def test_large_and_small_activations_stay_finite_in_fp16() -> None:
    x, norm, linear = stage(256, 512, 2, torch.float16, "cuda")
    for scale in (1e-3, 1e4):
        scaled = (x.double() * scale).half()
        exact = reference.norm_linear(scaled.double(), support.in_fp64(norm), support.in_fp64(linear))
        y = fused.norm_linear(scaled, norm, linear)
        assert support.distance(y, exact) < 2e-3, f"activations around {scale}"


@on_gpu
def test_compiles_in_one_graph_and_passes_opcheck() -> None:
    x, norm, linear = stage(512, 256, 3, torch.bfloat16, "cuda", True)
    compiled = torch.compile(lambda x: fused.norm_linear(x, norm, linear) * 2, fullgraph=True)
    assert torch.equal(compiled(x), fused.norm_linear(x, norm, linear) * 2)
    torch.library.opcheck(norm_linear, (x, norm.weight, 1e-5, linear.weight, linear.bias))


@compiled_ahead
@pytest.mark.parametrize(("capability", "element"), [(80, "*fp16"), (90, "*bf16")])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_memory_never_idles(tokens: int, capability: int, element: str, assert_streams: Callable[..., None]) -> None:
    assert_streams(norm_linear_kernel, "norm_linear", tokens, capability, element)


@compiled_ahead
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_on_the_machine_it_is_as_good_as_torch_with_the_same_bits_for_any_tokens(
    dtype: torch.dtype, on_machine: Callable[..., None]
) -> None:
    x, norm, linear = stage(107, 1032, 16, dtype, "cpu", True)
    exact = reference.norm_linear(x.double(), support.in_fp64(norm), support.in_fp64(linear))
    together = fused_on_cpu(x, norm, linear)
    support.assert_as_good_as(together, reference.norm_linear(x, norm, linear), exact, "norm_linear")
    for tokens, shape in ((5, Shape(1, 1, 1, 40)), (1, Shape(1, 1, 1, 40)), (1, Shape(2, 1, 5, 0))):
        on_machine(shape)
        some = fused_on_cpu(x[:, :tokens], norm, linear)
        assert torch.equal(some, together[:, :tokens]), f"{tokens} tokens"


@compiled_ahead
@pytest.mark.parametrize("tokens", [1, 16])
def test_on_the_machine_large_and_small_activations_stay_finite_in_fp16(
    tokens: int, on_machine: Callable[..., None]
) -> None:
    x, norm, linear = stage(75, 1032, tokens, torch.float16, "cpu", True)
    on_machine(Shape(1, 1, 5, 0) if tokens == 1 else Shape(1, 1, 2, 0))
    for scale in (1e-3, 1e4):
        scaled = (x.double() * scale).half()
        exact = reference.norm_linear(scaled.double(), support.in_fp64(norm), support.in_fp64(linear))
        assert support.distance(fused_on_cpu(scaled, norm, linear), exact) < 1e-3, f"activations around {scale}"
    norm.eps = 1e-12  # the scale of tiny activations is more than fp16 has
    scaled = (x.double() * 6e-6).half()
    exact = reference.norm_linear(scaled.double(), support.in_fp64(norm), support.in_fp64(linear))
    assert support.distance(fused_on_cpu(scaled, norm, linear), exact) < 1e-3
    nothing = torch.zeros_like(x)
    assert torch.equal(fused_on_cpu(nothing, norm, linear), reference.norm_linear(nothing, norm, linear))


@compiled_ahead
def test_on_the_machine_whoever_claims_rows_they_have_the_same_bits(on_machine: Callable[..., None]) -> None:
    x, norm, linear = stage(400, 264, 1, torch.bfloat16, "cpu", True)
    shape = Shape(2, 1, 1, 40)
    assert launch.fitted(shape, linear.weight, 1, 400).claims is not None
    on_machine(shape)
    expected = fused_on_cpu(x, norm, linear)
    for _ in range(5):  # each in an order of its own
        assert torch.equal(fused_on_cpu(x, norm, linear), expected)
        assert not launch.workspace(torch.device("cpu")).any(), "the last to claim leaves 0"


@compiled_ahead
def test_on_the_machine_without_dependent_launch(on_machine: Callable[..., None]) -> None:
    x, norm, linear = stage(75, 1032, 1, torch.bfloat16, "cpu", True)
    on_machine(Shape(1, 1, 5, 0))
    expected = fused_on_cpu(x, norm, linear)
    on_machine(Shape(1, 1, 5, 0), dependent=False)
    assert torch.equal(fused_on_cpu(x, norm, linear), expected)


def fused_on_cpu(x: torch.Tensor, norm: torch.nn.RMSNorm, linear: torch.nn.Linear) -> torch.Tensor:
    """What `fused.norm_linear` does on a GPU."""
    return norm_linear(x, norm.weight, norm.eps, linear.weight, linear.bias)
