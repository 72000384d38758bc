"""Train a small LLaMA: `python -m fastgen.train --text stories.txt --train-tokenizer 2048 --out stories`.

From a text, or from tokens of llm.c; from scratch or on from a model; on the text itself or on what a target makes of
it, for a draft. The folder that it writes is one that generate and transformers load. Under torchrun every process
takes its share of each batch.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastgen import cli
from fastgen.errors import FastgenError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fastgen.model import Transformer
    from fastgen.tokenizer.base import Tokenizer
    from fastgen.training.ranks import Ranks
    from fastgen.training.run import Run
    from fastgen.training.trainer import TrainingOptions

PROG = "fastgen.train"
STRETCH = 10  # steps between two looks at the losses

SOURCES = ("shape", "config", "init_from", "distill_from", "dtype")
"""Flags that a run's losses depend on beside its tokens and its options; a resumed run must be given the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(
    cli.FolderFlags, cli.TextFlags, cli.ComputeFlags, cli.TokenizerFlags, cli.ShapeFlags, cli.SeedFlags, cli.OutputFlags
):
    """The flags of `fastgen.train`."""

    resume: bool = cli.flag(False, "go on with the unfinished run in --out")
    tokens: str | None = cli.flag(None, "instead of --text: a token file of llm.c (uint16)", metavar="BIN")
    save_tokens: str | None = cli.flag(None, "write the text's tokens to a token file of llm.c", metavar="BIN")
    train_tokenizer: int | None = cli.flag(
        None, "learn a SentencePiece tokenizer of so many pieces from --text", type=int, metavar="VOCAB"
    )
    config: str | None = cli.flag(None, "a new model: the config.json that describes it", metavar="FILE")
    init_from: str | None = cli.flag(None, "the model to train on from", metavar="M")
    distill_from: str | None = cli.flag(None, "follow this model's predictions, not the text's", metavar="M")
    distill_temperature: float = cli.flag(1.0, "soften both predictions (default 1)", type=float, metavar="T")
    steps: int = cli.flag(1000, "optimizer steps (default 1000)", type=int, metavar="N")
    batch_size: int = cli.flag(32, "rows of a step, over all processes (default 32)", type=int, metavar="N")
    accumulate: int = cli.flag(1, "parts that a step's rows are taken in, to save memory", type=int, metavar="N")
    context: int = cli.flag(256, "tokens of a row, and the new model's context (default 256)", type=int, metavar="N")
    learning_rate: float = cli.flag(1e-3, "its highest; it ends at a tenth (default 1e-3)", type=float, metavar="R")
    warmup: int = cli.flag(100, "steps up to the highest learning rate (default 100)", type=int, metavar="N")
    weight_decay: float = cli.flag(0.1, "of matrices (default 0.1)", type=float, metavar="W")
    clip: float = cli.flag(1.0, "largest norm of the gradient (default 1)", type=float, metavar="N")
    validation: float = cli.flag(
        0.05, "share of the tokens, from their end, to measure on (default 0.05)", type=float, metavar="SHARE"
    )
    validate_every: int = cli.flag(200, "steps between validations (default 200)", type=int, metavar="N")
    save_every: int = cli.flag(500, "steps between saves (default 500)", type=int, metavar="N")
    sample_every: int = cli.flag(0, "steps between sample texts on stderr (default: only at the end)", type=int,
                                 metavar="N")  # fmt: skip


class Meter(Protocol):
    """Shows where a run stands, and passes on lines about it."""

    def update(self, step: int, figures: str) -> None:
        """Show that `step` steps are done."""

    def note(self, text: str) -> None:
        """Show a line that stays."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(TrainConfig, argv, prog=PROG, description="Train a small LLaMA from a text.")
    _check(config)
    from fastgen.training.ranks import joined_ranks

    with joined_ranks(config.device) as (ranks, device):
        run = _prepare(config, ranks, device)
        with _meter(config, leads=ranks.leads) as meter:
            meter.note(run.describe())
            with cli.interruptible():
                _train(config, run, meter)
        if config.json and ranks.leads:
            sys.stdout.write(json.dumps(_document(config, run)) + "\n")
    return 0


def _check(config: TrainConfig) -> None:
    """Raise `UsageError` for flags that contradict each other, before anything is imported or read."""
    if config.out is None:
        raise UsageError("--out DIR is missing: where to write the model")
    if bool(config.text) == (config.tokens is not None):
        raise UsageError("expected either --text FILE... or --tokens BIN, to learn from")
    if not config.text and (config.train_tokenizer is not None or config.save_tokens is not None):
        raise UsageError("--train-tokenizer and --save-tokens need a --text")
    if config.train_tokenizer is not None and config.tokenizer is not None:
        raise UsageError("--train-tokenizer and --tokenizer name two tokenizers; give one")
    if config.train_tokenizer is not None and (config.init_from or config.distill_from):
        raise UsageError("--train-tokenizer: a model that is given has a tokenizer, which must stay; leave it out")
    if len(config.shape) + sum(value is not None for value in (config.config, config.init_from)) > 1:
        raise UsageError("--shape, --config and --init-from each say what the model is; give one")
    if not 0 < config.validation < 1:
        raise UsageError(f"--validation {config.validation}: expected a share between 0 and 1")
    for name in ("validate_every", "save_every", "sample_every"):
        if getattr(config, name) < (0 if name == "sample_every" else 1):
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected a number of steps")


def _prepare(config: TrainConfig, ranks: "Ranks", device: str | None) -> "Run":
    from fastgen.device import choose_placement
    from fastgen.training import sources
    from fastgen.training.run import Run
    from fastgen.training.run_folder import RunFolder, check_new
    from fastgen.training.trainer import Trainer

    out = Path(str(config.out))
    if not config.resume:
        check_new(out)
    options = _options(config)
    placement = choose_placement(device, config.dtype)
    teacher = sources.load_teacher(config.distill_from, placement) if config.distill_from else None
    start = sources.load_start(config.init_from, placement) if config.init_from else None
    documents = sources.read_texts(config.text)
    vocabulary = sources.open_vocabulary(
        documents, train=config.train_tokenizer, path=config.tokenizer, models=[m for m in (start, teacher) if m]
    )
    # A model that follows another has the rows of its embedding, which may be more than the tokenizer's ids.
    size = teacher.config.vocab_size if teacher else vocabulary.tokenizer.vocab_size if vocabulary.tokenizer else None
    model = start.transformer if start else _new_model(config, vocabulary.tokenizer, size).to(placement.device)
    sources.check_fit(model.config, vocabulary.tokenizer, config.context, teacher.transformer if teacher else None)
    data = sources.load_tokens(
        documents, config.tokens, vocabulary.tokenizer, vocab_size=model.config.vocab_size,
        share=config.validation, context=config.context, keep=config.save_tokens if ranks.leads else None,
    )  # fmt: skip
    trainer = Trainer(
        model, data, options, placement, teacher=teacher.transformer if teacher else None, ranks=ranks,
        compile=config.compile,
    )  # fmt: skip
    settings = dataclasses.asdict(options) | {name: getattr(config, name) for name in SOURCES}
    settings["data"] = data.fingerprint()
    run = Run(
        trainer, RunFolder(out, settings, vocabulary.files, placement.dtype), data, placement, vocabulary.tokenizer
    )
    if config.resume:
        run.resume()
    return run


def _options(config: TrainConfig) -> "TrainingOptions":
    from fastgen.training.trainer import TrainingOptions

    names = [entry.name for entry in dataclasses.fields(TrainingOptions)]
    return TrainingOptions(**{name: getattr(config, name) for name in names})


def _new_model(config: TrainConfig, tokenizer: "Tokenizer | None", vocab_size: int | None) -> "Transformer":
    from fastgen.training import shape, sources

    if config.config is not None:
        described = sources.read_model_config(config.config)
    else:
        words = config.shape[0] if config.shape else shape.DEFAULT_SHAPE
        described = shape.parse_shape(words, vocab_size=vocab_size, context=config.context)
    if tokenizer is not None:
        described = shape.with_marks(described, tokenizer.bos_id, tokenizer.stop_ids)
    return shape.new_model(described, config.seed)


def _document(config: TrainConfig, run: "Run") -> dict[str, object]:
    from fastgen import report
    from fastgen.device import describe

    device = run.placement.device
    return {
        "schema_version": report.SCHEMA_VERSION,
        "command": PROG,
        "config": dataclasses.asdict(config),
        "device": describe(device),
        "processes": run.trainer.ranks.world,
        "versions": report.versions(),
        "peak_memory_bytes": report.peak_memory(device),
        **run.document(),
    }


def _train(config: TrainConfig, run: "Run", meter: Meter) -> None:
    """Run the loop to its end; what a failure leaves is in its message."""
    trainer = run.trainer
    try:
        while trainer.step < config.steps:
            run.advance(_next_stop(config, trainer.step))
            meter.update(trainer.step, run.figures())
            if trainer.step == config.steps or trainer.step % config.validate_every == 0:
                meter.note(run.validate())
            if config.sample_every and trainer.step % config.sample_every == 0:
                meter.note(f"step {trainer.step} writes: {run.sample()}")
            if trainer.step < config.steps and trainer.step % config.save_every == 0:
                run.save(finished=False)
        run.save(finished=True)
        meter.note(f"saved in {config.out}; it writes: {run.sample()}")
    except KeyboardInterrupt:
        meter.note(f"interrupted at step {trainer.step}. {run.what_is_saved()}")
        raise
    except FastgenError as error:
        raise type(error)(f"{error}\n{run.what_is_saved()}") from error


def _next_stop(config: TrainConfig, step: int) -> int:
    """Return the next step at which there is something to show or to do."""
    periods = (STRETCH, config.validate_every, config.save_every, config.sample_every or config.steps)
    return min(config.steps, *((step // period + 1) * period for period in periods))


@contextmanager
def _meter(config: TrainConfig, *, leads: bool) -> Iterator[Meter]:
    if not leads:
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _Lines(config.steps)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn(),
                   TextColumn("{task.description}"))  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar, bar.add_task("", total=config.steps))


class _Silent:
    """The meter of a process that does not lead."""

    def update(self, step: int, figures: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Lines(_Silent):
    """Plain lines, at most one in some seconds."""

    SECONDS = 5.0

    def __init__(self, steps: int) -> None:
        self._steps, self._shown = steps, time.perf_counter()

    def update(self, step: int, figures: str) -> None:
        if time.perf_counter() - self._shown > self.SECONDS or step == self._steps:
            self._shown = time.perf_counter()
            self.note(f"step {step}/{self._steps}  {figures}")

    def note(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class _Bar(_Silent):
    """A progress bar of rich, with lines above it."""

    def __init__(self, bar: "Progress", task: "TaskID") -> None:
        self._bar, self._task = bar, task

    def update(self, step: int, figures: str) -> None:
        self._bar.update(self._task, completed=step, description=figures)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    cli.run(main, prog=PROG)
