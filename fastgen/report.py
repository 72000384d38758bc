"""What a run measured: the metrics of one generation, for people and as JSON.

Each speed stands beside its floor: the bytes that a decode step must read, over the read bandwidth that was
measured on the same device in the same run.
"""

import itertools
import os
import platform
import resource
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastgen.completion import Completion
from fastgen.device import describe
from fastgen.engine import Engine, Timings
from fastgen.kernels.bandwidth import measure_read_bandwidth
from fastgen.load import LoadedModel
from fastgen.model import parameter_count
from fastgen.speculative import SpeculativeEngine
from fastgen.staged import require_writable, staged_file
from fastgen.tally import SpeculationMetrics

SCHEMA_VERSION = 1
"""Of every JSON document; raised when a field changes its meaning or goes."""


@dataclass(frozen=True)
class Spread:
    """Median and spread of repeated measurements."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One run's figures; bytes, seconds, and GB/s of 1e9 bytes. Rates are None where nothing was timed."""

    load_seconds: float
    compile_seconds: float
    recompiles: int  # graphs compiled after the start
    batch: int
    prompt_tokens: int  # of all rows, as are new_tokens and the rates
    prefill_seconds: float | None
    prefill_tokens_per_second: float | None
    time_to_first_token_seconds: float | None
    new_tokens: int
    decode_tokens_per_second: float | None
    ms_per_token: Spread | None
    weight_bytes: int
    kv_bytes: int
    gb_per_second: float | None
    read_limit_gb_per_second: float | None
    share_of_limit: float | None
    peak_memory_bytes: int
    speculation: SpeculationMetrics | None = None


def measure(
    engine: Engine, completions: Sequence[Completion], *, load_seconds: float, compile_seconds: float
) -> Metrics:
    """Return the metrics of the engine's last generation, finished or interrupted.

    The first token of a text comes out of prefill, the others are decode steps. Measures the device's bandwidth last,
    which takes a fraction of a second and memory of its own, if there is a speed to stand beside it.
    """
    timings, model = engine.timings, engine.model.transformer
    prompt = sum(len(row.prompt_tokens) for row in completions)
    counts = [len(row.tokens) for row in completions]
    times = timings.tokens[: max(counts)]
    steps = [1e3 * (late - early) for early, late in itertools.pairwise(times)]
    made, seconds = timings.decoded(len(times)) if steps else (0, None)
    weights = model.weight_bytes()
    kv = sum(model.kv_bytes(len(row.prompt_tokens) + len(row.tokens) // 2) for row in completions)
    speculation = engine.figures() if isinstance(engine, SpeculativeEngine) else None
    passes = sum(speculation.arms.values()) if speculation and speculation.rounds else made
    speed = (weights + kv) * passes / seconds / 1e9 if seconds else None
    prefill = timings.prefilled - timings.start if timings.prefilled else None
    peak = peak_memory(engine.device)
    limit = measure_read_bandwidth(engine.device) if speed else None
    return Metrics(
        load_seconds=load_seconds,
        compile_seconds=compile_seconds,
        recompiles=engine.recompiles,
        batch=engine.batch,
        prompt_tokens=prompt,
        prefill_seconds=prefill,
        prefill_tokens_per_second=prompt / prefill if prefill else None,
        time_to_first_token_seconds=times[0] - timings.start if times else None,
        new_tokens=sum(counts),
        decode_tokens_per_second=(sum(counts) - len(counts)) / seconds if seconds else None,
        ms_per_token=spread(steps) if steps else None,
        weight_bytes=weights,
        kv_bytes=kv,
        gb_per_second=speed,
        read_limit_gb_per_second=limit,
        share_of_limit=speed / limit if speed and limit else None,
        peak_memory_bytes=peak,
        speculation=speculation,
    )


def compared(metrics: Metrics, plain: Timings, plain_tokens: Sequence[int], tokens: Sequence[int]) -> Metrics:
    """Return the metrics with those of plain decoding, of the same text in the same process, beside speculation's."""
    if metrics.speculation is None or metrics.decode_tokens_per_second is None or len(plain_tokens) < 2:
        return metrics
    _, seconds = plain.decoded(len(plain_tokens))
    step = seconds / (len(plain_tokens) - 1)
    speculation = replace(
        metrics.speculation,
        plain_ms_per_token=1e3 * step,
        speedup=step * metrics.decode_tokens_per_second / metrics.batch,
        same_text=list(plain_tokens) == list(tokens),
    )
    return replace(metrics, speculation=speculation)


def spread(values: list[float]) -> Spread:
    """Return the median, the 10th and the 90th percentile."""
    ordered = sorted(values)
    return Spread(
        statistics.median(ordered),
        ordered[len(ordered) // 10],
        ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)],
    )


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can (on a CPU, only Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were allocated on a GPU, or that this process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def aligned(rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """Return rows of cells as lines of aligned text, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justify = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join(
        "  ".join(align(cell, width) for align, cell, width in zip(justify, row, widths, strict=True)) for row in rows
    )


def summary(model: LoadedModel, metrics: Metrics) -> str:
    """Return the metrics as the lines that end a run."""
    dtype = str(model.placement.dtype).removeprefix("torch.")
    lines = [
        f"load       {metrics.load_seconds:.2f} s: {parameter_count(model.config) / 1e6:.0f}M parameters, {dtype} "
        f"({model.placement.reason}), {describe(model.placement.device)}",
    ]
    if metrics.prefill_tokens_per_second is None or metrics.time_to_first_token_seconds is None:
        lines.append(f"prompt     {metrics.prompt_tokens} tokens, not finished")
    else:
        lines.append(
            f"prompt     {metrics.prompt_tokens} tokens, {metrics.prefill_tokens_per_second:.1f} tok/s; "
            f"first token after {metrics.time_to_first_token_seconds:.3f} s"
        )
    step, speed, share = metrics.ms_per_token, metrics.gb_per_second, metrics.share_of_limit
    if step is None or speed is None or share is None:
        lines.append(f"decode     {metrics.new_tokens} token(s): too few to time")
    else:
        lines += [
            f"decode     {metrics.new_tokens} tokens, {metrics.decode_tokens_per_second:.1f} tok/s; "
            f"{step.median:.2f} ms/token median, {step.p90:.2f} p90",
            f"bandwidth  {speed:.1f} GB/s of weights and cache: {share:.0%} of the "
            f"{metrics.read_limit_gb_per_second:.1f} GB/s that this device reads",
        ]
    if metrics.speculation:
        lines += metrics.speculation.lines()
    if metrics.compile_seconds:
        lines.append(f"compile    {metrics.compile_seconds:.1f} s; {metrics.recompiles} recompiles after the start")
    lines.append(f"memory     {metrics.peak_memory_bytes / 1e9:.2f} GB peak")
    return "\n".join(lines)


@contextmanager
def profile(path: Path) -> Iterator[None]:
    """Write what runs inside to `path`, a trace that ui.perfetto.dev shows: operators, and kernels on a GPU."""
    require_writable(path, "--profile")
    with torch.profiler.profile() as profiler:
        yield
    with staged_file(path) as staging:
        profiler.export_chrome_trace(str(staging))


def versions() -> dict[str, str | None]:
    """Return what ran: Python, torch, CUDA, and the project's commit: the checkout's, else FASTGEN_COMMIT's.

    The variable serves copies that were made without git, on a machine that is lent for a measurement.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("FASTGEN_COMMIT")
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
