"""linear_sum_add: a product that sends its rows to all ranks. What waits for them is tested in test_exchange.py."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.kernels import fused, linear_sum
from fastgen.kernels.exchange import CAPACITY, TILE
from fastgen.kernels.launch import Shape
from fastgen.kernels.linear_add import partial_linear
from fastgen.kernels.linear_sum import linear_post_kernel, linear_sum_add, packed_post_kernel, packed_sum_add
from fastgen.kernels.packed import PackedLinear
from fastgen.kernels.packed_linear import packed_linear
from tests.kernels import support
from tests.kernels.machine import OnMachine
from tests.kernels.memory import place_of
from tests.kernels.support import compiled_ahead
from tests.kernels.test_packed_on_machine import linear as quantized

WORLD = 2


class Host:
    """Ranks in one process, which all send into boxes that lie behind the table of their addresses."""

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self.calls = torch.arange(4, 4 + -(-numbers // TILE), dtype=torch.int32)
        self.table = torch.zeros(WORLD * (1 + 2 * WORLD * CAPACITY), dtype=torch.int64)
        self.boxes = self.table[WORLD:].view(WORLD, 2, WORLD, CAPACITY)

    def as_rank(self, rank: int, ahead: Sequence[Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
        """Be a rank; `ahead` are the tensors that its kernel takes before the table."""
        first = place_of(self.table, [tensor for tensor in (*ahead, self.table) if tensor is not None]) + 8 * WORLD
        self.table[:WORLD] = torch.tensor([first + place * self.boxes[0].nbytes for place in range(WORLD)])
        shared = SimpleNamespace(
            boxes=self.table, calls=self.calls, rank=rank, world=WORLD, receive=lambda residual, out: None
        )
        monkeypatch.setattr(linear_sum, "exchange", lambda device: shared)

    def check(self, parts: list[Tensor]) -> None:
        """Every box holds every rank's part [numbers] in fp32, each number with the call that comes next."""
        at = torch.arange(self.numbers)
        coming = self.calls[at // TILE].long() + 1
        for box in self.boxes:
            for rank, part in enumerate(parts):
                words = box[coming % 2, rank, at]
                assert torch.equal(words >> 32, coming)
                assert torch.equal(words.int().view(torch.float32), part)
        assert (self.boxes != 0).sum() == WORLD * WORLD * self.numbers, "nothing else is written"


@compiled_ahead
@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, Shape(1, 2, 3, 0)), (5, Shape(1, 1, 1, 40)), (11, Shape(1, 2, 1, 0))]
)
def test_on_the_machine_every_rank_gets_the_bits_of_every_ranks_part(
    tokens: int, shape: Shape, on_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(shape)
    monkeypatch.setattr(linear_sum, "linear_post_kernel", OnMachine(linear_post_kernel, ("x", "calls")))
    host, parts = Host(tokens * 107), []
    for rank in range(WORLD):
        torch.manual_seed(rank)
        x = torch.randn(1, tokens, 584).bfloat16()
        linear = support.linear(107, 584, bias=rank == 0, dtype=torch.bfloat16, device="cpu")
        host.as_rank(rank, [x, linear.weight, linear.bias], monkeypatch)
        linear_sum_add(x, linear.weight, linear.bias, x.new_zeros(1, tokens, 107))
        parts.append(partial_linear(x, linear.weight, linear.bias).flatten())
    host.check(parts)


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
@pytest.mark.parametrize(("form", "tokens"), [("int8", 1), ("g32 zeros", 1), ("g128 zeros", 5), ("int8", 11)])
def test_on_the_machine_every_rank_gets_the_bits_of_every_packed_part(
    form: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    class OfRank(OnMachine):
        """The kernel, once its tensors are known and with them where the boxes will lie."""

        def _launch(self, grid: tuple[int, ...], *positional: Any, **named: Any) -> None:
            values = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
            ahead = [values[name] for name in ("x", "norm", "factors", "words", "scales", "bias")]
            host.as_rank(given["rank"], [tensor for tensor in ahead if isinstance(tensor, Tensor)], monkeypatch)
            super()._launch(grid, *positional, **named)

    monkeypatch.setattr(linear_sum, "packed_post_kernel", OfRank(packed_post_kernel, ("x", "factors", "calls")))
    host, parts = Host(tokens * 107), []
    for rank in range(WORLD):
        torch.manual_seed(rank)
        x, given["rank"] = torch.randn(1, tokens, 640).bfloat16(), rank
        packed, _ = quantized(107, 640, form)
        host.as_rank(rank, [], monkeypatch)
        packed_sum_add(x, packed.words, packed.scales, packed.bias, x.new_zeros(1, tokens, 107))
        part = packed_linear(x, None, 0.0, packed.words, packed.scales, packed.bias, None, 107, True)
        parts.append(part.flatten())
    host.check(parts)


@compiled_ahead
@pytest.mark.parametrize(("capability", "element"), [(80, "*fp16"), (90, "*bf16")])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_memory_never_idles(tokens: int, capability: int, element: str, assert_streams: Callable[..., None]) -> None:
    assert_streams(linear_post_kernel, "linear_add", tokens, capability, element, constants={"WORLD": 4})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("width", "large", "whole", "posted"),
    [(72, False, True, True), (72, True, True, False), (68, False, True, False), (72, False, False, False)],
)
def test_what_no_kernel_sends_goes_to_the_sum_of_its_parts(
    width: int, large: bool, whole: bool, posted: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_narrow", lambda tensor: tensor.dtype == torch.bfloat16)
    monkeypatch.setattr(fused, "CAPACITY", 101 if large else 102)
    monkeypatch.setattr(fused, "_in_lines", lambda weight: whole and weight.shape[1] % 8 == 0)
    monkeypatch.setattr(fused._packed, "is_one_launch", lambda x, words, scales: whole and x.shape[-1] % 8 == 0)
    for name in ("linear_sum_add", "packed_sum_add"):
        monkeypatch.setattr(fused._linear_sum, name, lambda *given: "posted")
    monkeypatch.setattr(fused, "partial_linear", lambda x, linear: "part")
    linear = support.linear(34, width, bias=True, dtype=torch.bfloat16, device="cpu")
    if packed:
        none = torch.empty(0)
        linear = PackedLinear(none, none, None, out_features=34, in_features=width, dtype=torch.bfloat16)
    x, residual = torch.ones(1, 3, width, dtype=torch.bfloat16), torch.ones(1, 3, 34, dtype=torch.bfloat16)
    found = fused.linear_sum_add(x, linear, residual, lambda part, to: (part, to is residual))
    assert found == ("posted" if posted else ("part", True))
