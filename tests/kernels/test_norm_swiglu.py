"""norm_swiglu: the fused kernel against the reference."""

from collections.abc import Callable

import pytest
import torch

from fastgen.kernels import fused, reference
from fastgen.kernels.launch import Shape
from fastgen.kernels.norm_swiglu import norm_swiglu, norm_swiglu_kernel
from tests.kernels import support
from tests.kernels.support import compiled_ahead, on_gpu

SHAPES = [(96, 64, True), (111, 72, False), (1000, 1024, True), (11008, 4096, False)]


def stage(out: int, width: int, tokens: int, dtype: torch.dtype, device: str, bias: bool = False):
    torch.manual_seed(out + width + tokens)
    x = torch.randn(1, tokens, width, device=device).to(dtype)
    gate_up = support.linear(2 * out, width, bias=bias, dtype=dtype, device=device)
    return x, support.norm(width, dtype=dtype, device=device), gate_up


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize(("out", "width", "bias"), SHAPES)
def test_error_is_at_most_twice_torchs(out: int, width: int, bias: bool, tokens: int, dtype: torch.dtype) -> None:
    x, norm, gate_up = stage(out, width, tokens, dtype, "cuda", bias)
    actual = support.poisoned(fused.norm_swiglu, x, norm, gate_up)
    exact = reference.norm_swiglu(x.double(), support.in_fp64(norm), support.in_fp64(gate_up))
    support.assert_as_good_as(actual, reference.norm_swiglu(x, norm, gate_up), exact, "norm_swiglu")


@on_gpu
@pytest.mark.parametrize(("out", "width"), [(111, 72), (512, 256), (8192, 2048), (11008, 4096)])
def test_a_token_has_the_same_bits_among_others(out: int, width: int) -> None:
    x, norm, gate_up = stage(out, width, 16, torch.bfloat16, "cuda")
    together = fused.norm_swiglu(x, norm, gate_up)
    for tokens in (1, 2, 3, 4, 8, 13):
        assert torch.equal(fused.norm_swiglu(x[:, :tokens], norm, gate_up), together[:, :tokens]), f"{tokens} tokens"


@on_gpu
def test_compiles_in_one_graph_and_passes_opcheck() -> None:
    x, norm, gate_up = stage(512, 256, 3, torch.bfloat16, "cuda", True)
    compiled = torch.compile(lambda x: fused.norm_swiglu(x, norm, gate_up) * 2, fullgraph=True)
    assert torch.equal(compiled(x), fused.norm_swiglu(x, norm, gate_up) * 2)
    torch.library.opcheck(norm_swiglu, (x, norm.weight, 1e-5, gate_up.weight, gate_up.bias))


@compiled_ahead
@pytest.mark.parametrize(("capability", "element"), [(80, "*fp16"), (90, "*bf16")])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_memory_never_idles(tokens: int, capability: int, element: str, assert_streams: Callable[..., None]) -> None:
    assert_streams(norm_swiglu_kernel, "norm_swiglu", tokens, capability, element)


@compiled_ahead
def test_on_the_machine_it_is_as_good_as_torch_with_the_same_bits_for_any_tokens(
    on_machine: Callable[..., None],
) -> None:
    x, norm, gate_up = stage(53, 2120, 16, torch.bfloat16, "cpu", True)
    exact = reference.norm_swiglu(x.double(), support.in_fp64(norm), support.in_fp64(gate_up))
    together = norm_swiglu(x, norm.weight, 1e-5, gate_up.weight, gate_up.bias)
    support.assert_as_good_as(together, reference.norm_swiglu(x, norm, gate_up), exact, "norm_swiglu")
    for tokens, shape in ((5, Shape(1, 1, 2, 0)), (1, Shape(1, 1, 1, 40))):
        on_machine(shape)
        some = norm_swiglu(x[:, :tokens], norm.weight, 1e-5, gate_up.weight, gate_up.bias)
        assert torch.equal(some, together[:, :tokens]), f"{tokens} tokens"


@compiled_ahead
def test_on_the_machine_it_is_as_good_as_torch_in_fp16(on_machine: Callable[..., None]) -> None:
    x, norm, gate_up = stage(37, 520, 5, torch.float16, "cpu")
    exact = reference.norm_swiglu(x.double(), support.in_fp64(norm), support.in_fp64(gate_up))
    actual = norm_swiglu(x, norm.weight, 1e-5, gate_up.weight, gate_up.bias)
    support.assert_as_good_as(actual, reference.norm_swiglu(x, norm, gate_up), exact, "norm_swiglu")
