"""Train a small LLaMA: `python -m fastgen.train --text stories.txt --train-tokenizer 2048 --out stories`.

From a text, or from tokens of llm.c; from scratch or on from a model; on the text itself or on what a target makes of
it, for a draft. The folder that it writes is one that generate and transformers load. Under torchrun every process
takes its share of each batch.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen import cli, flags
from fastgen.errors import FastgenError, UsageError

if TYPE_CHECKING:
    from fastgen.config import ModelConfig
    from fastgen.tokenizer.base import Tokenizer
    from fastgen.training.meter import Meter
    from fastgen.training.ranks import Ranks
    from fastgen.training.run import Run
    from fastgen.training.sources import GivenModel
    from fastgen.training.trainer import TrainingOptions

PROG = "fastgen.train"
STRETCH = 10  # steps between two looks at the losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(
    flags.FolderFlags,
    flags.TextFlags,
    flags.ComputeFlags,
    flags.TokenizerFlags,
    flags.ShapeFlags,
    flags.SeedFlags,
    flags.OutputFlags,
):
    """The flags of `fastgen.train`."""

    resume: bool = flags.flag(False, "go on with the unfinished run in --out")
    tokens: str | None = flags.flag(None, "instead of --text: a token file of llm.c (uint16)", metavar="BIN")
    save_tokens: str | None = flags.flag(None, "write the text's tokens to a token file of llm.c", metavar="BIN")
    train_tokenizer: int | None = flags.flag(
        None, "learn a SentencePiece tokenizer of so many pieces from --text", type=int, metavar="VOCAB"
    )
    config: str | None = flags.flag(None, "a new model: the config.json that describes it", metavar="FILE")
    init_from: str | None = flags.flag(None, "the model to train on from", metavar="M")
    distill_from: str | None = flags.flag(None, "follow this model's predictions, not the text's", metavar="M")
    distill_temperature: float = flags.flag(1.0, "soften both predictions (default 1)", type=float, metavar="T")
    steps: int = flags.flag(1000, "optimizer steps (default 1000)", type=int, metavar="N")
    batch_size: int = flags.flag(32, "rows of a step, over all processes (default 32)", type=int, metavar="N")
    accumulate: int = flags.flag(1, "parts that a step's rows are taken in, to save memory", type=int, metavar="N")
    context: int = flags.flag(256, "tokens of a row, and the new model's context (default 256)", type=int, metavar="N")
    learning_rate: float = flags.flag(1e-3, "its highest; it ends at a tenth (default 1e-3)", type=float, metavar="R")
    warmup: int = flags.flag(100, "steps up to the highest learning rate (default 100)", type=int, metavar="N")
    weight_decay: float = flags.flag(0.1, "of matrices (default 0.1)", type=float, metavar="W")
    clip: float = flags.flag(1.0, "largest norm of the gradient (default 1)", type=float, metavar="N")
    validation: float = flags.flag(
        0.05, "share of the tokens, from their end, to measure on, but at most 1,048,576 (default 0.05)",
        type=float, metavar="SHARE",
    )  # fmt: skip
    validate_every: int = flags.flag(200, "steps between validations (default 200)", type=int, metavar="N")
    save_every: int = flags.flag(500, "steps between saves (default 500)", type=int, metavar="N")
    sample_every: int = flags.flag(0, "steps between sample texts on stderr (default: only at the end)", type=int,
                                 metavar="N")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(TrainConfig, argv, prog=PROG, description="Train a small LLaMA from a text.")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone:
        _check(config)  # at once, before torch is imported
    from fastgen.training.lock import sole_run
    from fastgen.training.meter import shown_meter
    from fastgen.training.ranks import joined_ranks

    with joined_ranks(config.device) as (ranks, device):
        if not alone:
            _check(config)  # here, where one process speaks for all
        with sole_run(Path(str(config.out))) if ranks.leads else contextlib.nullcontext():
            run = _prepare(config, ranks, device)
            with shown_meter(config.steps, leads=ranks.leads) as meter:
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
    if config.distill_from is None:
        flags.refuse(config, ("distill_temperature",), "only with --distill-from, whose predictions it softens")
    if not 0 < config.validation < 1:
        raise UsageError(f"--validation {config.validation}: expected a share between 0 and 1")
    for name in ("validate_every", "save_every", "sample_every"):
        if getattr(config, name) < (0 if name == "sample_every" else 1):
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected a number of steps")


def _prepare(config: TrainConfig, ranks: "Ranks", device: str | None) -> "Run":
    """Return the run that the flags describe, every part of it checked, ready to begin or to go on."""
    from fastgen.device import choose_placement
    from fastgen.training import identity, run_folder, shape, sources, tokens
    from fastgen.training.cost import require_training_memory
    from fastgen.training.run import Run
    from fastgen.training.trainer import Trainer

    out, keep = Path(str(config.out)), Path(config.save_tokens) if config.save_tokens else None
    (run_folder.check_unfinished if config.resume else run_folder.check_new)(out)
    if keep is not None:
        tokens.check_target(keep, out)
    options = _options(config)
    placement = choose_placement(device, config.dtype)
    teacher = sources.load_teacher(config.distill_from, placement) if config.distill_from else None
    start = sources.load_start(config.init_from, placement) if config.init_from else None
    documents = sources.read_texts(config.text)
    vocabulary = sources.open_vocabulary(
        documents, train=config.train_tokenizer, path=config.tokenizer, models=[m for m in (start, teacher) if m]
    )
    model_config = start.config if start else _describe(config, vocabulary.tokenizer, teacher)
    sources.check_fit(model_config, vocabulary.tokenizer, config.context, teacher)
    rows = -(-config.batch_size // (config.accumulate * ranks.world))
    require_training_memory(model_config, rows, config.context, placement.device, loaded=start is not None)
    data = sources.load_tokens(
        documents, config.tokens, vocabulary.tokenizer, vocab_size=model_config.vocab_size,
        share=config.validation, context=config.context,
    )  # fmt: skip
    model = start.transformer if start else shape.new_model(model_config, config.seed).to(placement.device)
    followed = teacher.transformer if teacher else None
    trainer = Trainer(model, data, options, placement, teacher=followed, ranks=ranks, compile=config.compile)
    settings = identity.settings_of(
        model_config, options, data, placement, start=model if start else None, teacher=followed,
        tokenizer=vocabulary.files, compile=config.compile, processes=ranks.world,
    )  # fmt: skip
    folder = run_folder.RunFolder(out, settings, vocabulary.files, placement.dtype)
    run = Run(trainer, folder, data, placement, vocabulary.tokenizer)
    if config.resume:
        run.resume()
    if keep is not None and ranks.leads:
        tokens.write_token_file(keep, data.whole())
    return run


def _options(config: TrainConfig) -> "TrainingOptions":
    from fastgen.training.trainer import TrainingOptions

    names = [entry.name for entry in dataclasses.fields(TrainingOptions)]
    return TrainingOptions(**{name: getattr(config, name) for name in names})


def _describe(config: TrainConfig, tokenizer: "Tokenizer | None", teacher: "GivenModel | None") -> "ModelConfig":
    """Return what a new model is to be."""
    from fastgen.training import shape, sources

    if config.config is not None:
        described = sources.read_model_config(config.config)
    else:
        # A model that follows another has the rows of its embedding, which may be more than the tokenizer's ids.
        size = teacher.config.vocab_size if teacher else tokenizer.vocab_size if tokenizer else None
        words = config.shape[0] if config.shape else shape.DEFAULT_SHAPE
        described = shape.parse_shape(words, vocab_size=size, context=config.context)
    return described if tokenizer is None else shape.with_marks(described, tokenizer.bos_id, tokenizer.stop_ids)


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


def _train(config: TrainConfig, run: "Run", meter: "Meter") -> None:
    """Run the loop to its end; what a failure leaves is in its message."""
    trainer = run.trainer
    try:
        with trainer.ranks.watched():
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


if __name__ == "__main__":
    cli.run(main, prog=PROG, every_rank_speaks=True)  # it sees to it that one does
