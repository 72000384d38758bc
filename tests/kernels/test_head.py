"""head and greedy_head: fp32 logits, and the token of the largest, against the reference."""

import pytest
import torch

from fastgen.kernels import fused, reference
from fastgen.kernels.head import greedy_head, greedy_head_kernel, head, pick_token_kernel
from tests.kernels import support
from tests.kernels.support import compile_ahead, compiled_ahead, in_interpreter, on_gpu

ARGUMENTS = {
    "x": "*bf16", "norm": "*bf16", "weight": "*bf16", "best": "*fp32", "ids": "*i32", "tokens": "i32", "n": "i32",
    "eps": "fp32",
}  # fmt: skip
CONSTANTS = {"bias": None, "K": 4096, "ROWS": 16, "SPLITS": 4, "BLOCK": 128, "SCALE_FIRST": False, "STAGES": 4}


def stage(vocabulary: int, width: int, tokens: int, dtype: torch.dtype, device: str, bias: bool = False):
    torch.manual_seed(vocabulary + width + tokens)
    x = torch.randn(tokens, width, device=device).to(dtype)
    linear = support.linear(vocabulary, width, bias=bias, dtype=dtype, device=device)
    return x, support.norm(width, dtype=dtype, device=device), linear


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize(("vocabulary", "width", "bias"), [(258, 64, True), (1001, 63, False), (32000, 4096, False)])
def test_logits_are_as_good_as_torchs(vocabulary: int, width: int, bias: bool, tokens: int, dtype: torch.dtype) -> None:
    x, norm, linear = stage(vocabulary, width, tokens, dtype, "cuda", bias)
    actual = support.poisoned(fused.head, x, norm, linear)
    assert actual.dtype is torch.float32
    exact = linear_in_fp64(x, norm, linear)
    support.assert_as_good_as(actual, reference.head(x, norm, linear), exact, "head")


@on_gpu
@pytest.mark.parametrize("vocabulary", [258, 1001, 128256])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_greedy_head_gives_the_first_largest_logit(tokens: int, vocabulary: int) -> None:
    x, norm, linear = stage(vocabulary, 256, tokens, torch.bfloat16, "cuda")
    linear.weight[vocabulary // 2 :] = linear.weight[: vocabulary - vocabulary // 2].clone()
    expected = fused.head(x, norm, linear).max(-1)
    assert torch.equal(fused.greedy_head(x, norm, linear), expected.indices.clamp(max=vocabulary // 2 - 1))


@on_gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_greedy_head_names_no_token_where_a_logit_is_not_finite(value: float) -> None:
    x, norm, linear = stage(1001, 256, 3, torch.bfloat16, "cuda", True)
    linear.bias[700] = value
    assert fused.greedy_head(x, norm, linear).tolist() == [-1, -1, -1]


@on_gpu
def test_compile_in_one_graph_and_pass_opcheck() -> None:
    x, norm, linear = stage(512, 256, 3, torch.bfloat16, "cuda", True)
    compiled = torch.compile(lambda x: fused.head(x, norm, linear).argmax(-1), fullgraph=True)
    assert torch.equal(compiled(x), fused.greedy_head(x, norm, linear))
    for op in (head, greedy_head):
        torch.library.opcheck(op, (x, norm.weight, 1e-5, linear.weight, linear.bias))


@compiled_ahead
@pytest.mark.parametrize(("capability", "pdl"), support.TARGETS)
def test_compile_without_a_gpu(capability: int, pdl: bool) -> None:
    constants = CONSTANTS | {"TOKENS": 1, "PDL": pdl, "EARLY": True}
    ttgir = compile_ahead(greedy_head_kernel, capability, ARGUMENTS, constants, ones=("tokens",))
    if pdl:
        support.assert_waits_between(ttgir)
    arguments = {"best": "*fp32", "ids": "*i32", "out": "*i64", "blocks": "i32"}
    compile_ahead(pick_token_kernel, capability, arguments, {"WIDTH": 1024, "PDL": pdl})


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_agree_with_the_reference_in_the_interpreter(tokens: int, dtype: torch.dtype) -> None:
    x, norm, linear = stage(70, 80, tokens, dtype, "cpu", True)
    arguments = (x, norm.weight, 1e-5, linear.weight, linear.bias)
    exact = linear_in_fp64(x, norm, linear)
    assert support.distance(head(*arguments), exact) < (1e-6 if dtype is torch.float32 else 1e-3)
    assert greedy_head(*arguments).tolist() == exact.argmax(-1).tolist()
    linear.bias[5] = float("nan")
    assert greedy_head(*arguments).tolist() == [-1] * tokens


def linear_in_fp64(x: torch.Tensor, norm: torch.nn.RMSNorm, linear: torch.nn.Linear) -> torch.Tensor:
    """The logits in fp64; `reference.head` would round them to fp32."""
    return reference.norm_linear(x.double(), support.in_fp64(norm), support.in_fp64(linear))
