"""Small sums and gatherings over the GPUs of one host: what a decode step does after attention and after an MLP.

A rank writes its numbers straight into the memory of every rank (symmetric memory, over NVLink), each as a word of 64
bits: the number, and above it how many calls there were. Who waits for a number reads its own memory until the word
carries this call. There is no barrier and no flag beside the data: a word arrives as a whole, and the latency is that
of one write. NCCL's protocol LL works so (https://arxiv.org/abs/2507.04786, section on protocols).

- Sums are of fp32, in one order, so all ranks get the same bits; the residual is added to them, and rounded once.
- Calls alternate between two halves of the memory. A rank is in call c + 2 only when all have written in call c + 1,
  and so have read what came in call c: whoever writes, a product or the kernel here, does so behind its own wait, when
  the receiver of the call before has ended.
- Calls are counted in the GPU's memory, one count a program: a CUDA graph replays, and programs do not wait for each
  other. Every rank makes the same calls in the same order, and a program's numbers lie at the same place in all.
- Under programmatic dependent launch the next kernel copies its first weights while this one waits for NVLink. What it
  sends comes from the kernel ahead: everything follows the wait.
- A product sends its rows itself, from its epilogue (`fastgen.kernels.linear_sum`); the kernel here then only receives.
  It needs nothing of the product's but what arrives: it starts when all of the product's programs are past their own
  wait, so what was written before the product is there, in L2 (L1 may hold what was there before: `.cg`). It waits for
  the product's end at its own, so that who waits for a receiver waits for all that is ahead of it. All rests on that.
- It never uses NVLink multicast.

Why receiving is a launch of its own. A product's programs that waited for NVLink would hold their shared memory
meanwhile. Here none is held: the product's programs leave, the next kernel's start and copy their first weights (21 MB
in flight on an H200, 4.8 us) while the numbers travel. The norm behind it needs the whole row, for which programs would
have to wait for each other once more; the next kernel sums the squares along with its product.
`scripts/bench_exchange.py` measures what a sum adds to an MLP.
"""

import functools
import os

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgen.kernels import launch

CAPACITY = 1 << 18
"""Numbers of 4 bytes that a rank can send in a call."""

TILE = 256  # numbers of a program
WARPS = 4


class Exchange:
    """The memory that the ranks of one host share; made by all of them together."""

    def __init__(self, device: torch.device) -> None:
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        box = symmetric_memory.empty(2 * self.world * CAPACITY, dtype=torch.int64, device=device)
        box.zero_()
        group = dist.group.WORLD
        assert group is not None, "the ranks have joined"
        self._handle = symmetric_memory.rendezvous(box, group)  # keeps the others' memory mapped
        self._box = box
        self.boxes = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self.calls = torch.zeros(triton.cdiv(CAPACITY, TILE), dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.barrier()

    def sum(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the sum of every rank's x [..] and the residual [..], in the residual's dtype or x's."""
        like = x if residual is None else residual
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._run(x.contiguous(), residual if residual is None else residual.contiguous(), out, is_sum=True)
        return out

    def receive(self, residual: Tensor, out: Tensor) -> None:
        """Put the residual [..] plus the sum of what every rank's kernel ahead sends with `post` into `out`.

        It may do so before the kernel ahead has ended, so `out` must have been there when that was launched.
        """
        self._run(None, residual.contiguous(), out, is_sum=True)

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x [..], of a dtype of 4 or 8 bytes: [world, ..]."""
        bits = x.reshape(-1).view(torch.int32)
        out = torch.empty(self.world, *bits.shape, dtype=torch.int32, device=x.device)
        self._run(bits, None, out, is_sum=False)
        return out.view(x.dtype).view(self.world, *x.shape)

    def _run(self, x: Tensor | None, residual: Tensor | None, out: Tensor, *, is_sum: bool) -> None:
        options = launch.dependent_launch(out.device)
        n = out.numel() if is_sum else out[0].numel()
        exchange_kernel[(triton.cdiv(n, TILE),)](
            x, residual, out, self.boxes, self.calls, n, self.rank,
            WORLD=self.world, RANKS=launch.next_power_of_two(self.world), CAPACITY=CAPACITY, TILE=TILE, SUM=is_sum,
            PDL=bool(options), num_warps=WARPS, **options,
        )  # fmt: skip


@functools.cache
def exchange(device: torch.device) -> Exchange | None:
    """Return the memory that all ranks share, None where they are on several hosts, or GPUs cannot reach each other.

    The first call is made by all ranks together.
    """
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world and torch.cuda.device_count() >= world
    mine = torch.cuda.current_device()
    reached = local and all(other == mine or torch.cuda.can_device_access_peer(mine, other) for other in range(world))
    everywhere = torch.tensor([reached], dtype=torch.int32, device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return Exchange(device) if everywhere.item() else None


@triton.jit(do_not_specialize=["n", "rank"])
def exchange_kernel(
    x, residual, out, boxes, calls, n, rank, WORLD: tl.constexpr, RANKS: tl.constexpr, CAPACITY: tl.constexpr,
    TILE: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of n); x [n] or None, where it was sent already; boxes [WORLD] addresses of int64 [2, WORLD,
    CAPACITY]; calls [tiles].

    SUM: residual [n] or None, out [n]. Else x and out [WORLD, n] are int32. RANKS: WORLD, as a power of two.
    """
    program = tl.program_id(0)
    every = tl.arange(0, RANKS)
    theirs = tl.load(boxes + every, mask=every < WORLD, other=0)  # constants, so before the wait
    mine = tl.load(boxes + rank)
    if PDL:
        gdc_launch_dependents()
        if x is not None:
            gdc_wait()
    call = tl.load(calls + program, cache_modifier=".cg") + 1
    if x is not None:
        send(x, theirs, call, n, rank, program, WORLD, RANKS, CAPACITY, TILE, SUM)
    receive(residual, out, mine, call, n, program, WORLD, RANKS, CAPACITY, TILE, SUM)
    tl.store(calls + program, call)
    if PDL and x is None:
        gdc_wait()  # who waits for this kernel waits for the one ahead too


@triton.jit
def send(
    x, boxes, call, n, rank, program, WORLD: tl.constexpr, RANKS: tl.constexpr, CAPACITY: tl.constexpr,
    TILE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Write this program's numbers of x into every rank's box; boxes [RANKS] are their addresses."""
    at = program * TILE + tl.arange(0, TILE)
    here = (tl.arange(0, RANKS) < WORLD)[:, None] & (at < n)[None, :]
    number = tl.load(x + at, mask=at < n, other=0)
    if SUM:
        number = number.to(tl.float32).to(tl.int32, bitcast=True)
    word = (call.to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)
    slot = ((call & 1) * WORLD + rank) * CAPACITY + at
    target = boxes.to(tl.pointer_type(tl.int64))[:, None] + slot[None, :]
    tl.store(target, tl.broadcast_to(word[None, :], [RANKS, TILE]), mask=here, cache_modifier=".wt")


@triton.jit
def receive(
    residual, out, box, call, n, program, WORLD: tl.constexpr, RANKS: tl.constexpr, CAPACITY: tl.constexpr,
    TILE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Wait for every rank's numbers of this program in the box at this address, and store them or their sum."""
    at = program * TILE + tl.arange(0, TILE)
    rank = tl.arange(0, RANKS)
    here = (rank < WORLD)[:, None] & (at < n)[None, :]
    slot = ((call & 1) * WORLD + rank)[:, None] * CAPACITY + at[None, :]
    source = box.to(tl.pointer_type(tl.int64)) + slot
    due = call.to(tl.int64)
    total = tl.zeros([TILE], tl.float32)
    if residual is not None:
        total += tl.load(residual + at, mask=at < n, other=0.0, cache_modifier=".cg").to(tl.float32)
    word = tl.load(source, mask=here, other=due << 32, volatile=True)
    while tl.min(tl.min(((word >> 32) == due).to(tl.int32), axis=1), axis=0) == 0:
        word = tl.load(source, mask=here, other=due << 32, volatile=True)
    number = word.to(tl.int32)
    if SUM:
        total += tl.sum(number.to(tl.float32, bitcast=True), axis=0)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=at < n)
    else:
        tl.store(out + rank[:, None] * n + at[None, :], number, mask=here)
