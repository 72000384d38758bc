"""norm_swiglu: the fused kernel against the reference."""

import pytest
import torch

from fastgen.kernels import fused, reference
from fastgen.kernels.norm_swiglu import norm_swiglu, norm_swiglu_kernel
from tests.kernels import support
from tests.kernels.support import compile_ahead, compiled_ahead, in_interpreter, on_gpu

ARGUMENTS = {
    "x": "*bf16", "norm": "*bf16", "weight": "*bf16", "out": "*bf16", "tokens": "i32", "n": "i32", "eps": "fp32",
}  # fmt: skip
CONSTANTS = {"bias": None, "K": 4096, "ROWS": 16, "SPLITS": 4, "BLOCK": 128, "SCALE_FIRST": False, "STAGES": 4}
SHAPES = [(96, 64, True), (111, 63, False), (1000, 1024, True), (11008, 4096, False)]


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
@pytest.mark.parametrize(("out", "width"), [(111, 63), (512, 256), (8192, 2048), (11008, 4096)])
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
@pytest.mark.parametrize(("capability", "pdl"), support.TARGETS)
@pytest.mark.parametrize("tokens", [1, 16])
def test_compiles_without_a_gpu(tokens: int, capability: int, pdl: bool) -> None:
    constants = CONSTANTS | {"TOKENS": tokens, "PDL": pdl, "EARLY": True}
    ttgir = compile_ahead(norm_swiglu_kernel, capability, ARGUMENTS, constants, ones=("tokens",) if tokens == 1 else ())
    support.assert_one_order(ttgir)
    if pdl:
        support.assert_waits_between(ttgir)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_agrees_with_the_reference_in_the_interpreter(tokens: int, dtype: torch.dtype) -> None:
    x, norm, gate_up = stage(44, 80, tokens, dtype, "cpu", True)
    actual = norm_swiglu(x, norm.weight, 1e-5, gate_up.weight, gate_up.bias)
    exact = reference.norm_swiglu(x.double(), support.in_fp64(norm), support.in_fp64(gate_up))
    assert support.distance(actual, exact) < (1e-6 if dtype is torch.float32 else 2e-3)
