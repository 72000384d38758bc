"""Small sums over the GPUs of one host: the exchange kernel beside NCCL, checked before it is timed.

    python -m torch.distributed.run --nproc-per-node 4 scripts/bench_exchange.py --output FILE

A CUDA graph holds a chain of sums, each of which needs the one before: what a decode step does between its blocks.
Every sum is checked against fp64, all ranks must have the same bits, and a thousand replays must give what one gives.
What a sum adds to a step is less than it takes alone, for the next kernel copies its weights meanwhile: a second chain
has the MLP of a Llama-2 on so many ranks between sums, whose rows the product sends itself (`linear_sum_add`) or
leaves to a kernel behind it, beside the same without sums.
"""

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.device import describe
from fastgen.graphs import without_collection
from fastgen.kernels.exchange import Exchange, exchange
from fastgen.kernels.linear_add import linear_add, partial_linear
from fastgen.kernels.linear_sum import linear_sum_add, packed_sum_add
from fastgen.kernels.norm_swiglu import norm_swiglu
from fastgen.kernels.packed import pack_int8
from fastgen.report import versions
from quantize import int8
from tp.dist import Ranks, join
from tp.watch import process_watch

SIZES = [(1, 4096), (1, 8192), (4, 4096), (4, 8192), (16, 8192)]  # tokens, width
CHAIN, REPLAYS = 64, 50
MLPS = {"llama-2-7b": (4096, 11008), "llama-2-70b": (8192, 28672)}  # dim, hidden units
COPIES = 8  # of the weights, so that none is found in the L2 cache


def main() -> None:
    """Check, time, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    ranks, device = join("cuda")
    place = torch.device(device or "cuda")
    shared = exchange(place)
    assert shared is not None, "these GPUs cannot reach each other"
    check_sums(shared, ranks, place)
    check_gathering(shared, ranks, place)
    check_replays(shared, ranks, place)
    check_products(ranks, place)
    rows = []
    for tokens, width in SIZES:
        x = torch.randn(tokens, width, device=place)
        narrow = x.bfloat16()
        row = {
            "tokens": tokens,
            "width": width,
            "exchange_us": microseconds(lambda residual, x=x: shared.sum(x, residual), narrow),
            "nccl_us": microseconds(lambda residual, narrow=narrow: nccl_sum(narrow, residual), narrow),
        }
        rows.append(row)
        if ranks.leads:
            print(row, flush=True)
    mlps = [time_mlp(name, shared, ranks, place) for name in MLPS]
    if ranks.leads:
        print(mlps, flush=True)
        document = {"world_size": ranks.world, "device": describe(place), "versions": versions(), "checked": True}
        document["mlps"] = mlps
        with open(arguments.output, "w") as file:
            json.dump(document | {"rows": rows}, file, indent=1)
    ranks.wait()


def nccl_sum(x: Tensor, residual: Tensor) -> Tensor:
    """Return the residual plus the sum of every rank's x."""
    total = x.clone()
    dist.all_reduce(total)
    return residual + total


def time_mlp(name: str, shared: Exchange, ranks: Ranks, device: torch.device) -> dict[str, object]:
    """Return what an MLP of a model takes in bf16 with a sum over the ranks in it, or behind it, and without, in us."""
    dim, hidden = MLPS[name][0], MLPS[name][1] // ranks.world
    gate_ups = [torch.randn(2 * hidden, dim, device=device, dtype=torch.bfloat16) for _ in range(COPIES)]
    downs = [torch.randn(dim, hidden, device=device, dtype=torch.bfloat16) for _ in range(COPIES)]
    gain = torch.ones(dim, device=device, dtype=torch.bfloat16)
    turn = itertools.cycle(range(COPIES))

    def mlp(x: Tensor, *, end: Callable[..., Tensor]) -> Tensor:
        number = next(turn)
        return end(norm_swiglu(x, gain, 1e-5, gate_ups[number], None), downs[number], None, x)

    ends = {
        "with_sum_us": linear_sum_add,
        "with_sum_behind_us": lambda h, down, bias, x: shared.sum(partial_linear(h, down, bias), x),
        "without_us": linear_add,
    }
    x = torch.zeros(1, dim, device=device, dtype=torch.bfloat16)
    megabytes = (gate_ups[0].nbytes + downs[0].nbytes) / 1e6
    return {"model": name, "megabytes": megabytes} | {
        kind: microseconds(functools.partial(mlp, end=end), x) for kind, end in ends.items()
    }


def check_sums(shared: Exchange, ranks: Ranks, device: torch.device) -> None:
    """Compare sums of all sizes, with and without a residual, with fp64; and the ranks with each other."""
    generator = torch.Generator(device).manual_seed(ranks.rank)
    common = torch.Generator(device).manual_seed(1000)
    for size, with_residual in itertools.product((1, 2, 255, 256, 257, 4096, 8192, 131072, 262144), (False, True)):
        x = torch.randn(size, device=device, generator=generator)
        residual = torch.randn(size, device=device, generator=common).bfloat16() if with_residual else None
        every = [torch.empty_like(x) for _ in range(ranks.world)]
        dist.all_gather(every, x)
        exact = torch.stack(every).double().sum(0) + (0 if residual is None else residual.double())
        found = shared.sum(x, residual)
        tolerance = 1e-6 if residual is None else 2**-8
        assert ((found.double() - exact).abs() <= tolerance * exact.abs().clamp(min=1)).all(), f"sum of {size}"
        copies = [torch.empty_like(found) for _ in range(ranks.world)]
        dist.all_gather(copies, found)
        assert all(torch.equal(copy, found) for copy in copies), f"ranks differ in a sum of {size}"


def check_gathering(shared: Exchange, ranks: Ranks, device: torch.device) -> None:
    """Compare gathered integers with NCCL's."""
    for size in (1, 6, 300, 64000):
        x = torch.randint(-(2**31), 2**31, (size,), device=device).int() + ranks.rank
        every = torch.empty(ranks.world, size, dtype=torch.int32, device=device)
        dist.all_gather_into_tensor(every.view(-1), x)
        assert torch.equal(shared.gather(x), every), f"gathering of {size}"


def check_replays(shared: Exchange, ranks: Ranks, device: torch.device) -> None:
    """Replay a graph of sums a thousand times, ranks out of step as they come; the result must never change."""
    x = torch.randn(8192, device=device, generator=torch.Generator(device).manual_seed(ranks.rank))
    start = torch.zeros(8192, dtype=torch.bfloat16, device=device)

    def chain() -> Tensor:
        residual = start
        for _ in range(CHAIN):
            residual = shared.sum(x * 0.01 + residual.float() * 1e-3, residual)
        return residual

    expected = chain()
    graph, out = captured(chain)
    for replay in range(1000):
        graph.replay()
        if replay % 100 == ranks.rank:
            torch.cuda.synchronize()
        assert replay % 50 or torch.equal(out, expected), f"replay {replay} differs"


def check_products(ranks: Ranks, device: torch.device) -> None:
    """Check products that send their rows, of plain and of packed weights, against fp64, and the ranks with each other.

    Raises `AssertionError` for the first that is wrong.
    """
    own = torch.Generator(device).manual_seed(ranks.rank)
    weight = torch.randn(4096, 2752, device=device, generator=own).bfloat16() / 64
    check_product(lambda x, residual: linear_sum_add(x, weight, None, residual), weight.double(), ranks, "bf16")
    q, scale = int8.quantize(weight.float(), torch.bfloat16)
    exact, packed = q.double() * scale.double().view(-1, 1), pack_int8(q, scale, None)
    check_product(
        lambda x, residual: packed_sum_add(x, packed.words, packed.scales, None, residual), exact, ranks, "int8"
    )


def check_product(product: Callable[[Tensor, Tensor], Tensor], weight: Tensor, ranks: Ranks, name: str) -> None:
    """Compare residual + the ranks' x @ weight.T with fp64 and the ranks with each other, alone and in graphs."""
    device, (rows, width) = weight.device, weight.shape
    own, common = torch.Generator(device).manual_seed(ranks.rank), torch.Generator(device).manual_seed(1000)
    for tokens in (1, 5, 16):
        x = torch.randn(tokens, width, device=device, generator=own).bfloat16()
        residual = torch.randn(tokens, rows, device=device, generator=common).bfloat16()
        exact = x.double() @ weight.T
        dist.all_reduce(exact)
        exact += residual
        found = product(x, residual)
        assert ((found.double() - exact).abs() <= 2**-8 * exact.abs().clamp(min=1)).all(), f"{name}, {tokens} tokens"
        copies = [torch.empty_like(found) for _ in range(ranks.world)]
        dist.all_gather(copies, found)
        assert all(torch.equal(copy, found) for copy in copies), f"ranks differ: {name}, {tokens} tokens"

        def chain(x: Tensor = x, residual: Tensor = residual) -> Tensor:
            for _ in range(CHAIN):  # every second one has the first one's result
                other = product(x, residual)
                last = product(x + 0 * other[:, :width], residual)
            return last

        graph, out = captured(chain)
        for replay in range(200):
            graph.replay()
            if replay % 10 == ranks.rank:
                torch.cuda.synchronize()
        assert torch.equal(out, found), f"a graph differs: {name}, {tokens} tokens"


def captured(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a graph of `work`, and where it leaves its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        out = work()
    return graph, out


def microseconds(step: Callable[[Tensor], Tensor], residual: Tensor) -> float:
    """Return the median time of one of `CHAIN` steps in a graph, each on the result of the one before."""

    def chain() -> Tensor:
        value = residual
        for _ in range(CHAIN):
            value = step(value)
        return value

    graph, _ = captured(chain)
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / CHAIN)
    return statistics.median(times)


if __name__ == "__main__":
    with process_watch():
        main()
