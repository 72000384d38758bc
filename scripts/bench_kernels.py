#!/usr/bin/env python3
"""Time the fused stages and whole decode steps on one GPU, beside what the memory allows.

scripts/run scripts/bench_kernels.py --json results.json          stages and steps
scripts/run scripts/bench_kernels.py --models llama-3.2-1b --no-stages --compile

A stage is timed as a chain in a CUDA graph over copies of its weights that together exceed the L2 cache many times.
A step is a model of the given shape with random weights: model, head and argmax in one CUDA graph whose buffers
the step updates itself, so that a replay needs nothing from the host. The limit is what a read-only sum of 4 GiB
reaches in the same process.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fastgen.config import ModelConfig
from fastgen.kernels import fused, reference
from fastgen.kernels.reference import Step
from fastgen.kernels.rope import Rope
from fastgen.model import Transformer

MODELS = {
    "llama-2-7b": ModelConfig(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_dim=11008, vocab_size=32000,
        max_seq_len=4096,
    ),
    "llama-3-8b": ModelConfig(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=128256,
        max_seq_len=8192, rope_theta=500000.0,
    ),
    "llama-3.2-1b": ModelConfig(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, hidden_dim=8192, vocab_size=128256,
        max_seq_len=8192, rope_theta=500000.0, tie_embeddings=True,
    ),
}  # fmt: skip
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
CHAIN_BYTES = 4 << 30
PROMPT, NEW, CAPACITY = 5, 200, 1024


@triton.jit
def read_kernel(data, out, SIZE: tl.constexpr, ROUNDS: tl.constexpr):
    """Sum SIZE x ROUNDS values a program."""
    start = tl.program_id(0).to(tl.int64) * SIZE * ROUNDS
    total = tl.zeros([SIZE], tl.float32)
    for i in range(ROUNDS):
        total += tl.load(data + start + i * SIZE + tl.arange(0, SIZE)).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total))


def read_limit() -> float:
    """Return the best bandwidth of a read-only sum, in GB/s."""
    count = CHAIN_BYTES // 2
    data = torch.ones(count, dtype=DTYPE, device=DEVICE)
    programs = count // (8192 * 4)
    out = torch.empty(programs, device=DEVICE)
    times = replay_times(lambda: read_kernel[(programs,)](data, out, SIZE=8192, ROUNDS=4, num_warps=8))
    return CHAIN_BYTES / min(times) / 1e9


def replay_times(function: Callable[[], Any], repeats: int = 20) -> list[float]:
    """Capture a function in a CUDA graph and return the seconds of its replays."""
    graph = capture(function)
    return [timed(graph.replay) for _ in range(repeats)]


def capture(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Run a function until it has compiled what it needs, then capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds that the device takes for a function."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def random_linear(out: int, width: int) -> nn.Linear:
    """A linear without bias on the GPU."""
    linear = nn.Linear(width, out, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    linear.weight.normal_(0, width**-0.5)
    return linear


def stage_calls(
    config: ModelConfig, tokens: int, stages: Any
) -> dict[str, tuple[Callable[[nn.Module], Tensor], tuple[int, int]]]:
    """Every stage with a linear: how to call it, and its weight's shape."""
    norm = nn.RMSNorm(config.dim, eps=1e-5, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    D, F = config.dim, config.hidden_dim
    x, y, h = (torch.randn(1, tokens, width, device=DEVICE, dtype=DTYPE) for width in (D, config.q_dim, F))
    return {
        "norm_linear": (lambda w: stages.norm_linear(x, norm, w), (config.q_dim + 2 * config.kv_dim, D)),
        "linear_add wo": (lambda w: stages.linear_add(y, w, x), (D, config.q_dim)),
        "norm_swiglu": (lambda w: stages.norm_swiglu(x, norm, w), (2 * F, D)),
        "linear_add w_down": (lambda w: stages.linear_add(h, w, x), (D, F)),
        "head": (lambda w: stages.head(x, norm, w), (config.vocab_size, D)),
    }


def bench_stage(call: Callable[[nn.Module], Tensor], shape: tuple[int, int], limit: float) -> dict[str, float]:
    """Time one stage as a chain over many weights."""
    size = shape[0] * shape[1] * 2
    weights = [random_linear(*shape) for _ in range(max(3, min(32, CHAIN_BYTES // size)))]
    times = [seconds / len(weights) for seconds in replay_times(lambda: [call(weight) for weight in weights])]
    median = statistics.median(times)
    return {
        "bytes": size, "us": median * 1e6, "us_min": min(times) * 1e6, "us_max": max(times) * 1e6,
        "tb_s": size / median / 1e12, "share": size / median / 1e9 / limit,
    }  # fmt: skip


def bench_attend(config: ModelConfig, filled: int, tokens: int, limit: float) -> dict[str, float]:
    """Time attention over `filled` positions as a chain over many caches."""
    copies = 32
    shape = (1, config.n_kv_heads, max(CAPACITY, filled + tokens), config.head_dim)
    caches = [[torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)] for _ in range(copies)]
    positions = torch.arange(filled - tokens, filled, device=DEVICE)[None]
    step = Step(positions, torch.arange(shape[2], device=DEVICE), Rope(config).to(DEVICE)(positions))
    qkv = torch.randn(1, tokens, config.q_dim + 2 * config.kv_dim, device=DEVICE, dtype=DTYPE)
    scale = config.head_dim**-0.5
    times = replay_times(lambda: [fused.attend(qkv, k, v, step, scale=scale) for k, v in caches])
    size = 2 * filled * config.kv_dim * 2
    median = statistics.median(times) / copies
    return {"bytes": size, "us": median * 1e6, "tb_s": size / median / 1e12, "share": size / median / 1e9 / limit}


def random_model(config: ModelConfig, stages: Any = fused) -> Transformer:
    """A model of the shape with small random weights and an empty cache."""
    with torch.device("meta"):
        model = Transformer(config, stages)
    model = model.to(DTYPE).to_empty(device=DEVICE)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    if config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight
    model.allocate_cache(1, CAPACITY)
    return model


class Decoder:
    """A decode step over buffers of its own: every call appends a token and moves on by one position."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.token = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
        self.position = torch.full((1, 1), PROMPT, dtype=torch.int64, device=DEVICE)
        self.length = self.position[0] + 1
        self.keys = torch.arange(CAPACITY, device=DEVICE)

    def next_token(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the greedy tokens [1, T] that follow tokens [1, T]."""
        hidden = self.model(tokens, positions, self.keys, self.length)
        return fused.greedy_head(hidden, self.model.norm, self.model.lm_head)

    def step(self) -> None:
        """Decode one token; one that is invalid is fed as 0."""
        self.token.copy_(self.next_token(self.token.clamp(min=0), self.position))
        self.position.add_(1)
        self.length.add_(1)

    def restart(self) -> None:
        """Go back to the end of the prompt."""
        self.position.fill_(PROMPT)
        self.length.fill_(PROMPT + 1)


def bench_step(decoder: Decoder, limit: float) -> dict[str, Any]:
    """Time 200 tokens, and steps of several tokens."""
    model = decoder.model
    graph = capture(decoder.step)
    size = model.weight_bytes() + model.kv_bytes(PROMPT + NEW // 2)
    rates = []
    for _ in range(5):
        decoder.restart()
        rates.append(NEW / timed(lambda: [graph.replay() for _ in range(NEW)]))
    rate = statistics.median(rates)
    return {
        "bytes": size, "tokens_s": rate, "tokens_s_all": rates, "ms": 1e3 / rate, "share": size * rate / 1e9 / limit,
        "tokens_ms": bench_widths(decoder),
    }  # fmt: skip


def bench_widths(decoder: Decoder) -> dict[int, float]:
    """Return the milliseconds of steps of 1 to 16 tokens, in the middle of the text."""
    times = {}
    for tokens in (1, 2, 4, 8, 16):
        new = torch.ones(1, tokens, dtype=torch.int64, device=DEVICE)
        positions = torch.arange(PROMPT + NEW // 2, PROMPT + NEW // 2 + tokens, device=DEVICE)[None]
        times[tokens] = statistics.median(replay_times(lambda: decoder.next_token(new, positions), 30)) * 1e3  # noqa: B023
    return times


def trace_step(decoder: Decoder) -> list[dict[str, Any]]:
    """Return the kernels of one replay with their number and time; under a profiler edges cost more."""
    decoder.restart()
    graph = capture(decoder.step)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        graph.replay()
        torch.cuda.synchronize()
    return [
        {"kernel": event.key, "count": event.count, "us": event.device_time_total}
        for event in profile.key_averages()
    ]  # fmt: skip


def bench_compiled(decoder: Decoder) -> dict[str, Any]:
    """Time the step under torch.compile with its own CUDA graphs."""
    counters = torch._dynamo.utils.counters["inductor"]
    counters.clear()
    start = time.perf_counter()
    compiled = torch.compile(decoder.next_token, mode="reduce-overhead", fullgraph=True)
    decoder.restart()
    for _ in range(4):
        decoder.token.copy_(compiled(decoder.token.clamp(min=0), decoder.position))
        decoder.position.add_(1)
    torch.cuda.synchronize()
    first = time.perf_counter() - start

    def run() -> None:
        for _ in range(NEW):
            decoder.token.copy_(compiled(decoder.token.clamp(min=0), decoder.position))
            decoder.position.add_(1)

    decoder.restart()
    rate = NEW / timed(run)
    return {"tokens_s": rate, "compile_s": first, "cudagraph_skips": counters["cudagraph_skips"]}


def bench_peers(config: ModelConfig, limit: float) -> dict[str, Any]:
    """Time the reference, eager and compiled, in the same chains."""
    results = {}
    for name, (call, shape) in stage_calls(config, 1, reference).items():
        results[name] = {
            "eager": bench_stage(call, shape, limit),
            "compiled": bench_stage(torch.compile(call, fullgraph=True), shape, limit),
        }
    return results


def environment() -> dict[str, str]:
    """What the numbers were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": str(torch.version.cuda), "python": platform.python_version(), "commit": commit,
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    """Measure what is asked for, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--no-stages", action="store_true")
    parser.add_argument("--peers", action="store_true", help="the reference too, eager and compiled")
    parser.add_argument("--compile", action="store_true", help="the step under torch.compile too")
    parser.add_argument("--trace", action="store_true", help="list the kernels of a step")
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args()
    fused.prepare(DEVICE)
    limit = read_limit()
    results: dict[str, Any] = {"environment": environment(), "read_gb_s": limit, "stages": {}, "steps": {}}
    print(f"{results['environment']}\nread limit {limit:.0f} GB/s")
    for name in options.models:
        config = MODELS[name]
        decoder = Decoder(random_model(config))
        step = results["steps"][name] = bench_step(decoder, limit)
        base = step["tokens_ms"][1]
        widths = ", ".join(f"{n}: {ms / base:.2f}x" for n, ms in step["tokens_ms"].items())
        print(f"{name}: {step['tokens_s']:.1f} tok/s, {step['share']:.1%} of the limit; steps of {widths}", flush=True)
        if options.trace:
            step["trace"] = trace_step(decoder)
        if options.compile:
            step["compiled"] = bench_compiled(decoder)
            print(f"  compiled: {step['compiled']}", flush=True)
        del decoder
        if options.no_stages:
            continue
        stages = results["stages"][name] = {}
        for tokens in (1, 8, 16):
            for stage, (call, shape) in stage_calls(config, tokens, fused).items():
                row = stages[f"{stage} T={tokens}"] = bench_stage(call, shape, limit)
                print(f"  {stage:18s} T={tokens:2d} {row['bytes'] / 1e6:7.1f} MB {row['us']:7.2f} us {row['tb_s']:.2f} TB/s {row['share']:.1%}", flush=True)  # fmt: skip  # noqa: E501
        for filled, tokens in itertools.product((105, 205, 4096), (1, 16)):
            row = stages[f"attend L={filled} T={tokens}"] = bench_attend(config, filled, tokens, limit)
            print(
                f"  attend L={filled:4d}      T={tokens:2d} {row['bytes'] / 1e6:7.1f} MB {row['us']:7.2f} us",
                flush=True,
            )
        if options.peers:
            results["peers"] = {name: bench_peers(config, limit)}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
