"""What a run measured: the metrics of one generation, for people and as JSON.

Each speed stands beside its floor: the bytes that a decode step must read, over the read bandwidth that was
measured on the same device in the same run.
"""

import itertools
import platform
import resource
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastgen.device import describe, measure_read_bandwidth
from fastgen.engine import Timings
from fastgen.load import LoadedModel

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
    prompt_tokens: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    time_to_first_token_seconds: float
    new_tokens: int
    decode_tokens_per_second: float | None
    ms_per_token: Spread | None
    weight_bytes: int
    kv_bytes: int
    gb_per_second: float | None
    read_limit_gb_per_second: float
    share_of_limit: float | None
    peak_memory_bytes: int


def measure(
    model: LoadedModel, timings: Timings, *, load_seconds: float, prompt_tokens: int, new_tokens: int
) -> Metrics:
    """Return the metrics of one text; reads the bandwidth of the model's device (a fraction of a second).

    `new_tokens` counts those that belong to the text; the first comes out of prefill, the others are decode steps.
    """
    device = model.placement.device
    times = timings.tokens[:new_tokens]
    steps = [1e3 * (late - early) for early, late in itertools.pairwise(times)]
    rate = len(steps) / (times[-1] - times[0]) if steps else None
    weights = model.transformer.weight_bytes()
    kv = model.transformer.kv_bytes(prompt_tokens + new_tokens // 2)
    speed = (weights + kv) * rate / 1e9 if rate else None
    limit = measure_read_bandwidth(device)
    prefill = timings.prefilled - timings.start
    return Metrics(
        load_seconds=load_seconds,
        prompt_tokens=prompt_tokens,
        prefill_seconds=prefill,
        prefill_tokens_per_second=prompt_tokens / prefill,
        time_to_first_token_seconds=(times[0] if times else timings.prefilled) - timings.start,
        new_tokens=new_tokens,
        decode_tokens_per_second=rate,
        ms_per_token=spread(steps) if steps else None,
        weight_bytes=weights,
        kv_bytes=kv,
        gb_per_second=speed,
        read_limit_gb_per_second=limit,
        share_of_limit=speed / limit if speed else None,
        peak_memory_bytes=peak_memory(device),
    )


def spread(values: list[float]) -> Spread:
    """Return the median, the 10th and the 90th percentile."""
    ordered = sorted(values)
    return Spread(
        statistics.median(ordered),
        ordered[len(ordered) // 10],
        ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)],
    )


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were allocated on a GPU, or that this process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summary(model: LoadedModel, metrics: Metrics) -> str:
    """Return the metrics as the lines that end a run."""
    parameters = sum(parameter.numel() for parameter in model.transformer.parameters())
    dtype = str(model.placement.dtype).removeprefix("torch.")
    lines = [
        f"load       {metrics.load_seconds:.2f} s: {parameters / 1e6:.0f}M parameters, {dtype} "
        f"({model.placement.reason}), {describe(model.placement.device)}",
        f"prompt     {metrics.prompt_tokens} tokens, {metrics.prefill_tokens_per_second:.1f} tok/s; "
        f"first token after {metrics.time_to_first_token_seconds:.3f} s",
    ]
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
    lines.append(f"memory     {metrics.peak_memory_bytes / 1e9:.2f} GB peak")
    return "\n".join(lines)


def metrics_json(metrics: Metrics) -> dict[str, object]:
    """Return the metrics as a JSON object."""
    return asdict(metrics)


def versions() -> dict[str, str | None]:
    """Return what ran: Python, torch, CUDA, and the project's commit where it runs from a checkout."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
