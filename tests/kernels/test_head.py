"""head and greedy_head: fp32 logits, and the token of the largest, against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgen.kernels import fused, reference
from fastgen.kernels.head import REGISTERS, greedy_head, greedy_head_kernel, head, pick_token_kernel
from fastgen.kernels.launch import Shape
from tests.kernels import support
from tests.kernels.machine import OnMachine
from tests.kernels.support import compile_ahead, compiled_ahead, on_gpu


def stage(vocabulary: int, width: int, tokens: int, dtype: torch.dtype, device: str, bias: bool = False):
    torch.manual_seed(vocabulary + width + tokens)
    x = torch.randn(tokens, width, device=device).to(dtype)
    linear = support.linear(vocabulary, width, bias=bias, dtype=dtype, device=device)
    return x, support.norm(width, dtype=dtype, device=device), linear


def tie(linear: torch.nn.Linear) -> torch.Tensor:
    """Make rows of a linear equal that are 1, 8 and half of all rows apart; return the first of each row's equals."""
    rows = torch.arange(linear.out_features, device=linear.weight.device)
    first = rows % (linear.out_features // 2) & ~9
    for parameter in linear.parameters():
        parameter.copy_(parameter[first])
    return first


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize(("vocabulary", "width", "bias"), [(258, 64, True), (1001, 72, False), (32000, 4096, False)])
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
    first = tie(linear)
    assert torch.equal(fused.greedy_head(x, norm, linear), first[fused.head(x, norm, linear).argmax(-1)])


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
@pytest.mark.parametrize(("capability", "element"), [(80, "*fp16"), (90, "*bf16")])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_memory_never_idles(tokens: int, capability: int, element: str, assert_streams: Callable[..., None]) -> None:
    assert_streams(greedy_head_kernel, "head", tokens, capability, element, maxnreg=REGISTERS)


@compiled_ahead
@pytest.mark.parametrize(("capability", "pdl"), support.TARGETS)
def test_the_second_kernel_compiles_without_a_gpu_and_lets_nobody_start_early(capability: int, pdl: bool) -> None:
    arguments = {"best": "*fp32", "ids": "*i32", "out": "*i64", "blocks": "i32"}
    code = compile_ahead(pick_token_kernel, capability, arguments, {"WIDTH": 1024, "PDL": pdl}).asm["ptx"]
    assert "griddepcontrol.launch_dependents" not in code
    assert ("griddepcontrol.wait" in code) is pdl


@compiled_ahead
def test_on_the_machine_the_lowest_of_equal_tokens_wins_in_whichever_tile_it_stands() -> None:
    tiles, width = 2100, 1024
    ties = [(7, 8), (width - 1, width), (5, 5 + width), (5, 5 + width, 5 + 2 * width)]
    cases = [(places, lowest) for places in ties for lowest in places]
    best, ids = torch.rand(len(cases), tiles), torch.arange(100, 100 + tiles, dtype=torch.int32).repeat(len(cases), 1)
    for case, (places, lowest) in enumerate(cases):
        best[case, list(places)], ids[case, lowest] = 2.0, 1 + case
    out = torch.empty(len(cases), dtype=torch.int64)
    OnMachine(pick_token_kernel)[(len(cases),)](best, ids, out, tiles, WIDTH=width, PDL=True, launch_pdl=True)
    assert out.tolist() == list(range(1, 1 + len(cases)))


@compiled_ahead
def test_on_the_machine_logits_are_fp32(on_machine: Callable[..., None]) -> None:
    x, norm, linear = stage(77, 72, 5, torch.float16, "cpu", True)
    actual = head(x, norm.weight, 1e-5, linear.weight, linear.bias)
    assert actual.dtype is torch.float32
    assert support.distance(actual, linear_in_fp64(x, norm, linear)) < 5e-4


@compiled_ahead
@pytest.mark.parametrize(("tokens", "width", "tiles"), [(1, 72, 1), (5, 512, 1), (16, 512, 2)])
def test_on_the_machine_greedy_head_gives_the_first_largest_logit_or_none(
    tokens: int, width: int, tiles: int, on_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(Shape(1, tiles, 1, 40 if tokens == 1 else 0))
    x, norm, linear = stage(77, width, tokens, torch.bfloat16, "cpu", True)
    first = tie(linear)
    arguments = (x, norm.weight, 1e-5, linear.weight, linear.bias)
    top, empty = linear_in_fp64(x, norm, linear).argmax(-1), torch.empty

    def largest(*sizes: int, **named: Any) -> torch.Tensor:
        """What nobody writes is then the largest logit; a NaN would be passed over."""
        made = empty(*sizes, **named)
        return made.fill_(float("inf")) if made.dtype is torch.float32 else made

    monkeypatch.setattr(torch, "empty", largest)
    assert torch.equal(greedy_head(*arguments), first[top])
    x[tokens // 2, 3] = float("nan")
    assert greedy_head(*arguments).lt(0).nonzero()[:, 0].tolist() == [tokens // 2]
    linear.bias[50] = float("inf")
    assert greedy_head(*arguments).tolist() == [-1] * tokens


def linear_in_fp64(x: torch.Tensor, norm: torch.nn.RMSNorm, linear: torch.nn.Linear) -> torch.Tensor:
    """The logits in fp64; `reference.head` would round them to fp32."""
    return reference.norm_linear(x.double(), support.in_fp64(norm), support.in_fp64(linear))
