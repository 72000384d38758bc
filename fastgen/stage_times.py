"""Where a decode step's time goes: every stage alone, beside its bytes and its limit, and whole steps by their width.

A stage is timed as a chain over all of a model's layers, so that its weights come from memory and not from a cache: on
CUDA as the replay of a graph, as in decoding. The sum over the stages need not be the step: kernels overlap.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.kernels import reference
from fastgen.kernels.reference import Step
from fastgen.load import LoadedModel
from fastgen.model import tensor_bytes
from fastgen.report import aligned

REPLAYS = 20
HEADS = 4  # calls of the head in a chain
WIDTHS = (1, 2, 4, 8, 16)

Call = Callable[[Any, Any], Tensor]
"""A stage of a namespace of stages, on one `fastgen.model.Block`."""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """One stage at `tokens` new tokens: bytes it must read and microseconds, a call; PyTorch's where comparable."""

    stage: str
    tokens: int
    calls: int  # in a step
    bytes: int
    us: float
    tb_per_second: float
    share_of_limit: float
    eager_us: float | None
    compiled_us: float | None


@torch.inference_mode()
def time_stages(model: LoadedModel, *, filled: int, tokens: int, limit: float, peers: bool) -> list[StageTime]:
    """Time the stages of one text's step of `tokens` tokens behind `filled`, beside `limit` in GB/s.

    With `peers`, PyTorch's eager and compiled stages too. The model's cache is replaced.
    """
    transformer = model.transformer
    transformer.allocate_cache(1, filled + tokens)
    layers, found = list(transformer.layers), []
    for stage, (call, size) in _stages(model, filled, tokens).items():
        chain = layers if stage != "greedy_head" else layers[:1] * HEADS
        us = 1e6 / len(chain) * _seconds(model, lambda: [call(transformer.stages, block) for block in chain])  # noqa: B023
        eager_us, compiled_us = _peers(model, call, chain) if peers else (None, None)
        found.append(
            StageTime(
                stage=stage,
                tokens=tokens,
                calls=len(layers) if stage != "greedy_head" else 1,
                bytes=size,
                us=us,
                tb_per_second=size / us / 1e6,
                share_of_limit=size / us / 1e3 / limit,
                eager_us=eager_us,
                compiled_us=compiled_us,
            )
        )
    return found


def _peers(model: LoadedModel, call: Call, chain: list[nn.Module]) -> tuple[float, float]:
    """Return the microseconds of a call of PyTorch's stage, eager and compiled."""
    compiled = torch.compile(lambda block: call(reference, block), fullgraph=True)
    eager = _seconds(model, lambda: [call(reference, block) for block in chain])
    return 1e6 / len(chain) * eager, 1e6 / len(chain) * _seconds(model, lambda: [compiled(b) for b in chain])


def _stages(model: LoadedModel, filled: int, tokens: int) -> dict[str, tuple[Call, int]]:
    """Return every stage as a function of a layer, and the bytes that it must read."""
    config, device, dtype = model.transformer.config, model.placement.device, model.placement.dtype
    x, y, h, qkv = (
        torch.randn(1, tokens, width, device=device).to(dtype)
        for width in (config.dim, config.q_dim, config.hidden_dim, config.q_dim + 2 * config.kv_dim)
    )
    positions = torch.arange(filled, filled + tokens, device=device)[None]
    keys, length = torch.arange(filled + tokens, device=device), torch.tensor([filled + tokens], device=device)
    step = Step(positions, keys, reference.rotations(positions, length, model.transformer.rope))
    block: Any = model.transformer.layers[0]
    norm, lm_head = model.transformer.norm, model.transformer.lm_head
    kv = model.transformer.kv_bytes(filled) // config.n_layers

    def attend(stages: Any, b: Any) -> Tensor:
        return stages.attend(
            qkv, b.k_cache, b.v_cache, step, scale=b.scale, window=b.window, q_norm=b.q_norm, k_norm=b.k_norm
        )

    return {
        "norm_linear": (lambda stages, b: stages.norm_linear(x, b.attention_norm, b.wqkv), _bytes(block.wqkv)),
        "attend": (attend, kv),
        "linear_add wo": (lambda stages, b: stages.linear_add(y, b.wo, x), _bytes(block.wo)),
        "norm_swiglu": (lambda stages, b: stages.norm_swiglu(x, b.ffn_norm, b.w_gate_up), _bytes(block.w_gate_up)),
        "linear_add w_down": (lambda stages, b: stages.linear_add(h, b.w_down, x), _bytes(block.w_down)),
        "greedy_head": (lambda stages, _: stages.greedy_head(x, norm, lm_head), _bytes(lm_head)),
    }


@torch.inference_mode()
def time_steps(model: LoadedModel, *, filled: int) -> dict[int, float]:
    """Return the microseconds of whole greedy steps of 1 to 16 new tokens behind `filled`."""
    return {tokens: 1e6 * step_seconds(model, filled=filled, tokens=tokens) for tokens in WIDTHS}


@torch.inference_mode()
def step_seconds(model: LoadedModel, *, filled: int, tokens: int) -> float:
    """Return the seconds of a whole greedy step of so many new tokens behind `filled`."""
    model.transformer.allocate_cache(1, filled + tokens)
    return _seconds(model, _step(model, filled, tokens))


@torch.inference_mode()
def trace_step(model: LoadedModel, *, filled: int) -> list[dict[str, object]]:
    """Return the kernels of one step on CUDA: name, how often, microseconds together (a profiler slows edges)."""
    model.transformer.allocate_cache(1, filled + 1)
    graph = _capture(_step(model, filled, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return [{"kernel": event.key, "count": event.count, "us": event.device_time_total} for event in events]


def _step(model: LoadedModel, filled: int, tokens: int) -> Callable[[], object]:
    transformer, device = model.transformer, model.placement.device
    ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
    positions = torch.arange(filled, filled + tokens, device=device)[None]
    keys, length = torch.arange(filled + tokens, device=device), torch.tensor([filled + tokens], device=device)
    return lambda: transformer.greedy_token(transformer(ids, positions, keys, length))


def _bytes(linear: nn.Module) -> int:
    return sum(tensor_bytes(tensor) for tensor in (*linear.parameters(), *linear.buffers()))


def _seconds(model: LoadedModel, function: Callable[[], object]) -> float:
    """Return the median seconds of a function: of replays on CUDA, else of calls."""
    if model.placement.device.type != "cuda":
        function()
        return statistics.median(_clocked(function) for _ in range(5))
    graph, times = _capture(function), []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _clocked(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Run a function until it has compiled what it needs, then record it, and replay it once."""
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


def table(name: str, rows: list[StageTime], steps: dict[int, float]) -> str:
    """Return the stages of a step, one line each, then the whole steps."""
    head = ("stage", "tokens", "calls", "MB", "us", "TB/s", "of limit", "eager us", "compiled us", "us a step")
    lines = [
        (
            row.stage,
            str(row.tokens),
            str(row.calls),
            f"{row.bytes / 1e6:.1f}",
            f"{row.us:.2f}",
            f"{row.tb_per_second:.2f}",
            f"{row.share_of_limit:.0%}",
            *("-" if us is None else f"{us:.2f}" for us in (row.eager_us, row.compiled_us)),
            f"{row.calls * row.us:.0f}",
        )
        for row in rows
    ]
    widths = ", ".join(f"{tokens}: {us:.0f} us ({us / steps[1]:.2f}x)" for tokens, us in steps.items())
    return f"{name}\n{aligned([head, *lines], left=1)}\nsteps of so many tokens: {widths}"
