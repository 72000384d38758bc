"""How good a model is: `python -m fastgen.evaluate --text wiki.txt [--against MODEL]`.

Perplexity of a text and, beside another model, mean and 99th percentile of the KL divergence from its predictions, and
how often both like the same token best. The figures go to stdout, the rest to stderr.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen import cli, flags
from fastgen.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from fastgen.load import LoadedModel
    from fastgen.scoring import Scores

PROG = "fastgen.evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(
    flags.SourceFlags,
    flags.QuantFlags,
    flags.RankFlags,
    flags.KernelFlags,
    flags.TextFlags,
    flags.WindowFlags,
    flags.OutputFlags,
):
    """The flags of `fastgen.evaluate`."""

    against: str | None = flags.flag(None, "compare with this model, unquantized unless it is itself", metavar="M")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(EvaluateConfig, argv, prog=PROG, description="Measure a model's perplexity on a text.")
    if not config.text:
        raise UsageError("--text FILE is missing: what to measure on")
    text = read_text(config.text)
    from fastgen.scoring import score

    phases = cli.Phases()
    model = _load(config, config.model, phases, quantized=True)
    against = _load(config, config.against, phases, quantized=False) if config.against else None
    tokens = model.tokenizer.encode(text)[: config.max_tokens]
    if against and against.tokenizer.encode(text)[: config.max_tokens] != tokens:
        raise UsageError(f"--against {config.against}: makes other tokens of the text, so the two cannot be compared")
    with phases.phase("score", f"{len(tokens)} tokens") as advance:
        scores = score(
            model, tokens, width=min(config.window, model.config.max_seq_len), stride=config.stride, chunk=config.chunk,
            against=against, progress=advance,
        )  # fmt: skip
    sys.stdout.write(summary(model, scores) + "\n")
    if config.json:
        sys.stdout.write(json.dumps(_document(config, model, scores)) + "\n")
    return 0


def read_text(files: Sequence[str]) -> str:
    """Return the text of UTF-8 files, one after the other; raises `ModelFileError` for one that cannot be read."""
    texts = []
    for name in files:
        try:
            texts.append(Path(name).read_bytes().decode())
        except OSError as error:
            raise ModelFileError(f"--text {name}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ModelFileError(f"--text {name}: not UTF-8 at byte {error.start}; convert it first") from error
    return "".join(texts)


def summary(model: "LoadedModel", scores: "Scores") -> str:
    """Return the scores as lines for people."""
    lines = [
        f"weights     {model.format}, {model.transformer.weight_bytes() / 1e6:.1f} MB read a token",
        f"perplexity  {scores.perplexity:.4f} over {scores.tokens} tokens",
    ]
    if scores.mean_kl is not None:
        lines += [
            f"KL          {scores.mean_kl:.6f} mean, {scores.p99_kl:.6f} at 99%, nats a token",
            f"agreement   {scores.top1_agreement:.2%} of the likeliest tokens",
        ]
    return "\n".join(lines)


def _load(config: EvaluateConfig, name: str, phases: cli.Phases, *, quantized: bool) -> "LoadedModel":
    from fastgen import session
    from fastgen.load import load_model, use_kernels

    path = session.find(config, phases, None if quantized else name)
    names = [field.name for field in dataclasses.fields(flags.QuantFlags)] if quantized else []
    with phases.phase("load", name) as advance:
        ranks, device = session.join_ranks(config)
        model = load_model(
            path,
            offline=config.offline,
            tokenizer=config.tokenizer,
            device=device,
            dtype=config.dtype,
            progress=advance,
            ranks=ranks,
            check_ranks=config.check_ranks,
            **{name: getattr(config, name) for name in names},
        )
    use_kernels(model, config.kernels if quantized else "reference", compile=False)
    phases.note(model.checkpoint.notes)
    return model


def _document(config: EvaluateConfig, model: "LoadedModel", scores: "Scores") -> dict[str, object]:
    from fastgen import session
    from fastgen.device import describe
    from fastgen.report import SCHEMA_VERSION, versions

    return {
        "schema_version": SCHEMA_VERSION,
        "command": PROG,
        "config": dataclasses.asdict(config),
        "model": session.model_entry(model) | {"weights": model.format},
        "weight_bytes": model.transformer.weight_bytes(),
        "device": describe(model.placement.device),
        "versions": versions(),
        "scores": dataclasses.asdict(scores),
    }


if __name__ == "__main__":
    cli.run(main, prog=PROG)
