"""What speculation gains at a known agreement: `scripts/run scripts/bench_speculation.py --shape llama-2-7b`.

The pair is synthetic (`fastgen.pairs`): a target of the shape with random weights, and its first layers as the draft,
damped by several factors, which gives several agreements. For each, and for every number of drafts:

    a          agreement: the share of drafts that were accepted, of those whose turn came
    v, c       what verifying, and what drafting one token, takes, in steps of plain decoding (medians)
    speed-up   plain decoding's time over speculation's, first token apart, the same tokens
    formula    (1 - a^(K + 1)) / ((1 - a) (v + K c)), what a, v and c promise; `share` is what came of it

`same` says whether the text is plain decoding's, token for token. `auto` has no formula. With --pair the embedded pair
is measured instead of a shape.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastgen.device import choose_placement, describe
from fastgen.engine import Engine
from fastgen.load import LoadedModel, load_model, make_scheme, random_model, use_kernels
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.pairs import damp, first_layers
from fastgen.report import versions
from fastgen.shapes import shape
from fastgen.speculation import AUTO, Speculation
from fastgen.speculative import SpeculativeEngine

Run = tuple[list[int], float]
"""The tokens of a text, and the seconds a token that all but the first took."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print one row each, and write the records as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--pair", action="store_true")
    parser.add_argument("--quant", choices=("int8", "int4"))
    parser.add_argument("--kernels", default="reference", choices=("reference", "fused"))
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--layers", type=int, default=2, help="layers of the draft")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.003, 0.01])
    parser.add_argument("--speculate", nargs="+", default=["3", "7", "auto"])
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: sampled, drafts coupled")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output")
    config = parser.parse_args(argv)
    records: list[dict[str, object]] = []
    for row in measure(config):
        records.append(row)
        print(line(row), flush=True)
        if config.output:
            Path(config.output).write_text(json.dumps({"records": records}, indent=1) + "\n")
    return 0


def measure(config: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield one record for every factor and number of drafts."""
    target, draft = load(config)
    setting = {"batch": 1, "max_seq_len": config.new_tokens + 64, "compile": not config.no_compile}
    sampling = SamplingOptions(temperature=config.temperature)
    options = GenerationOptions(max_new_tokens=config.new_tokens, ignore_eos=True, sampling=sampling)
    plain = Engine(target, **setting)
    began = time.perf_counter()
    plain.warm_up(options)
    print(f"plain: ready after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    engines: dict[str, SpeculativeEngine] = {}
    damped = 1.0
    for factor in config.factors:
        if not config.pair:
            damp(target, layers=config.layers, factor=factor / damped)
            damped = factor
        expected, step = timed(plain, options, config)
        for count in config.speculate:
            if count not in engines:
                began = time.perf_counter()
                speculation = Speculation(draft=draft, count=count if count == AUTO else int(count))
                engines[count] = SpeculativeEngine(target, speculation, **setting)
                engines[count].warm_up(options)
                print(f"{count}: ready after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
            found, seconds = timed(engines[count], options, config)
            yield record(config, target, engines[count], factor, found == expected, step, seconds)


def load(config: argparse.Namespace) -> tuple[LoadedModel, LoadedModel]:
    """Return the target and its draft."""
    placement = choose_placement(config.device, config.dtype)
    if config.pair:
        target = load_model("stories", device=config.device, dtype=config.dtype, quant=config.quant)
        draft = load_model("stories-draft", device=config.device, dtype=config.dtype)
        use_kernels(draft, config.kernels, compile=not config.no_compile)
    else:
        scheme = make_scheme(config.quant, group_size=128, symmetric=False, keep=None)
        target = random_model(shape(config.shape), placement, scheme=scheme)
    use_kernels(target, config.kernels, compile=not config.no_compile)
    return target, draft if config.pair else first_layers(target, config.layers)


def timed(engine: Engine, options: GenerationOptions, config: argparse.Namespace) -> Run:
    """Return the last of `repeats` + 1 equal texts, and the median time."""
    prompt = engine.encode(["Once upon a time"])
    seconds = []
    for _ in range(config.repeats + 1):  # the first warms up
        steps = engine.tokens(prompt, options, samples=[0])
        found = [step.tokens[0] for step in itertools.islice(steps, options.max_new_tokens)]
        seconds.append((engine.timings.tokens[-1] - engine.timings.tokens[0]) / (len(engine.timings.tokens) - 1))
    return found, statistics.median(seconds[1:])


def record(
    config: argparse.Namespace, target: LoadedModel, engine: SpeculativeEngine, factor: float, same: bool,
    step: float, seconds: float,
) -> dict[str, object]:  # fmt: skip
    """Return one row."""
    tally, count = engine.tally, engine.speculation.count
    row: dict[str, object] = {
        "model": "stories" if config.pair else config.shape,
        "format": target.format,
        "kernels": config.kernels,
        "compiled": engine.compiled,
        "draft": "stories-draft" if config.pair else f"first {config.layers} layers",
        "factor": None if config.pair else factor,
        "drafts": count,
        "temperature": config.temperature,
        "new_tokens": config.new_tokens,
        "same": same,
        "plain_ms": 1e3 * step,
        "ms_per_token": 1e3 * seconds,
        "speedup": step / seconds,
        "agreement": tally.acceptance,
        "accepted": {str(place): tally.accepted[place] for place in sorted(tally.accepted)},
        "arms": {f"{engine.drafters[arm.drafter].name} {arm.drafts}": rounds for arm, rounds in tally.arms.items()},
        "recompiles": engine.recompiles,
        "device": describe(target.placement.device),
        "versions": versions(),
    }
    if isinstance(count, int):
        a, v = tally.acceptance or 0.0, statistics.median(tally.verify_seconds) / step
        c = statistics.median(tally.draft_seconds) / count / step
        expected = (count + 1 if a == 1 else (1 - a ** (count + 1)) / (1 - a)) / (v + count * c)
        row |= {"verify_steps": v, "draft_steps": c, "formula": expected, "share": step / seconds / expected}
    return row


def line(row: dict[str, object]) -> str:
    """Return a record as a line of text."""
    number = {name: value for name, value in row.items() if isinstance(value, float)}
    words = [f"{name}={row[name]}" for name in ("drafts", "factor", "temperature", "same")]
    parts = [f"{row['model']} {row['format']}", *words]
    parts += [f"{name} {value:.3f}" for name, value in number.items() if name not in ("factor", "temperature")]
    return "  ".join([*parts, str(row["arms"])])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
