"""What speculation gains at a known agreement: `scripts/run scripts/bench_speculation.py --shape llama-2-7b`.

The pair is synthetic (`fastgen.pairs`): a target of the shape with random weights, and its first layers as the draft,
damped by several factors, which gives several agreements. Each of `--cases` is what makes one:

    a0.9       an agreement: a factor that gives it is searched for
    0.01       a factor; one far above 1 makes the later layers drown what the first have said: nobody guesses that text
    1@0.3      a factor, and the temperature of a sampled text
    ngram@1    n-grams in the place of the draft, here on a text that is sampled at random

For each, and for every number of drafts:

    a          agreement: the share of drafts that were accepted, of those whose turn came
    v, c       what verifying, and what drafting one token, takes, in steps of plain decoding (medians)
    speed-up   plain decoding's time over speculation's, first token apart, the same tokens
    formula    (1 - a^(K + 1)) / ((1 - a) (v + K c)), what a, v and c promise; `share` is what came of it

`same` says whether the text is plain decoding's, token for token. `auto` has no formula, nor has a CPU. Records are
written as they come, and none is begun that would not end within --limit seconds if it took as long as the last. With
--model a real target is measured instead of a shape, and whoever --draft names:

    scripts/bench_speculation.py --model stories --draft stories-draft --rounds 5
    scripts/bench_speculation.py --model smollm2 --draft ngram --prompt "$(cat poem.txt)"
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch

from fastgen import cli
from fastgen.device import choose_placement, describe
from fastgen.engine import Engine
from fastgen.load import LoadedModel, load_model, make_scheme, random_model, use_kernels
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.pairs import damp, first_layers
from fastgen.report import versions
from fastgen.shapes import SHAPES, shape
from fastgen.speculation import AUTO, Speculation
from fastgen.speculative import SpeculativeEngine

CASES = ["a0.97", "a0.9", "a0.8", "a0.5", "100", "ngram@1"]

PLAIN = "plain"

FIRST_FACTOR, GAIN, TRIES, CLOSE = 0.01, 0.7, 20, 0.015
"""Where the search for a factor begins, by how much its logarithm moves for each unit by which the agreement's log-odds
are off, how many factors are tried, and how close an agreement is close enough."""

SEARCH_COUNT = "4"
"""Drafts a round while it is searched for."""

Run = tuple[list[int], float]
"""The tokens of a text, and the seconds a token that all but the first took."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print one row each, and write the records as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--model", help="a real target, as of every command, in the place of a shape")
    parser.add_argument("--draft", default="ngram", help="of a --model: a model, ngram or self:N")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--quant", choices=("int8", "int4"))
    parser.add_argument("--kernels", default="reference", choices=("reference", "fused"))
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--layers", type=int, default=2, help="layers of a shape's draft")
    parser.add_argument("--cases", nargs="+", type=Case.parse, metavar="CASE", help="of a shape: " + " ".join(CASES))
    parser.add_argument("--speculate", nargs="+", default=["2", "4", "7", "auto"])
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds that all may take")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="texts a figure is the median of")
    parser.add_argument("--rounds", type=int, default=1, help="times to measure all: a CPU's speed drifts")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output")
    config = parser.parse_args(argv)
    records: list[dict[str, object]] = []
    for row in within(config.limit, measure(config)):
        records.append(row)
        print(line(row), flush=True)
        if config.output:
            Path(config.output).write_text(json.dumps({"records": records}, indent=1) + "\n")
    return 0


def within(limit: float, rows: Iterator[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Yield rows as long as the next would come within so many seconds if it took as long as the last."""
    start = begin = time.perf_counter()
    for row in rows:
        yield row
        now = time.perf_counter()
        if 2 * now - begin - start > limit:
            print(f"ends after {now - start:.0f} s: the next row may take {now - begin:.0f} s", file=sys.stderr)
            return
        begin = now


class Case(NamedTuple):
    """What makes a text and how far it can be guessed: a factor, or an agreement whose factor is searched for."""

    draft: str
    agreement: float | None
    factor: float
    temperature: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a case as the command line has it; raises `ValueError` where it is none."""
        kind, _, temperature = text.partition("@")
        agreement = float(kind[1:]) if kind.startswith("a") else None
        factor = 1.0 if kind == "ngram" or agreement is not None else float(kind)
        return cls("ngram" if kind == "ngram" else "model", agreement, factor, float(temperature or 0))


class Pair:
    """A target, its draft, and engines of both that are warm."""

    def __init__(self, config: argparse.Namespace) -> None:
        self.config = config
        self.target, self.draft = load(config)
        room = len(self.target.tokenizer.encode(config.prompt)) + config.new_tokens + 1
        self._setting = {"batch": 1, "max_seq_len": room, "compile": not config.no_compile}
        self._engines: dict[tuple[str, str, bool], Engine] = {}
        self.damped = 1.0

    def damp(self, factor: float) -> None:
        """Let the later layers write so many times what they once did."""
        damp(self.target, layers=self.config.layers, factor=factor / self.damped)
        self.damped = factor
        for engine in self._engines.values():
            engine.weights_changed()

    def engine(self, draft: str, count: str, options: GenerationOptions) -> Engine:
        """Return a warm engine; for sampled texts other kernels are compiled, and other costs measured."""
        kind = (draft, count, options.sampling.temperature > 0)
        if kind not in self._engines:
            drafter = "ngram" if draft == "ngram" else self.draft
            self._engines[kind] = warm_engine(self.target, drafter, count, options, self._setting)
        return self._engines[kind]

    def search(self, wanted: float, options: GenerationOptions) -> float:
        """Return a factor that gives this agreement within `CLOSE`, or the closest that was found.

        The more the later layers add, the less the two agree; but each factor makes another text, and 200 tokens tell
        an agreement to some 0.03 only. So no range is ever given up: each try moves by how far off the last was,
        and the less the oftener that changed its sign (stochastic approximation with Kesten's rule, 1958).
        """
        factor, off, crossings, found = FIRST_FACTOR, 0.0, 0, (math.inf, 0.0)
        for _ in range(TRIES):
            self.damp(factor)
            engine = self.engine("model", SEARCH_COUNT, options)
            texts = engine.tokens(engine.encode([self.config.prompt]), options, samples=[0])
            for _ in itertools.islice(texts, options.max_new_tokens):
                pass
            agreement = engine.tally.acceptance or 0.0
            found = min(found, (abs(agreement - wanted), factor))
            if found[0] <= CLOSE:
                break
            before, off = off, log_odds(agreement) - log_odds(wanted)
            crossings += before * off < 0
            factor *= math.exp(GAIN / (1 + crossings) * off)
        return found[1]


def log_odds(share: float) -> float:
    """Return the logarithm of a share's odds; shares are taken for 1 in 200 at least, and at most for all but that."""
    share = min(max(share, 0.005), 0.995)
    return math.log(share / (1 - share))


def measure(config: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield one record for every case and number of drafts."""
    pair = Pair(config)
    factors: dict[float, float] = {}  # by agreement
    cases = config.cases or [Case.parse(text) for text in (["1"] if config.model else CASES)]
    for case in cases * config.rounds:
        sampling = SamplingOptions(temperature=case.temperature)
        options = GenerationOptions(max_new_tokens=config.new_tokens, ignore_eos=True, sampling=sampling)
        if config.model is None:
            if case.agreement is not None and case.agreement not in factors:
                factors[case.agreement] = pair.search(case.agreement, options)
            pair.damp(case.factor if case.agreement is None else factors[case.agreement])
        expected, step = timed(pair.engine("none", PLAIN, options), options, config)
        for count in config.speculate:
            engine = pair.engine(case.draft, count, options)
            found, seconds = timed(engine, options, config)
            yield record(config, case, pair.damped, engine, found == expected, step, seconds)


def warm_engine(
    target: LoadedModel, draft: LoadedModel | str, count: str, options: GenerationOptions, setting: dict[str, int]
) -> Engine:
    """Return an engine that decodes plainly or drafts so many tokens, ready to be timed."""
    began = time.perf_counter()
    if count == PLAIN:
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
    config: argparse.Namespace, case: Case, factor: float, engine: SpeculativeEngine, same: bool, step: float,
    seconds: float,
) -> dict[str, object]:  # fmt: skip
    """Return one row."""
    tally, count, target = engine.tally, engine.speculation.count, engine.model
    first = "ngram" if case.draft == "ngram" else f"first {config.layers} layers"
    row: dict[str, object] = {
        "model": config.model or config.shape,
        "format": target.format,
        "kernels": config.kernels,
        "compiled": engine.compiled,
        "draft": config.draft if config.model else first,
        "factor": None if config.model else factor,
        "wanted": case.agreement,
        "prompt": config.prompt if config.model else None,
        "drafts": count,
        "temperature": case.temperature,
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
    words = [f"{name}={row[name]}" for name in ("draft", "drafts", "factor", "temperature", "same")]
    parts = [f"{row['model']} {row['format']}", *words]
    parts += [f"{name} {value:.3f}" for name, value in number.items() if name not in ("factor", "temperature")]
    return "  ".join([*parts, str(row["arms"])])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    cli.run(main, prog="bench_speculation")
