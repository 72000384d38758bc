"""int4 and int8 weights in the kernels that pack and stream them, on `machine`: against fp64, the same bits."""

from typing import Any

import numpy as np
import pytest
import torch

from fastgen.kernels import launch, packed_linear
from fastgen.kernels.packed import PackedLinear, form_of, pack_int4, pack_int8
from quantize import int4, int8
from tests.kernels import support
from tests.kernels.machine import Threads
from tests.kernels.support import compiled_ahead


def linear(
    out: int, width: int, form: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[PackedLinear, torch.Tensor]:  # fmt: skip
    """A quantized linear in `dtype`, and its weights in fp64."""
    weight, bias = torch.randn(out, width) * width**-0.5, torch.randn(out).to(dtype)
    if form == "int8":
        q, scale = int8.quantize(weight, dtype)
        return pack_int8(q, scale, bias), q.double() * scale.double().view(out, 1)
    group, symmetric = int(form.partition(" ")[0][1:]), "zeros" not in form
    q, scale, zero_point = int4.quantize(weight, group, symmetric=symmetric, scale_dtype=dtype)
    zero = 0 if zero_point is None else zero_point[..., None].double()
    exact = (q.view(out, -1, group) - zero) * scale[..., None].double()
    return pack_int4(int4.pack(q), scale, zero_point, bias), exact.view(out, width)


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
@pytest.mark.parametrize(
    ("form", "width", "dtype", "processors", "early"),
    [
        ("int8", 640, torch.bfloat16, 2, 4), ("g128 zeros", 2304, torch.bfloat16, 2, 1 / 4),
        ("g32 zeros", 1248, torch.float16, 2, 1 / 4), ("int8", 640, torch.float16, 1, 4),
        ("g128", 1152, torch.bfloat16, 1, 4), ("g128", 1152, torch.bfloat16, 1, 1 / 4),
    ],
)  # fmt: skip
def test_on_the_machine_packed_weights_give_the_same_bits_for_any_tokens(
    form: str, width: int, dtype: torch.dtype, processors: int, early: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "EARLY_SHARE", early)
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    monkeypatch.setattr(packed_linear, "MOST_STAGED", 0)
    torch.manual_seed(0)
    packed_weight, weight = linear(80, width, form, dtype)
    how = packed_linear.choose(form_of(packed_weight.words, packed_weight.scales), width, 9, 227, 5 / processors)
    assert how.kept == (processors == 1), "a single multiprocessor reads x often enough to keep it"
    x, residual = torch.randn(1, 9, width).to(dtype), torch.randn(1, 9, 80).to(dtype)
    norm = support.norm(width, dtype=dtype, device="cpu")
    assert packed_weight.bias is not None
    wide = torch.nn.functional.rms_norm(x.double(), (width,), norm.weight.double(), 1e-5)
    exact = wide @ weight.T + packed_weight.bias.double() + residual.double()

    def run(tokens: int) -> torch.Tensor:
        arguments = (packed_weight.words, packed_weight.scales, packed_weight.bias, residual[:, :tokens], 80, False)
        return packed_linear.packed_linear(x[:, :tokens], norm.weight, 1e-5, *arguments)

    together = run(9)
    support.assert_as_good_as(together, exact.to(dtype), exact, f"{form}, against one rounding")
    assert torch.equal(run(1), together[:, :1])
    monkeypatch.setattr(packed_linear, "MOST_STAGED", 18)
    for tokens in (2, 6, 9):
        assert packed_linear.choose(form_of(packed_weight.words, packed_weight.scales), width, tokens, 227, 1).staged
        assert torch.equal(run(tokens), together[:, :tokens]), f"{tokens} tokens whose digits every program makes"


@pytest.fixture
def small_and_old(packed_on_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of sm_80 whose programs have 99 KiB, where 9 tokens and more take two launches."""
    monkeypatch.setattr(launch, "dependent_launch", lambda device: {})
    monkeypatch.setattr(launch, "shared_memory", lambda device: 99)


@compiled_ahead
@pytest.mark.usefixtures("small_and_old")
@pytest.mark.parametrize(
    ("out", "width", "form", "dtype"), [(17, 136, "int8", torch.float16), (50, 1216, "g64 zeros", torch.bfloat16)]
)
def test_on_the_machine_two_launches_give_the_bits_of_each_token_alone(
    out: int, width: int, form: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight, exact_weight = linear(out, width, form, dtype)
    x, residual = torch.randn(1, 16, width).to(dtype), torch.randn(1, 16, out).to(dtype)
    norm = support.norm(width, dtype=dtype, device="cpu")
    assert not packed_linear.is_one_launch(x, weight.words, weight.scales) and weight.bias is not None

    def run(first: int, last: int) -> torch.Tensor:
        arguments = (weight.words, weight.scales, weight.bias, residual[:, first:last], out, False)
        return packed_linear.packed_linear(x[:, first:last], norm.weight, 1e-5, *arguments)

    wide = torch.nn.functional.rms_norm(x.double(), (width,), norm.weight.double(), 1e-5)
    exact = wide @ exact_weight.T + weight.bias.double() + residual.double()
    together = run(0, 16)
    support.assert_as_good_as(together, exact.to(dtype), exact, f"{form}, against one rounding")
    for token in (0, 7, 8, 15):
        assert torch.equal(run(token, token + 1), together[:, token : token + 1])


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
@pytest.mark.parametrize(
    ("out", "width", "form", "dtype"), [(48, 96, "g32 zeros", torch.float16), (80, 384, "int8", torch.bfloat16)]
)
def test_on_the_machine_gate_and_up_meet_with_the_same_bits_for_any_tokens(
    out: int, width: int, form: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight, exact_weight = linear(out, width, form, dtype)
    x, norm = torch.randn(1, 9, width).to(dtype), support.norm(width, dtype=dtype, device="cpu")
    assert weight.bias is not None

    def run(tokens: int) -> torch.Tensor:
        arguments = (weight.words, weight.scales, weight.bias, out)
        return packed_linear.packed_swiglu(x[:, :tokens], norm.weight, 1e-5, *arguments)

    wide = torch.nn.functional.rms_norm(x.double(), (width,), norm.weight.double(), 1e-5)
    gate, up = (wide @ exact_weight.T + weight.bias.double()).chunk(2, -1)
    exact, together = torch.nn.functional.silu(gate) * up, run(9)
    support.assert_as_good_as(together, exact.to(dtype), exact, f"{form}, against one rounding")
    assert torch.equal(run(1), together[:, :1])


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
@pytest.mark.parametrize("tokens", [1, 2])
def test_on_the_machine_each_warps_columns_have_16_bits_of_their_largest_value(tokens: int) -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(16, 8 * 128), torch.randn(1, tokens, 8 * 128).bfloat16()
    units = x.view(tokens, 8, 128)
    units[:, 0, 5], units[:, 1, 5], units[:, 2, 5], units[:, 3] = 1e8, -254, 255, 0
    units[:, 4] *= 2.0**-113  # of which no factor is left to make 15 bits of
    weight[:12, :128], weight[:4, : 4 * 128], weight[:4, 5 * 128 :] = 0, 0, 0  # rows without what is larger by far
    largest = units.double().abs().amax(2, keepdim=True)
    step = 2 ** (torch.floor(torch.log2(largest * (32768 / 32639.5))) - 14).clamp(min=-126)
    rounded = (torch.round(units.double() / step) * step).view(1, tokens, -1)
    q, scale = int8.quantize(weight, torch.bfloat16)
    packed_weight = pack_int8(q, scale, None)
    arguments = (packed_weight.words, packed_weight.scales, None, None, 16, True)
    y = packed_linear.packed_linear(x, None, 0.0, *arguments)
    exact = rounded @ (q.double() * scale.double().view(16, 1)).T
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=0)


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
@pytest.mark.parametrize("tokens", [1, 2])
def test_on_the_machine_what_would_round_to_more_than_two_digits_takes_one_bit_less(tokens: int) -> None:
    torch.manual_seed(3)
    x, norm = torch.randn(1, tokens, 128).half(), support.norm(128, dtype=torch.float16, device="cpu")
    x[..., 7], norm.weight[7] = 83, 1573  # 4 x 32639.75
    weight = torch.randn(16, 128)
    q, scale = int8.quantize(weight, torch.float16)
    packed_weight = pack_int8(q, scale, None)
    arguments = (packed_weight.words, packed_weight.scales, None, None, 16, True)
    y = packed_linear.packed_linear(x, norm.weight, 1e-5, *arguments)
    rounded = torch.round(x.double() * norm.weight.double() / 8) * 8
    rms = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(
        y.double(), rounded * rms @ (q.double() * scale.double().view(16, 1)).T, rtol=1e-5, atol=0
    )


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
def test_on_the_machine_nan_and_infinity_stay_with_their_token() -> None:
    torch.manual_seed(4)
    packed_weight, _ = linear(16, 256, "g128")
    arguments = (packed_weight.words, packed_weight.scales, packed_weight.bias, None, 16, True)
    x = torch.randn(1, 4, 256).bfloat16()
    clean = packed_linear.packed_linear(x, None, 0.0, *arguments)
    x[0, 1, 3], x[0, 2, 200] = float("nan"), float("-inf")
    y = packed_linear.packed_linear(x, None, 0.0, *arguments)
    assert torch.equal(y[0, ::3], clean[0, ::3])
    for wrong in (
        y[0, 1],
        y[0, 2],
        *(packed_linear.packed_linear(x[:, n : n + 1], None, 0.0, *arguments) for n in (1, 2)),
    ):
        assert wrong.isnan().all()


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
def test_on_the_machine_the_packed_greedy_head_takes_the_largest_logit() -> None:
    torch.manual_seed(1)
    packed_weight, weight = linear(80, 640, "int8")
    x, norm = torch.randn(1, 640).bfloat16(), support.norm(640, dtype=torch.bfloat16, device="cpu")
    assert packed_weight.bias is not None
    logits = torch.nn.functional.rms_norm(x.double(), (640,), norm.weight.double(), 1e-5) @ weight.T
    arguments = (packed_weight.words, packed_weight.scales, packed_weight.bias, 80)
    token = packed_linear.packed_greedy_head(x, norm.weight, 1e-5, *arguments)
    assert torch.equal(token, (logits + packed_weight.bias.double()).argmax(-1))


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
@pytest.mark.parametrize(("tokens", "processors"), [(1, 2), (9, 2), (9, 1)])
@pytest.mark.parametrize("form", ["int8", "g128 zeros"])
def test_on_the_machine_a_line_of_memory_is_copied_into_a_line_of_shared_memory(
    form: str, tokens: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    copy, lines = Threads._copy, list[int]()

    def observed(self: Threads, to: Any, source: Any, size: int, rest: Any, mask: Any) -> None:
        warps, pairs = np.nonzero(mask)[0] // 32, (self._read(source, "u64") // 128, self._read(to, "u32") // 128)
        sources, targets = (lanes[mask].astype(np.int64) for lanes in pairs)
        met = set(zip(warps.tolist(), sources.tolist(), targets.tolist(), strict=True))
        lines.append(len(met) - len({(warp, source) for warp, source, _ in met}))
        copy(self, to, source, size, rest, mask)

    packed_weight, _ = linear(80, 640, form)
    monkeypatch.setattr(Threads, "_copy", observed)
    arguments = (packed_weight.words, packed_weight.scales, packed_weight.bias, None, 80, False)
    packed_linear.packed_linear(torch.randn(1, tokens, 640).bfloat16(), None, 1e-5, *arguments)
    assert lines and not any(lines)
