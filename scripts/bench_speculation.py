"""What speculation gains at a known agreement: `scripts/run scripts/bench_speculation.py --shape llama-2-7b`.

The pair is synthetic (`fastgen.pairs`): a target of the shape with random weights, and its first layers as the draft,
damped by several factors, which gives several agreements. For each, and for every number of drafts:

    a          agreement: the share of drafts that were accepted, of those whose turn came
    v, c       what verifying, and what drafting one token, takes, in steps of plain decoding (medians)
    speed-up   plain decoding's time over speculation's, first token apart, the same tokens
    formula    (1 - a^(K + 1)) / ((1 - a) (v + K c)), what a, v and c promise; `share` is what came of it

`same` says whether the text is plain decoding's, token for token. `auto` has no formula, nor has a CPU. Each of
`--cases 0.01 1@0.3` is a factor and, behind an @, a temperature; an undamped pair at a low temperature is text that
nobody guesses. With --model a real target is measured instead of a shape, and whoever --draft names:

    scripts/bench_speculation.py --model stories --draft stories-draft --rounds 5
    scripts/bench_speculation.py --model smollm2 --draft ngram --prompt "$(cat poem.txt)"
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
    parser.add_argument("--model", help="a real target, as of every command, in the place of a shape")
    parser.add_argument("--draft", default="ngram", help="of a --model: a model, ngram or self:N")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--quant", choices=("int8", "int4"))
    parser.add_argument("--kernels", default="reference", choices=("reference", "fused"))
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--layers", type=int, default=2, help="layers of a shape's draft")
    parser.add_argument("--cases", nargs="+", default=["0.003", "0.01"], metavar="FACTOR[@TEMPERATURE]")
    parser.add_argument("--speculate", nargs="+", default=["3", "7", "auto"])
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="texts a figure is the median of")
    parser.add_argument("--rounds", type=int, default=1, help="times to measure all: a CPU's speed drifts")
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
    """Yield one record for every case and number of drafts."""
    target, draft = load(config)
    room = len(target.tokenizer.encode(config.prompt)) + config.new_tokens + 1
    setting = {"batch": 1, "max_seq_len": room, "compile": not config.no_compile}
    engines: dict[tuple[str, bool], Engine] = {}
    damped = 1.0
    for case in config.cases * config.rounds:
        factor, _, temperature = case.partition("@")
        sampling = SamplingOptions(temperature=float(temperature or 0))
        options = GenerationOptions(max_new_tokens=config.new_tokens, ignore_eos=True, sampling=sampling)
        if config.model is None:
            damp(target, layers=config.layers, factor=float(factor) / damped)
            damped = float(factor)
        expected, step = [], 0.0
        for count in ("plain", *config.speculate):
            kind = (count, sampling.temperature > 0)  # other kernels are compiled, and other costs measured
            if kind not in engines:
                engines[kind] = warm_engine(target, draft, count, options, setting)
            found, seconds = timed(engines[kind], options, config)
            if count == "plain":
                expected, step = found, seconds
            else:
                yield record(config, case, engines[kind], found == expected, step, seconds)


def warm_engine(
    target: LoadedModel, draft: LoadedModel | str, count: str, options: GenerationOptions, setting: dict[str, int]
) -> Engine:
    """Return an engine that decodes plainly or drafts so many tokens, ready to be timed."""
    began = time.perf_counter()
    if count == "plain":
        engine = Engine(target, **setting)
    else:
        speculation = Speculation(draft=draft, count=count if count == AUTO else int(count))
        engine = SpeculativeEngine(target, speculation, **setting)
    engine.warm_up(options)
    print(f"{count}: ready after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return engine


def load(config: argparse.Namespace) -> tuple[LoadedModel, LoadedModel | str]:
    """Return the target and its draft."""
    place = {"device": config.device, "dtype": config.dtype}
    compiled = not config.no_compile
    if config.model is None:
        scheme = make_scheme(config.quant, group_size=128, symmetric=False, keep=None)
        target = random_model(shape(config.shape), choose_placement(**place), scheme=scheme)
        use_kernels(target, config.kernels, compile=compiled)
        return target, first_layers(target, config.layers)
    target = load_model(config.model, quant=config.quant, **place)
    use_kernels(target, config.kernels, compile=compiled)
    if config.draft == "ngram" or config.draft.startswith("self:"):
        return target, config.draft
    draft = load_model(config.draft, **place)
    use_kernels(draft, config.kernels, compile=compiled)
    return target, draft


def timed(engine: Engine, options: GenerationOptions, config: argparse.Namespace) -> Run:
    """Return the last of `repeats` + 1 equal texts, and the median time.

    A GPU's is what the host waits; a CPU's the processor time of this process, which others on the machine do not
    stretch as they stretch the clock on the wall.
    """
    prompt = engine.encode([config.prompt])
    clock = time.perf_counter if engine.device.type == "cuda" else time.process_time
    seconds = []
    for _ in range(config.repeats + 1):  # the first warms up
        steps = engine.tokens(prompt, options, samples=[0])
        found, begin = [next(steps).tokens[0]], clock()
        found += [step.tokens[0] for step in itertools.islice(steps, options.max_new_tokens - 1)]
        seconds.append((clock() - begin) / (options.max_new_tokens - 1))
    return found, statistics.median(seconds[1:])


def record(
    config: argparse.Namespace, case: str, engine: SpeculativeEngine, same: bool, step: float, seconds: float
) -> dict[str, object]:
    """Return one row."""
    tally, count, target = engine.tally, engine.speculation.count, engine.model
    factor, _, temperature = case.partition("@")
    row: dict[str, object] = {
        "model": config.model or config.shape,
        "format": target.format,
        "kernels": config.kernels,
        "compiled": engine.compiled,
        "draft": config.draft if config.model else f"first {config.layers} layers",
        "factor": None if config.model else float(factor),
        "prompt": config.prompt if config.model else None,
        "drafts": count,
        "temperature": float(temperature or 0),
        "new_tokens": config.new_tokens,
        "same": same,
        "plain_ms": 1e3 * step,
        "ms_per_token": 1e3 * seconds,
        "speedup": step / seconds,
        "agreement": tally.acceptance,
        "accepted": {str(place): tally.accepted[place] for place in sorted(tally.accepted)},
        "arms": engine.figures().arms,
        "recompiles": engine.recompiles,
        "device": describe(target.placement.device),
        "versions": versions(),
    }
    if isinstance(count, int) and engine.device.type == "cuda":
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
