"""Where a decode step's time goes: every stage alone, beside its bytes and its limit, and whole steps by their width.

A stage is timed as a chain over all of a model's layers, so that its weights come from memory and not from a cache: on
CUDA as the replay of a graph, as in decoding. (Keys and values of a short text may stay in the cache, and so may the
smaller weights of a small model.) Kernels overlap, so the stages' sum is not the step: what a stage costs there is how
much shorter the step is without it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.graphs import without_collection
from fastgen.kernels import reference
from fastgen.kernels.reference import Step
from fastgen.load import LoadedModel
from fastgen.model import Stages, tensor_bytes
from fastgen.options import SamplingOptions
from fastgen.report import aligned
from fastgen.steps import Rows, decode_one_token

REPLAYS = 20
HEADS = 4  # calls of the head in a chain
SUMS = 64  # over the ranks, in a chain
WIDTHS = (1, 2, 4, 8, 16)

Call = Callable[[Any, Any], Tensor]
"""A stage of a namespace of stages, on one `fastgen.model.Block`."""


class TimedStage(NamedTuple):
    """How a stage is called, the bytes that a call must read, and something of its output's shape."""

    call: Call
    bytes: int
    output: Tensor


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """One stage at `tokens` new tokens: bytes it must read and microseconds, a call; PyTorch's where comparable."""

    stage: str
    tokens: int
    calls: int  # in a step
    bytes: int
    us: float
    us_in_step: float  # by which a step without this stage is shorter
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
    timed = stages_of(model, filled, tokens)
    whole = _step_without(model, timed, None, filled, tokens)
    for name, stage in timed.items():
        chain, calls = (layers[:1] * HEADS, 1) if name == "greedy_head" else (layers, len(layers))
        us = 1e6 / len(chain) * _seconds(model, lambda: [stage.call(transformer.stages, block) for block in chain])  # noqa: B023
        eager_us, compiled_us = _peers(model, stage.call, chain) if peers else (None, None)
        found.append(
            StageTime(
                stage=name,
                tokens=tokens,
                calls=calls,
                bytes=stage.bytes,
                us=us,
                us_in_step=1e6 / calls * (whole - _step_without(model, timed, name, filled, tokens)),
                tb_per_second=stage.bytes / us / 1e6,
                share_of_limit=stage.bytes / us / 1e3 / limit,
                eager_us=eager_us,
                compiled_us=compiled_us,
            )
        )
    return found


def _peers(model: LoadedModel, call: Call, chain: list[nn.Module]) -> tuple[float, float]:
    """Return the microseconds of a call of PyTorch's stage, eager and compiled."""
    # All stages of all models share this function's code, of which PyTorch keeps eight graphs, and sizes that differ
    # from the last model's would become dynamic.
    torch._dynamo.reset()
    compiled = torch.compile(lambda block: call(reference, block), fullgraph=True, dynamic=False)
    eager = _seconds(model, lambda: [call(reference, block) for block in chain])
    return 1e6 / len(chain) * eager, 1e6 / len(chain) * _seconds(model, lambda: [compiled(b) for b in chain])


def _step_without(
    model: LoadedModel, timed: dict[str, TimedStage], name: str | None, filled: int, tokens: int
) -> float:
    """Return the seconds of a step of stages of which one does nothing: its output is there already."""
    transformer, stages = model.transformer, model.transformer.stages
    kept = SimpleNamespace(**{each: getattr(stages, each) for each in Stages.__annotations__})
    if name is not None and name.startswith("linear_add"):
        skipped = {id(getattr(block, name.split()[1])) for block in transformer.layers}
        kept.linear_add = lambda x, linear, residual: (
            residual if id(linear) in skipped else stages.linear_add(x, linear, residual)
        )
    elif name is not None:
        setattr(kept, name, lambda *_, **__: timed[name].output)
    transformer.stages = kept
    try:
        return _seconds(model, _step(model, filled, tokens))
    finally:
        transformer.stages = stages


def stages_of(model: LoadedModel, filled: int, tokens: int) -> dict[str, TimedStage]:
    """Return what can be timed of a step, in its order."""
    config, device, dtype = model.transformer.config, model.placement.device, model.placement.dtype
    x, y, h, qkv = (
        torch.randn(1, tokens, width, device=device).to(dtype)
        for width in (config.dim, config.q_dim, config.hidden_dim, config.q_dim + 2 * config.kv_dim)
    )
    ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
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
        "norm_linear": TimedStage(
            lambda stages, b: stages.norm_linear(x, b.attention_norm, b.wqkv), _bytes(block.wqkv), qkv
        ),
        "attend": TimedStage(attend, kv, y),
        "linear_add wo": TimedStage(lambda stages, b: stages.linear_add(y, b.wo, x), _bytes(block.wo), x),
        "norm_swiglu": TimedStage(
            lambda stages, b: stages.norm_swiglu(x, b.ffn_norm, b.w_gate_up), _bytes(block.w_gate_up), h
        ),
        "linear_add w_down": TimedStage(lambda stages, b: stages.linear_add(h, b.w_down, x), _bytes(block.w_down), x),
        "greedy_head": TimedStage(lambda stages, _: stages.greedy_head(x, norm, lm_head), _bytes(lm_head), ids),
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
def sum_us(model: LoadedModel, tokens: int) -> float:
    """Return the microseconds of a sum over the ranks as a layer of a step of `tokens` tokens needs two, each in need
    of the one before and by itself, apart from products; all ranks call it together."""
    part = torch.zeros(tokens, 1, model.config.dim, device=model.placement.device)

    def chain() -> Tensor:
        residual = part.to(model.placement.dtype)
        for _ in range(SUMS):
            residual = model.ranks.sum_add(part, residual)
        return residual

    return 1e6 / SUMS * _seconds(model, chain)


@torch.inference_mode()
def capture_step(model: LoadedModel, *, filled: int, tokens: int) -> torch.cuda.CUDAGraph:
    """Return the graph of a greedy step of so many tokens behind `filled` on CUDA; the graph before its instance is
    kept."""
    model.transformer.allocate_cache(1, filled + tokens)
    return _capture(_step(model, filled, tokens), keep_graph=True)


def greedy_rows(device: torch.device) -> Rows:
    """Return the rows of one text that is decoded greedily, its token and position still 0."""
    nothing = torch.zeros(1, dtype=torch.int64, device=device)
    return Rows(
        token=nothing.clone(), positions=nothing.clone(), seed=nothing[0], samples=nothing,
        knobs=torch.zeros(4, dtype=torch.float64, device=device), seen=nothing[:0], text=nothing[:0],
    )  # fmt: skip


def _step(model: LoadedModel, filled: int, tokens: int) -> Callable[[], object]:
    """Return a greedy step: of one token the one that decodes, of more what verifies drafts."""
    transformer, device = model.transformer, model.placement.device
    keys, length = torch.arange(filled + tokens, device=device), torch.tensor([filled + tokens], device=device)
    if tokens == 1:
        rows = greedy_rows(device)
        rows.positions.fill_(filled)
        return lambda: decode_one_token(transformer, rows, keys, SamplingOptions(), logprobs=False)
    ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
    positions = torch.arange(filled, filled + tokens, device=device)[None]
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


def _capture(function: Callable[[], object], *, keep_graph: bool = False) -> torch.cuda.CUDAGraph:
    """Run a function until it has compiled what it needs, then record it, and replay it once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
    with without_collection(), torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def table(rows: list[StageTime]) -> str:
    """Return stages, one line each."""
    head = (
        "stage", "tokens", "calls", "MB", "us", "in a step", "TB/s", "of limit", "eager us", "compiled us", "us a step",
    )  # fmt: skip
    lines = [
        (
            row.stage,
            str(row.tokens),
            str(row.calls),
            f"{row.bytes / 1e6:.1f}",
            f"{row.us:.2f}",
            f"{row.us_in_step:.2f}",
            f"{row.tb_per_second:.2f}",
            f"{row.share_of_limit:.0%}",
            *("-" if us is None else f"{us:.2f}" for us in (row.eager_us, row.compiled_us)),
            f"{row.calls * row.us_in_step:.0f}",
        )
        for row in rows
    ]
    return aligned([head, *lines], left=1)


def steps_line(steps: dict[int, float]) -> str:
    """Return the times of whole steps by their width in a line."""
    return "steps: " + ", ".join(f"{tokens}: {us:.0f} us ({us / steps[1]:.2f}x)" for tokens, us in steps.items())
