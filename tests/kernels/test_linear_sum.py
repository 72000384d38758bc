"""linear_sum_add: a product that sends its rows to all ranks. What waits for them is tested in test_exchange.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.kernels import fused, launch, linear_sum
from fastgen.kernels import packed_linear as kernels_of_packed
from fastgen.kernels.exchange import CAPACITY, TILE
from fastgen.kernels.launch import Shape
from fastgen.kernels.linear_add import partial_linear
from fastgen.kernels.linear_sum import linear_post_kernel, linear_sum_add, packed_sum_add
from fastgen.kernels.packed import Form, PackedLinear
from fastgen.kernels.packed_linear import is_one_launch, packed_linear
from tests.kernels import support
from tests.kernels.machine import OnMachine
from tests.kernels.memory import place_of
from tests.kernels.support import compiled_ahead
from tests.kernels.test_packed_on_machine import linear as quantized

WORLD = 2


class Host:
    """Ranks in one process, which all send into boxes that lie behind the table of their addresses."""

    def __init__(self, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers, self.monkeypatch = numbers, monkeypatch
        self.calls = torch.arange(4, 4 + -(-numbers // TILE), dtype=torch.int32)
        self.table = torch.zeros(WORLD * (1 + 2 * WORLD * CAPACITY), dtype=torch.int64)
        self.boxes = self.table[WORLD:].view(WORLD, 2, WORLD, CAPACITY)
        self.events: list[Any] = []
        empty = linear_sum._empty
        monkeypatch.setattr(linear_sum, "_empty", lambda residual: (self.events.append("out"), empty(residual))[1])

    def as_rank(self, rank: int) -> None:
        """Be a rank."""
        shared = SimpleNamespace(
            boxes=self.table, calls=self.calls, rank=rank, world=WORLD,
            receive=lambda residual, out: self.events.append((residual, out)),
        )  # fmt: skip
        self.monkeypatch.setattr(linear_sum, "exchange", lambda device: shared)

    def run(self, name: str, *ahead: str) -> None:
        """Let a kernel run on the machine; its tensors `ahead` of the table decide where that will lie."""
        host = self

        class Posting(OnMachine):
            def _launch(self, grid: tuple[int, ...], *positional: Any, **named: Any) -> None:
                values = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
                tensors = [values[name] for name in ahead if isinstance(values[name], Tensor)]
                first = place_of(host.table, [*tensors, host.table]) + 8 * WORLD
                host.table[:WORLD] = torch.tensor([first + box * host.boxes[0].nbytes for box in range(WORLD)])
                host.events.append("product")
                super()._launch(grid, *positional, **named)

        kernel = getattr(linear_sum, name)
        self.monkeypatch.setattr(linear_sum, name, Posting(kernel, ("x", "factors", "calls")))

    def check(self, parts: list[Tensor], residual: Tensor, outs: list[Tensor]) -> None:
        """Every box holds every rank's part [numbers] in fp32, each number with the call that comes next; and each rank
        has received the residual's sum into what it returned, which was there before the product was launched."""
        at = torch.arange(self.numbers)
        coming = self.calls[at // TILE].long() + 1
        for box in self.boxes:
            for rank, part in enumerate(parts):
                words = box[coming % 2, rank, at]
                assert torch.equal(words >> 32, coming)
                assert torch.equal(words.int().view(torch.float32), part)
        assert (self.boxes != 0).sum() == WORLD * WORLD * self.numbers, "nothing else is written"
        for rank, out in enumerate(outs):
            before, product, (given, filled) = self.events[3 * rank : 3 * rank + 3]
            assert (before, product) == ("out", "product")
            assert given is residual and filled.data_ptr() == out.data_ptr()
            assert (out.shape, out.dtype) == (residual.shape, residual.dtype)


def columns_first(tokens: int, width: int) -> Tensor:
    """An x [1, tokens, width] that is not contiguous, if it has several tokens."""
    return torch.randn(1, width, tokens).bfloat16().transpose(1, 2)


@compiled_ahead
@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, Shape(1, 2, 3, 0)), (5, Shape(1, 1, 1, 40)), (11, Shape(1, 2, 1, 0))]
)
def test_on_the_machine_every_rank_gets_the_bits_of_every_ranks_part(
    tokens: int, shape: Shape, on_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(shape)
    host, parts, outs, residual = Host(tokens * 107, monkeypatch), [], [], torch.zeros(1, tokens, 107)
    host.run("linear_post_kernel", "x", "weight", "bias")
    for rank in range(WORLD):
        torch.manual_seed(rank)
        x = columns_first(tokens, 584)
        linear = support.linear(107, 584, bias=rank == 0, dtype=torch.bfloat16, device="cpu")
        host.as_rank(rank)
        outs.append(linear_sum_add(x, linear.weight, linear.bias, residual))
        parts.append(partial_linear(x, linear.weight, linear.bias).flatten())
    host.check(parts, residual, outs)


@compiled_ahead
@pytest.mark.usefixtures("packed_on_machine")
@pytest.mark.parametrize(("form", "tokens"), [("int8", 1), ("g32 zeros", 1), ("g128 zeros", 5), ("int8", 11)])
def test_on_the_machine_every_rank_gets_the_bits_of_every_packed_part(
    form: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, parts, outs, residual = Host(tokens * 107, monkeypatch), [], [], torch.zeros(1, tokens, 107)
    host.run("packed_post_kernel", "x", "norm", "factors", "words", "scales", "bias")
    for rank in range(WORLD):
        torch.manual_seed(rank)
        x = columns_first(tokens, 640)
        packed, _ = quantized(107, 640, form)
        host.as_rank(rank)
        outs.append(packed_sum_add(x, packed.words, packed.scales, packed.bias, residual))
        part = packed_linear(x, None, 0.0, packed.words, packed.scales, packed.bias, None, 107, True)
        parts.append(part.flatten())
    host.check(parts, residual, outs)


def test_what_takes_two_launches_is_summed_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(1, 1, True)
    words, scales, residual = torch.empty(512, 32, 4), torch.empty(0), torch.ones(1, 16, 8)
    monkeypatch.setattr(kernels_of_packed, "form_of", lambda words, scales: form)
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    summed = SimpleNamespace(sum=torch.add)
    monkeypatch.setattr(linear_sum, "exchange", lambda device: summed)
    monkeypatch.setattr(linear_sum, "packed_linear", lambda x, *given: x[..., :8].float())
    monkeypatch.setattr(linear_sum, "launch_packed", lambda *given, **named: pytest.fail("a launch of its own"))
    for memory, tokens, one in ((227, 16, True), (99, 8, True), (40, 16, False)):
        monkeypatch.setattr(launch, "shared_memory", lambda device, size=memory: size)
        x = torch.ones(1, tokens, 4096).bfloat16()
        assert is_one_launch(x, words, scales) is one, f"{tokens} tokens in {memory} KiB"
        if not one:
            assert (packed_sum_add(x, words, scales, None, residual) == 2).all()


@compiled_ahead
@pytest.mark.parametrize(("capability", "element"), [(80, "*fp16"), (90, "*bf16")])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_memory_never_idles(tokens: int, capability: int, element: str, assert_streams: Callable[..., None]) -> None:
    assert_streams(linear_post_kernel, "linear_add", tokens, capability, element, constants={"WORLD": 4})


def linears(width: int) -> list[nn.Module]:
    """A linear with plain weights, and one with packed ones."""
    none = torch.empty(0)
    packed = PackedLinear(none, none, None, out_features=34, in_features=width, dtype=torch.bfloat16)
    return [support.linear(34, width, bias=True, dtype=torch.bfloat16, device="cpu"), packed]


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors count as a GPU's."""
    monkeypatch.setattr(fused, "_narrow", lambda tensor: tensor.dtype == torch.bfloat16)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize(
    ("width", "tokens", "large", "posted"),
    [
        (72, 3, False, [True, True]), (72, 3, True, [False, False]), (68, 3, False, [False, True]),
        (72, 17, False, [False, False]),
    ],
)  # fmt: skip
def test_what_no_kernel_sends_goes_to_the_sum_of_its_parts(
    width: int, tokens: int, large: bool, posted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CAPACITY", 34 * tokens - large)
    for name in ("linear_sum_add", "packed_sum_add"):
        monkeypatch.setattr(fused._linear_sum, name, lambda *given: "posted")
    monkeypatch.setattr(fused, "partial_linear", lambda x, linear: "part")
    x, residual = (torch.ones(1, tokens, size, dtype=torch.bfloat16) for size in (width, 34))

    def sum_add(part: object, to: Tensor) -> object:
        return part, to is residual

    found = [fused.linear_sum_add(x, linear, residual, sum_add) for linear in linears(width)]
    assert found == ["posted" if each else ("part", True) for each in posted]


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize(("tokens", "dtype"), [(16, torch.float32), (17, torch.bfloat16)])
def test_parts_that_others_may_have_from_kernels_are_fp32(tokens: int, dtype: torch.dtype) -> None:
    plain, _ = linears(68)
    x = torch.ones(1, tokens, 68, dtype=torch.bfloat16)
    assert fused.partial_linear(x, plain).dtype is dtype


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("place", [0, 1], ids=["plain", "packed"])
def test_one_graph_holds_a_sum_of_three_to_sixteen_tokens(place: int) -> None:
    graphs, linear = [], linears(72)[place]

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor]]:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return lambda *given: (torch.zeros(1, 4, 34),)

    compiled = torch.compile(
        lambda x, residual: fused.linear_sum_add(x, linear, residual, torch.add),
        fullgraph=True, dynamic=False, backend=keep,
    )  # fmt: skip
    for tokens in (4, 8, 16):
        x, residual = (torch.ones(1, tokens, size, dtype=torch.bfloat16) for size in (72, 34))
        for tensor in (x, residual):
            torch._dynamo.mark_dynamic(tensor, 1, min=3, max=16)
        compiled(x, residual)
    assert len(graphs) == 1 and "sum_add" in graphs[0][-1]
