"""Decode speed, each mode beside its physical limit: `python -m fastgen.bench --shape llama-2-7b`.

Prints a table; `--json` adds the records as the last line, `--output` writes them to a file. Several shapes, each in a
format of its own (`--shape llama-2-7b:int4`), are measured one after another in the same processes.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen import cli, flags
from fastgen.errors import INTERRUPTED, UsageError
from fastgen.staged import require_writable, staged_file
from tp.watch import process_watch

if TYPE_CHECKING:
    from fastgen.benchmark import Record
    from fastgen.device import Placement
    from fastgen.load import LoadedModel
    from quantize.scheme import Scheme
    from tp.dist import Ranks

PROG = "fastgen.bench"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(flags.ModelFlags, flags.ShapeFlags, flags.OutputFlags):
    """The flags of `fastgen.bench`."""

    modes: str = flags.flag(
        "eager,compile", "what to measure, comma separated (default eager,compile)", metavar="MODES"
    )
    baseline: str | None = flags.flag(None, "also measure transformers", choices=("transformers",))
    batch: int = flags.flag(1, "texts at a time", type=int, metavar="N")
    prompt_tokens: int = flags.flag(5, "length of the prompt (default 5)", type=int, metavar="N")
    new_tokens: int = flags.flag(200, "tokens to decode (default 200)", type=int, metavar="N")
    repeats: int = flags.flag(5, "texts to time, after one that warms up (default 5)", type=int, metavar="N")
    limit: float | None = flags.flag(None, "begin with no further model after so many seconds", type=float, metavar="S")
    stages: bool = flags.flag(False, "instead of whole texts, time every stage of a step beside PyTorch's")
    output: str | None = flags.flag(None, "write the records to this file as JSON", metavar="FILE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(BenchConfig, argv, prog=PROG, description="Measure decode speed beside its limit.")
    _check(config)
    if config.stages:
        return _time_stages(config)
    from fastgen.benchmark import to_json

    records: list[Record] = []
    status, phases = 0, cli.Phases()
    try:
        with cli.interruptible():
            for row in _measure_all(config, phases):
                records.append(row)
                _write(config, {"records": to_json(records)})  # what comes next may be killed
    except KeyboardInterrupt:
        status = INTERRUPTED
    _show(config, records)
    return status


def _check(config: BenchConfig) -> None:
    """Raise `UsageError` before anything is measured that would be lost."""
    from fastgen.shapes import shape

    unknown = [mode for mode in config.modes.split(",") if mode not in ("eager", "compile")]
    if unknown:
        raise UsageError(f"--modes {config.modes}: {unknown[0]!r} is none of eager, compile")
    if min(config.batch, config.prompt_tokens, config.repeats) < 1 or config.new_tokens < 2:
        raise UsageError("--batch, --prompt-tokens and --repeats are at least 1, --new-tokens at least 2")
    if config.stages and config.baseline:
        raise UsageError("--baseline: not with --stages, which stand beside PyTorch's already")
    if config.baseline and config.batch > 1:
        raise UsageError("--baseline transformers: compared at --batch 1 only")
    flags.refuse(config, ["compile"], "--modes says what is measured, compile among it")
    flags.refuse(config, ["max_seq_len"], "it follows from --prompt-tokens and --new-tokens")
    flags.refuse(config, ["fail_on_recompile"], "the records count recompiles")
    if config.shape:
        flags.refuse(config, ["model", "tokenizer"], "a --shape has random weights")
    for name, own in _models(config):
        if config.shape:
            shape(name)
        if own.quant not in (None, *flags.QUANTS):
            raise UsageError(f"--shape {name}:{own.quant}: expected one of {', '.join(flags.QUANTS)} behind the colon")
    if config.output:
        require_writable(Path(config.output), "--output")


def _models(config: BenchConfig) -> list[tuple[str, BenchConfig]]:
    """Return the models' names, each with its own flags: behind a shape's colon stands its --quant."""
    if not config.shape:
        return [(config.model, config)]
    parts = [text.partition(":") for text in config.shape]
    return [(name, dataclasses.replace(config, quant=quant) if colon else config) for name, colon, quant in parts]


def _title(name: str, own: BenchConfig) -> str:
    return f"{name} {own.quant}" if own.quant else name


def _check_formats(config: BenchConfig) -> None:
    """Raise `UsageError` for flags of quantization that do not fit a shape, before those ahead of it are measured."""
    from fastgen.shapes import shape

    for name, own in _models(config):
        if config.shape and (scheme := _scheme(own)):
            scheme.formats(shape(name))


def _measure_all(config: BenchConfig, phases: cli.Phases) -> Iterator["Record"]:
    """Yield the records of all models that --limit leaves time for."""
    from fastgen import session
    from fastgen.benchmark import forget_models

    began, watch, limits = time.monotonic(), process_watch(), list[float]()
    _check_formats(config)
    if watch.place.world > 1:
        with phases.phase("join", f"{watch.place.world} ranks"):
            session.join_ranks(config)
    for name, own in _models(config):
        if config.limit is not None and watch.share(time.monotonic() - began > config.limit):
            phases.note([f"--limit {config.limit:g}: {_title(name, own)} and what follows is left out"])
            return
        yield from _measure(own, name, phases, limits)
        forget_models()


def _measure(config: BenchConfig, name: str, phases: cli.Phases, limits: list[float]) -> Iterator["Record"]:
    """Yield the records of one model, every mode in turn, beside the highest of the `limits` read so far."""
    from fastgen import session
    from fastgen.baseline import require_comparable, time_transformers
    from fastgen.benchmark import Timing, record, time_engine
    from fastgen.device import choose_placement
    from fastgen.kernels.bandwidth import measure_read_bandwidth
    from fastgen.load import use_kernels
    from fastgen.stage_times import sum_us

    ranks, device = session.join_ranks(config)
    if config.baseline and ranks.world > 1:
        raise UsageError("--baseline transformers: with one process only")
    placement = choose_placement(device, config.dtype)
    limits.append(measure_read_bandwidth(placement.device))
    model = _load(config, name, placement, ranks, phases)
    if config.baseline:
        require_comparable(model)
    workload = {"prompt_tokens": config.prompt_tokens, "new_tokens": config.new_tokens}

    def row(timing: Timing, system: str, mode: str) -> "Record":
        return record(
            model, timing, system=system, name=name, mode=mode, batch=config.batch, read_limit=max(limits),
            all_reduce_us=sum_us(model, config.batch) if ranks.world > 1 else None, **workload,
        )  # fmt: skip

    for mode in config.modes.split(","):
        with phases.phase(mode, name):
            use_kernels(model, config.kernels, compile=mode == "compile")
            timing = time_engine(
                model, compile=mode == "compile", batch=config.batch, repeats=config.repeats, **workload
            )
        yield row(timing, "fastgen", mode if config.kernels == "auto" else f"{mode}, {config.kernels}")
    if config.baseline:
        with phases.phase("baseline", "transformers"):
            timing = time_transformers(model.config, placement, compiled=True, repeats=config.repeats, **workload)
        yield row(timing, "transformers", "compile" if placement.device.type == "cuda" else "static cache")


def _time_stages(config: BenchConfig) -> int:
    """Print the tables of `fastgen.stage_times`; --output and --json hold them and what `fastgen.step_trace` finds."""
    from fastgen import session
    from fastgen.benchmark import forget_models
    from fastgen.device import choose_placement, describe
    from fastgen.kernels.bandwidth import measure_read_bandwidth
    from fastgen.report import versions

    began = time.monotonic()
    ranks, device = session.join_ranks(config)
    if ranks.world > 1 or config.batch > 1:
        raise UsageError("--stages: with one process and --batch 1 only")
    _check_formats(config)
    placement, phases = choose_placement(device, config.dtype), cli.Phases()
    limit = measure_read_bandwidth(placement.device)
    ran = {"device": describe(placement.device), "versions": versions(), "read_limit_gb_per_second": limit}
    found: list[dict[str, object]] = [{"model": name} for name, _ in _models(config)]
    # Traces come last: what a profiler leaves behind must not slow what is timed.
    works = {"stages": _stages_of} | ({"trace": _trace_of} if placement.device.type == "cuda" else {})
    for title, work in works.items():
        for place, (name, own) in enumerate(_models(config)):
            if config.limit is not None and time.monotonic() - began > config.limit:
                phases.note([f"--limit {config.limit:g}: {title} of {_title(name, own)} left out"])
                continue
            model = _load(own, name, placement, ranks, phases)
            packing = _pack(config, model)
            # What comes first compiles the kernels that pack; what comes last shows what packing takes.
            found[place] |= {"packing": packing} if model.formats and placement.device.type == "cuda" else {}
            with phases.phase(title, name):
                for part in work(config, model, limit):
                    found[place] |= part
                    _write(config, ran | {"records": found})  # what comes next may be killed
            del model
            forget_models()
    if config.json:
        sys.stdout.write(json.dumps(_document(config, ran | {"records": found})) + "\n")
    return 0


def _pack(config: BenchConfig, model: "LoadedModel") -> dict[str, float]:
    """Let a model's stages run as chosen; return the seconds and the memory that its weights took in between."""
    from fastgen.device import synchronize
    from fastgen.load import use_kernels
    from fastgen.report import peak_memory, reset_peak_memory

    device = model.placement.device
    synchronize(device)
    reset_peak_memory(device)
    before, began = peak_memory(device), time.perf_counter()
    use_kernels(model, config.kernels, compile=True)
    synchronize(device)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "weight_bytes": model.transformer.weight_bytes(),
            "extra_peak_bytes": peak_memory(device) - before}  # fmt: skip


def _stages_of(config: BenchConfig, model: "LoadedModel", limit: float) -> Iterator[dict[str, object]]:
    """Yield the parts of a model's record that are times, and print them."""
    from fastgen.stage_times import steps_line, table, time_stages, time_steps

    filled = _filled(config)
    steps = time_steps(model, filled=filled)
    sys.stdout.write(f"{model.format}: {steps_line(steps)}\n")
    yield {"format": model.format, "filled": filled, "step_us": steps}
    timed = functools.partial(time_stages, model, filled=filled, limit=limit)
    rows = [row for tokens in (1, 8, 16) for row in timed(tokens=tokens, peers=False)]
    sys.stdout.write(table(rows) + "\n")
    yield {"stages": [dataclasses.asdict(row) for row in rows]}
    if not model.formats:
        peers = timed(tokens=1, peers=True)
        sys.stdout.write(table(peers) + "\n")
        yield {"stages_beside_pytorch": [dataclasses.asdict(row) for row in peers]}


def _trace_of(config: BenchConfig, model: "LoadedModel", limit: float) -> Iterator[dict[str, object]]:
    """Yield the kernels of a model's steps of one token and of several."""
    from fastgen.step_trace import trace_step

    filled = _filled(config)
    yield {"traces": {tokens: trace_step(model, filled=filled, tokens=tokens) for tokens in (1, 2, 8, 16)}}


def _filled(config: BenchConfig) -> int:
    """Return how many positions the middle one of a text's steps has before it."""
    return config.prompt_tokens + config.new_tokens // 2


def _load(config: BenchConfig, name: str, placement: "Placement", ranks: "Ranks", phases: cli.Phases) -> "LoadedModel":
    from fastgen import session
    from fastgen.load import random_model
    from fastgen.shapes import shape

    if not config.shape:
        return session.load(config, phases, name)
    with phases.phase("load", name):
        model = random_model(
            shape(name), placement, scheme=_scheme(config), ranks=ranks, check_ranks=config.check_ranks
        )
    return model


def _scheme(config: BenchConfig) -> "Scheme | None":
    from fastgen.load import make_scheme

    return make_scheme(config.quant, group_size=config.group_size, symmetric=config.symmetric, keep=config.keep)


def _document(config: BenchConfig, found: dict[str, object]) -> dict[str, object]:
    from fastgen.report import SCHEMA_VERSION

    return {"schema_version": SCHEMA_VERSION, "command": PROG, "config": dataclasses.asdict(config)} | found


def _write(config: BenchConfig, found: dict[str, object]) -> None:
    if config.output and process_watch().place.leads:
        with staged_file(Path(config.output)) as staging:
            staging.write_text(json.dumps(_document(config, found), indent=1) + "\n")


def _show(config: BenchConfig, records: list["Record"]) -> None:
    from fastgen.benchmark import table, to_json

    sys.stdout.write(table(records) + "\n")
    if config.json:
        sys.stdout.write(json.dumps(_document(config, {"records": to_json(records)})) + "\n")


if __name__ == "__main__":
    cli.run(main, prog=PROG)
