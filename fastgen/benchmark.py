"""Decode speed, measured: one record for each mode, each beside the floor of its own run.

A record's fields are kept for every later benchmark: `shape` or `model`, `format`, `mode`, `world_size`, `batch`,
`prompt_tokens`, `new_tokens`, `decode_tokens_per_second`, `ms_per_token` {median, p10, p90}, `weight_bytes`,
`read_limit_gb_per_second`, `share_of_limit`, `peak_memory_bytes`, `all_reduce_us`, `device`, `versions` and its
`commit`. Times are medians over all steps of all repeats, after a warm-up; a rate is batch / median step. Of several
ranks bytes, limits and shares are those of the first.
"""

import gc
import itertools
import time
from dataclasses import asdict, dataclass

import torch

from fastgen.completion import GenerationOptions
from fastgen.device import describe
from fastgen.engine import Engine
from fastgen.load import LoadedModel
from fastgen.report import Spread, aligned, peak_memory, reset_peak_memory, spread, versions


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured row; see the module's docstring."""

    system: str
    model: str
    format: str
    mode: str
    world_size: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    start_up_seconds: float  # compile and capture
    recompiles: int
    prefill_tokens_per_second: float
    time_to_first_token_seconds: float
    decode_tokens_per_second: float
    ms_per_token: Spread
    weight_bytes: int
    kv_bytes: int
    gb_per_second: float
    read_limit_gb_per_second: float
    share_of_limit: float
    peak_memory_bytes: int | None  # while the row was measured; None for other systems
    all_reduce_us: float | None  # alone, as a layer needs two; None for one rank
    device: str
    versions: dict[str, str | None]
    commit: str | None


@dataclass(frozen=True)
class Timing:
    """Raw times of one system on one workload: seconds to start, to the first token, and of every decode step."""

    start_up: float
    first_token: float
    steps: list[float]
    recompiles: int = 0
    peak_memory: int | None = None


def time_engine(
    model: LoadedModel, *, compile: bool, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> Timing:
    """Time our own engine: `repeats` texts of `new_tokens` behind a prompt of `prompt_tokens` arbitrary tokens."""
    reset_peak_memory(model.placement.device)
    start = time.perf_counter()
    engine = Engine(model, batch=batch, max_seq_len=prompt_tokens + new_tokens, compile=compile)
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
    engine.warm_up(options)
    start_up = time.perf_counter() - start
    firsts, steps = [], []
    for repeat in range(repeats + 1):
        # Each repeat has a prompt of its own: a prompt that the cache still holds would cost no prefill.
        prompt = [(repeat * 7 + at) % min(model.config.vocab_size, 256) for at in range(prompt_tokens)]
        tokens = engine.tokens([prompt] * batch, options, samples=range(batch))
        for _ in itertools.islice(tokens, new_tokens):
            pass
        if repeat:  # the first warms up
            firsts.append(engine.timings.tokens[0] - engine.timings.start)
            steps += [late - early for early, late in itertools.pairwise(engine.timings.tokens)]
    return Timing(start_up, spread(firsts).median, steps, engine.recompiles, peak_memory(engine.device))


def record(
    model: LoadedModel, timing: Timing, *, system: str, name: str, mode: str, batch: int, prompt_tokens: int,
    new_tokens: int, read_limit: float, all_reduce_us: float | None = None,
) -> Record:  # fmt: skip
    """Return the row of a timing; `read_limit` in GB/s and `all_reduce_us` come from the same run."""
    step = spread([1e3 * seconds for seconds in timing.steps])
    weights = model.transformer.weight_bytes()
    kv = model.transformer.kv_bytes(prompt_tokens + new_tokens // 2) * batch
    speed = (weights + kv) / step.median / 1e6
    ran = versions()
    return Record(
        system=system,
        model=name,
        format=model.format,
        mode=mode,
        world_size=model.ranks.world,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        start_up_seconds=timing.start_up,
        recompiles=timing.recompiles,
        prefill_tokens_per_second=prompt_tokens * batch / timing.first_token,
        time_to_first_token_seconds=timing.first_token,
        decode_tokens_per_second=1e3 * batch / step.median,
        ms_per_token=step,
        weight_bytes=weights,
        kv_bytes=kv,
        gb_per_second=speed,
        read_limit_gb_per_second=read_limit,
        share_of_limit=speed / read_limit,
        peak_memory_bytes=timing.peak_memory,
        all_reduce_us=all_reduce_us,
        device=describe(model.placement.device),
        versions=ran,
        commit=ran["commit"],
    )


def forget_models() -> None:
    """Give back the memory of models and engines that nobody holds any more, but for compiled graphs and cycles."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(records: list[Record]) -> str:
    """Return the records as lines of aligned text."""
    head = ("system", "model", "format", "mode", "tok/s", "ms/token", "p10", "p90", "GB/s", "of limit", "start-up s")
    rows = [
        (
            row.system,
            row.model,
            row.format,
            row.mode if row.batch == 1 else f"{row.mode} x{row.batch}",
            f"{row.decode_tokens_per_second:.1f}",
            f"{row.ms_per_token.median:.3f}",
            f"{row.ms_per_token.p10:.3f}",
            f"{row.ms_per_token.p90:.3f}",
            f"{row.gb_per_second:.0f}",
            f"{row.share_of_limit:.0%}",
            f"{row.start_up_seconds:.1f}",
        )
        for row in records
    ]
    return aligned([head, *rows], left=4)


def to_json(records: list[Record]) -> list[dict[str, object]]:
    """Return the records as JSON objects."""
    return [asdict(row) for row in records]
