"""The exchange between GPUs: what is sent arrives, calls do not mix, and it compiles without a GPU.

On GPUs it is proved by `scripts/bench_exchange.py`, which compares it with fp64 and NCCL before it times anything.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels import exchange
from fastgen.kernels.exchange import exchange_kernel, receive, send
from tests.kernels.support import TARGETS, compile_ahead, compiled_ahead, in_interpreter

CAPACITY, TILE = 256, 64


@triton.jit
def send_kernel(
    x, boxes, call, n, rank, WORLD: tl.constexpr, RANKS: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    every = tl.arange(0, RANKS)
    theirs = tl.load(boxes + every, mask=every < WORLD, other=0)
    send(x, theirs, tl.load(call), n, rank, tl.program_id(0), WORLD, RANKS, CAPACITY, TILE, SUM)


@triton.jit
def receive_kernel(
    residual, out, boxes, call, n, rank, WORLD: tl.constexpr, RANKS: tl.constexpr, CAPACITY: tl.constexpr,
    TILE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    box = tl.load(boxes + rank)
    receive(residual, out, box, tl.load(call), n, tl.program_id(0), WORLD, RANKS, CAPACITY, TILE, SUM)


class Host:
    """Ranks in one process: all send, then all receive, since a rank cannot wait for one that runs after it."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.memory = torch.zeros(world, 2 * world * CAPACITY, dtype=torch.int64)
        self.boxes = torch.tensor([box.data_ptr() for box in self.memory])
        self.call = torch.zeros(1, dtype=torch.int32)

    def run(self, values: list[Tensor], outs: list[Tensor], residual: Tensor | None, *, is_sum: bool) -> None:
        self.call += 1
        n = values[0].numel()
        grid = (triton.cdiv(n, TILE),)
        shape = {"WORLD": self.world, "RANKS": triton.next_power_of_2(self.world), "CAPACITY": CAPACITY, "TILE": TILE}
        for rank in range(self.world):
            send_kernel[grid](values[rank], self.boxes, self.call, n, rank, **shape, SUM=is_sum)
        for rank in range(self.world):
            receive_kernel[grid](residual, outs[rank], self.boxes, self.call, n, rank, **shape, SUM=is_sum)


@in_interpreter
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_gets_the_same_sums_in_the_interpreter(world: int) -> None:
    host = Host(world)
    for call, size in enumerate((200, 7, 256, 64, 200)):
        generator = torch.Generator().manual_seed(call)
        values = [torch.randn(size, generator=generator) for _ in range(world)]
        residual = torch.randn(size, generator=generator) if call % 2 else None
        outs = [torch.full((size,), float("nan")) for _ in range(world)]
        host.run(values, outs, residual, is_sum=True)
        expected = torch.stack(values).sum(0) + (0 if residual is None else residual)
        assert torch.allclose(outs[0], expected, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(out, outs[0]) for out in outs)


@in_interpreter
def test_what_was_sent_before_is_received_in_the_interpreter() -> None:
    host = Host(3)
    shape = {"WORLD": 3, "RANKS": 4, "CAPACITY": CAPACITY, "TILE": TILE}
    for size in (200, 200, 60, 200):
        values, residual = torch.randn(3, size), torch.randn(size)
        grid = (triton.cdiv(size, TILE),)
        host.run(list(values), [torch.empty(size) for _ in values], None, is_sum=True)  # leaves its words
        before = torch.full((4,), int(host.call) - 1, dtype=torch.int32)
        out = torch.full((size,), float("nan"))
        exchange_kernel[grid](None, residual, out, host.boxes, before, size, 1, **shape, SUM=True, PDL=False)
        assert torch.allclose(out, values.sum(0) + residual, rtol=1e-6, atol=1e-6)
        assert before.tolist() == [int(host.call)] * grid[0] + [int(host.call) - 1] * (4 - grid[0])


@in_interpreter
def test_every_rank_gets_every_ranks_bits_in_the_interpreter() -> None:
    host = Host(3)
    for size in (2, 130, 5):
        values = [torch.randint(-(2**31), 2**31, (size,), dtype=torch.int64).int() for _ in range(3)]
        outs = [torch.zeros(3, size, dtype=torch.int32) for _ in range(3)]
        host.run(values, outs, None, is_sum=False)
        assert all(torch.equal(out, torch.stack(values)) for out in outs)


@in_interpreter
def test_numbers_of_an_earlier_call_do_not_count_in_the_interpreter() -> None:
    host = Host(2)
    for value in range(1, 6):
        outs = [torch.zeros(16) for _ in range(2)]
        host.run([torch.full((16,), float(value)), torch.full((16,), 10.0 * value)], outs, None, is_sum=True)
        assert (outs[1] == 11.0 * value).all()
        words = host.memory[0].view(2, 2, CAPACITY)[int(host.call) % 2, :, :16] >> 32
        assert (words == host.call).all()


@compiled_ahead
@pytest.mark.parametrize(("capability", "pdl"), TARGETS)
def test_who_only_receives_waits_for_the_kernel_ahead_last(capability: int, pdl: bool) -> None:
    constants = {"x": None, "WORLD": 3, "RANKS": 4, "CAPACITY": 1 << 18, "TILE": 256, "SUM": True, "PDL": pdl}
    arguments = {"residual": "*bf16", "out": "*bf16", "boxes": "*i64", "calls": "*i32", "n": "i32", "rank": "i32"}
    lines = compile_ahead(exchange_kernel, capability, arguments, constants).asm["ttgir"].splitlines()
    waits = [at for at, line in enumerate(lines) if "griddepcontrol.wait" in line]
    loads = [line for line in lines if "tt.load" in line]
    fresh = [line for line in loads if "cacheModifier = cg" in line]
    assert len(waits) == pdl and sum("griddepcontrol.launch_dependents" in line for line in lines) == pdl
    assert len(fresh) == 2, "the calls' number and the residual are read from L2"
    others = [line for line in loads if line not in fresh and "isVolatile" not in line]
    assert len(others) == 1, "but for this rank's box, a constant"
    assert not [line for at in waits for line in lines[at:] if "tt.load" in line or "tt.store" in line]


@compiled_ahead
@pytest.mark.parametrize(("capability", "pdl"), TARGETS)
@pytest.mark.parametrize("is_sum", [True, False])
def test_compiles_without_a_gpu(is_sum: bool, capability: int, pdl: bool) -> None:
    numbers = {"x": "*fp32", "residual": "*bf16", "out": "*bf16"} if is_sum else {"x": "*i32", "out": "*i32"}
    constants = {"WORLD": 3, "RANKS": 4, "CAPACITY": 1 << 18, "TILE": 256, "SUM": is_sum, "PDL": pdl}
    if not is_sum:
        constants["residual"] = None
    arguments = numbers | {"boxes": "*i64", "calls": "*i32", "n": "i32", "rank": "i32"}
    ttgir = compile_ahead(exchange_kernel, capability, arguments, constants).asm["ttgir"]
    assert "isVolatile" in ttgir, "who waits reads memory each time"
    if pdl:
        lines = ttgir.splitlines()
        wait = next(at for at, line in enumerate(lines) if "griddepcontrol.wait" in line)
        early = [line for line in lines[:wait] if "tt.load" in line]
        assert len(early) == 2, "only the boxes' addresses may be read before the kernel ahead is done"


class Recorder:
    """Stands in for the kernel, and keeps what it is launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        self.grid = grid
        return self

    def __call__(self, *given: object, **options: object) -> None:
        self.given, self.options = given, options


def test_who_receives_launches_no_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Recorder()
    monkeypatch.setattr(exchange, "exchange_kernel", kernel)
    shared = exchange.Exchange.__new__(exchange.Exchange)
    shared.world, shared.rank, shared.boxes, shared.calls = 3, 2, torch.zeros(3), torch.zeros(4)
    residual, out = torch.randn(300, 2).T, torch.empty(2, 300)
    shared.receive(residual, out)
    x, given, filled, boxes, calls, n, rank = kernel.given
    assert x is None and filled is out and boxes is shared.boxes and calls is shared.calls and (n, rank) == (600, 2)
    assert given.is_contiguous() and torch.equal(given, residual)
    assert kernel.grid == (3,) and kernel.options["SUM"] and kernel.options["WORLD"] == 3
    shared.gather(torch.arange(5))
    assert kernel.grid == (1,) and kernel.given[5] == 10 and not kernel.options["SUM"], "words of 4 bytes"
